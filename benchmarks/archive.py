"""What a session on a GPU brought back, put where it belongs.

`python -m fastclip.bench.archive DIR/lab.tar.gz [--root CHECKOUT]`: results go to
benchmarks/results, tables of tilings and plans to kernels, a note with the figures and the profile
to benchmarks/notes. Nothing is written where a file of the archive is damaged or a result of that
name exists.
"""

import argparse
import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text
from fastclip.bench import records
from fastclip.bench.gpu_lab import summary
from fastclip.bench.runner import Row
from fastclip.kernels.attention_plans import GradientPlan, Plan
from fastclip.kernels.launch import Tiling
from fastclip.messages import logger

# files that `fastclip bench` reads, and tables that launchers read
RESULTS = ("losses", "small", "attention", "train-step", "data")
TABLES = ("tilings", "attention_plans")
# a session's JSON files and logs are far smaller
LARGEST_BYTES = 64 << 20


def read_archive(archive: Path) -> dict[str, str]:
    """The texts of an archive's files, by name; only plain files of its top folder.

    Raises:
        ValueError: it is not an archive of `benchmarks/gpu_lab.sh`; the message says why.
    """
    texts = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not member.isfile() or "/" in member.name or member.size > LARGEST_BYTES:
                    raise ValueError(
                        f"{archive} holds {member.name!r}, which the lab never packs: no plain "
                        f"file of at most {LARGEST_BYTES >> 20} MiB in its top folder"
                    )
                file = tar.extractfile(member)
                assert file is not None
                texts[member.name] = file.read().decode(errors="replace")
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{archive} is not an archive of benchmarks/gpu_lab.sh: {error}"
        ) from error
    if "environment.json" not in texts:
        raise ValueError(f"{archive} has no environment.json; give a lab.tar.gz of gpu_lab.sh")
    return texts


def import_archive(archive: Path, root: Path) -> list[Path]:
    """Write an archive's results, tables and a note into a checkout.

    Everything is read and checked before anything is written.

    Args:
        archive: `lab.tar.gz` of `benchmarks/gpu_lab.sh`.
        root: the checkout.

    Returns:
        The files written: `benchmarks/results/DATE-DEVICE-KIND.json`, `kernels/tilings.json`,
        `kernels/attention_plans.json`, `benchmarks/notes/DATE-DEVICE-STAGE.md` and -profile.txt.

    Raises:
        ValueError: the archive or a file in it is damaged, or a result of that name exists.
        FileNotFoundError: there is no such archive, or `root` is not a checkout.
    """
    texts = read_archive(archive)
    for folder in ("benchmarks/results", "benchmarks/notes", "kernels"):
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"{root} has no {folder}; run this in a checkout of fastclip")
    environment = _object(texts, "environment.json")
    statuses = _object(texts, "stage.json") if "stage.json" in texts else {}
    stem = f"{str(environment.get('date', ''))[:10]}-{_slug(str(environment.get('device', '')))}"
    stage = _slug("-".join(statuses)) or "lab"
    written: dict[Path, str] = {}
    found = {}
    for kind in RESULTS:
        if f"{kind}.json" in texts:
            found[kind] = _checked(texts[f"{kind}.json"], kind)
            written[root / "benchmarks/results" / f"{stem}-{kind}.json"] = texts[f"{kind}.json"]
    note = root / "benchmarks/notes" / f"{stem}-{stage}.md"
    written[note] = _note(environment, statuses, found, texts)
    if "profile.txt" in texts:
        written[root / "benchmarks/notes" / f"{stem}-profile.txt"] = texts["profile.txt"]
    for path in written:
        if path.exists():
            raise ValueError(f"{path} exists; move it away to import these results")
    for name in TABLES:
        if f"{name}.json" in texts:
            _check_table(name, _object(texts, f"{name}.json"))
            written[root / "kernels" / f"{name}.json"] = texts[f"{name}.json"]
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def _object(texts: dict[str, str], name: str) -> dict[str, Any]:
    try:
        content = json.loads(texts[name])
    except ValueError as error:
        raise ValueError(f"{name} of the archive is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of the archive holds a {type(content).__name__}, not an object")
    return content


def _checked(text: str, kind: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{kind}.json"
        file.write_text(text)
        return records.read(file).rows


def _check_table(name: str, table: dict[str, Any]) -> None:
    try:
        if name == "tilings":
            for kernels in table["tilings"].values():
                for precisions in kernels.values():
                    for numbers in precisions.values():
                        Tiling(*numbers)
            return
        for directions in table["plans"].values():
            for direction, plans in directions.items():
                for fields in plans.values():
                    {"forward": Plan, "gradient": GradientPlan}[direction](*fields)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{name}.json of the archive is no such table: {error!r}") from error


def _note(
    environment: dict[str, Any],
    statuses: dict[str, Any],
    found: dict[str, list[dict[str, Any]]],
    texts: dict[str, str],
) -> str:
    """A lab note with what was measured; what it means is for a person to write."""
    lines = [f"# {environment.get('device')}: {', '.join(statuses) or 'a session'}", ""]
    lines += [f"{key}: {value}  " for key, value in environment.items()]
    for parts in statuses.values():
        lines += ["", *(f"- {part}: {status}" for part, status in parts.items())]
    if "ceilings.json" in texts:
        ceilings = _object(texts, "ceilings.json")
        reached = {k: v for k, v in ceilings.items() if isinstance(v, float)}
        lines += ["", "Ceilings: " + ", ".join(f"{k} {v:.2f} T/s" for k, v in reached.items())]
    if "losses" in found:
        known = {field: None for field in Row.__dataclass_fields__}
        rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in found["losses"]]
        lines += ["", "```text", *summary(rows), "```"]
    lines += [f"\nRows of {kind}: {len(rows)}" for kind, rows in found.items()]
    for name in sorted(texts):
        if name.startswith("check-") and name.endswith(".json"):
            lines += ["", *_check_lines(name, texts[name])]
    if "sweep.json" in texts:
        lines += ["", "Fastest tilings, in ms:", "", *_sweep_lines(_object(texts, "sweep.json"))]
    return "\n".join([*lines, "", "## What it says", ""]) + "\n"


def _check_lines(name: str, text: str) -> list[str]:
    """How many cases an implementation was right in, and those it was wrong in."""
    try:
        findings = json.loads(text)
        wrong = [finding for finding in findings if not finding["ok"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} of the archive is no list of findings: {error!r}") from error
    backend = name.removeprefix("check-").removesuffix(".json")
    lines = [f"Check of {backend}: {len(findings)} cases against float64, {len(wrong)} wrong."]
    return lines + [f"- wrong: {json.dumps(finding)}" for finding in wrong[:20]]


def _sweep_lines(result: dict[str, Any]) -> list[str]:
    """The three fastest tilings of each kernel and precision."""
    try:
        return [
            f"- {kernel}, {precision}: "
            + ", ".join(f"{row['tiling']} {1e3 * row['seconds']:.3f}" for row in rows[:3])
            for kernel, precisions in result.items()
            for precision, rows in (
                (p, [row for row in rows if "seconds" in row]) for p, rows in precisions.items()
            )
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"sweep.json of the archive is no sweep: {error!r}") from error


def _slug(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word != "nvidia")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print each file written; the status is 1 where the archive is refused."""
    parser = argparse.ArgumentParser(prog="fastclip.bench.archive", description=__doc__)
    parser.add_argument("archive", type=Path, help="the lab.tar.gz")
    parser.add_argument("--root", type=Path, default=Path("."), help="the checkout")
    given = parser.parse_args(arguments)
    try:
        written = import_archive(given.archive, given.root)
    except (ValueError, OSError) as error:
        logger.error(f"fastclip.bench.archive: error: {error}")
        return 1
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
