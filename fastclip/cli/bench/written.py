"""`fastclip bench report|compare`: what the files of the other parts say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastclip.messages import logger


@dataclass(frozen=True)
class ReportConfig:
    """Make Markdown tables and plots of JSON files: fastclip beside the best baseline of each size.

    Sizes where a baseline is as fast are named. Without --output it is printed, in 80 columns.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """JSON files that the other parts wrote with --output."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for report.md and its plots."""
    markdown: Path | None = None
    """Markdown file to write instead of --output's report.md, with the plots beside it."""
    page: Path | None = None
    """File whose text between <!-- bench:losses --> and <!-- /bench --> is updated, with the plot
    docs/performance.svg of its checkout. Without PATHs, from the files that the text names."""

    def run(self) -> int:
        """Read all files first, then write."""
        import fastclip.bench.measured as measured
        import fastclip.bench.records as records
        import fastclip.bench.report as report

        if self.page is not None:
            if self.output is not None or self.markdown is not None:
                raise ValueError("--page writes that page alone; leave out --output, --markdown")
            measured.update(self.page, self.files)
            return 0
        if self.output is not None and self.markdown is not None:
            raise ValueError("--output and --markdown are two places; give one")
        if not self.files:
            raise ValueError("no files; give JSON files that `fastclip bench ... --output` wrote")
        found = [records.read(file) for file in self.files]
        target = self.output / "report.md" if self.output is not None else self.markdown
        if target is None:
            print(report.printed(found))
        else:
            report.write(found, target)
            print(f"{target} has the tables and plots")
        return 0


@dataclass(frozen=True)
class CompareConfig:
    """Compare two JSON files of one part, row by row: how many times better B is, with the spread.

    Above 1, B is faster, by the median time, or of `data` the images a second; of `memory` it keeps
    less, and there is no spread. The spread is what the 20th and 80th percentiles of both allow at
    least and at most; a row whose spread leaves out 1 is marked. Rows that ran in one file alone
    are warned of.
    """

    before: Annotated[Path, tyro.conf.Positional]
    """JSON file A."""
    after: Annotated[Path, tyro.conf.Positional]
    """JSON file B."""
    across_devices: bool = False
    """Compare files of different devices."""

    def run(self) -> int:
        """Print a line for each row that both files have."""
        import fastclip.bench.compare as compare
        import fastclip.bench.records as records

        before, after = (records.read(file) for file in (self.before, self.after))
        for warning in compare.differences(before, after, self.across_devices):
            logger.warning(f"warning: {warning}")
        pairs = compare.compare(before, after)
        for warning in compare.failures(before, after):
            logger.warning(f"warning: {warning}")
        print(
            f"A: {before.name}\nB: {after.name}\nby {compare.measured(after)}; above 1, B is better"
        )
        print("\n".join(compare.lines(pairs, after.benchmark)))
        return 0
