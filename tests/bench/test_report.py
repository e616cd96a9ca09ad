"""Reports and comparisons say what the files say."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastclip.bench import compare, measured, plots, records, report
from fastclip.bench.kinds import KINDS, number
from fastclip.cli import main
from tests.test_repo_shape import ROOT

RESULTS = ROOT / "benchmarks" / "results"
LOSSES = RESULTS / "2026-11-24-cpu-losses.json"


def changed(tmp_path: Path, name: str, **change: Any) -> Path:
    """A copy of a committed file, its environment, or its rows by a function, changed."""
    content = json.loads(LOSSES.read_text())
    for row in content["results"]:
        # the file is older than this field's name
        row["baseline"] = row.pop("rival")
        change.get("row", lambda row: None)(row)
    content["environment"] |= change.get("environment", {})
    file = tmp_path / name
    file.write_text(json.dumps(content))
    return file


def test_fields_of_older_files_are_read() -> None:
    old = json.loads(LOSSES.read_text())["results"][0]
    assert old["roof_share"] == records.read(LOSSES).rows[0]["matmul_share"] is not None
    memory = RESULTS / "2026-11-28-cpu-memory.json"
    pairs = zip(json.loads(memory.read_text())["results"], records.read(memory).rows, strict=True)
    for old, row in pairs:
        for name in ("saved", "peak"):
            assert old[f"{name}_order"] == row[f"{name}_exponent"]


def test_fastclip_stands_beside_the_best_baseline(tmp_path: Path) -> None:
    target = tmp_path / "out" / "report.md"
    report.write([records.read(LOSSES)], target)
    text = target.read_text()
    assert "2026-11-24, Intel(R) Xeon(R) Processor, 2 cores, 2 threads" in text
    assert "torch 2.14.1+cu130" in text
    assert "| loss | n | D | fastclip, ms | best baseline | its ms | × faster |" in text
    assert "| clip | 8,192 | 512 | 887 | open_clip compiled | 1,300 | 1.46 |" in text
    assert "missing: it runs on CUDA only" in text
    assert "No baseline that ran is as fast" in text
    plots = sorted(path.name for path in target.parent.glob("*.svg"))
    assert "report-0-losses-clip-512.svg" in plots and len(plots) == 6
    for name in plots:
        assert f"]({name})" in text
        drawn = (target.parent / name).read_text()
        assert "fastclip" in drawn and "8,192" in drawn


def test_baselines_that_are_as_fast_are_named(tmp_path: Path) -> None:
    def quicken(row: dict[str, Any]) -> None:
        if (row["operator"], row["n"], row["baseline"]) == ("clip", 4096, "open_clip"):
            row |= {"p20": 0.19, "p50": 0.2}

    text = report.markdown([records.read(changed(tmp_path, "x.json", row=quicken))])
    assert "or faster (× faster) at: clip n = 4,096 D = 512 (0.86 for open_clip)." in text
    assert "| clip | 4,096 | 512 | 234 | open_clip | 200 | 0.86 |" in text


def test_failures_are_reported(tmp_path: Path) -> None:
    """Ours, though no baseline is as fast elsewhere; and a baseline's at one size of several."""

    def fail(row: dict[str, Any]) -> None:
        place = row["operator"], row["n"], row["baseline"]
        if place in (("siglip", 8192, "fastclip"), ("clip", 8192, "open_clip")):
            row |= {"status": "out of memory", "p50": None}

    record = records.read(changed(tmp_path, "x.json", row=fail))
    message = "fastclip failed where a baseline ran, at: siglip n = 8,192 D = 512."
    assert message in report.markdown([record])
    page = " ".join(measured.section(record, ["x.json"]).split())
    assert message in page and "open_clip for clip of 8,192 rows (out of memory)" in page
    # at no size, though it ran for another loss
    assert "pytorch_metric_learning for nt_xent (not tried beyond 256)" in page


def test_a_baseline_within_the_spread_counts_as_fast() -> None:
    (group, *_) = KINDS["losses"].groups(records.read(LOSSES))
    assert group.ours is not None and not group.as_good
    near = copy.deepcopy(group)
    near.baselines[0]["p20"] = near.ours["p80"]  # type: ignore[index]
    assert [row["baseline"] for row in near.as_good] == ["open_clip compiled"]
    # our own variants and the matmul time are no baselines
    assert {row["baseline"] for row in group.baselines} == {"open_clip", "open_clip compiled"}


def test_loading_is_better_the_more_it_loads() -> None:
    record = records.read(RESULTS / "2026-11-24-cpu-loading.json")
    (strong, plain) = KINDS["data"].groups(record)
    assert strong.baselines[0]["loader"] == "torchvision's transforms"
    assert plain.times(plain.baselines[0]) > 1 and not plain.as_good


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1,230"),
        (99.96, "100"),
        (9.996, "10.0"),
        (9.76, "9.76"),
        (0.01234, "0.012"),
        (0.0, "0"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_files_compare_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(row: dict[str, Any]) -> None:
        if row["operator"] == "siglip" and row["baseline"] == "fastclip":
            for name in ("p20", "p50", "p80"):
                row[name] *= 2

    other = changed(tmp_path, "later.json", row=slow, environment={"torch": "9.9"})
    assert main(["bench", "compare", str(LOSSES), str(other)]) == 0
    message = capsys.readouterr()
    assert "warning: torch is 2.14.1+cu130 in 2026-11-24-cpu-losses.json, 9.9 in" in message.err
    marked = [line.split() for line in message.out.splitlines() if line.endswith("differs")]
    assert [words[:4] for words in marked] == [
        ["siglip", "4096", "512", "fastclip"],
        ["siglip", "8192", "512", "fastclip"],
    ]
    # B takes twice as long: it is 0.5 times as fast
    assert {words[4] for words in marked} == {"0.500"}
    timed = [row for row in json.loads(LOSSES.read_text())["results"] if row["p50"]]
    assert f"2 of {len(timed)} rows beyond the spread" in message.out


def test_a_row_that_fails_in_one_file_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(row: dict[str, Any]) -> None:
        if (row["operator"], row["n"], row["baseline"]) == ("clip", 8192, "fastclip"):
            row |= {"status": "out of memory", "p50": None}

    other = changed(tmp_path, "later.json", row=fail)
    assert main(["bench", "compare", str(LOSSES), str(other)]) == 0
    message = capsys.readouterr()
    assert (
        f"clip 8192 512 fastclip ran in {LOSSES.name} alone; in later.json: out of" in message.err
    )
    assert message.err.count("ran in") == 1
    assert f"A: {LOSSES.name}\nB: later.json\nby median time; above 1, B" in message.out
    loading = str(RESULTS / "2026-11-24-cpu-loading.json")
    assert main(["bench", "compare", loading, loading]) == 0
    assert "by images a second; above 1, B is better" in capsys.readouterr().out


def test_rows_of_one_file_and_a_busy_machine_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(tmp_path, "later.json", environment={"load_average": 7.3})
    content = json.loads(other.read_text())
    content["results"] = [row for row in content["results"] if row["operator"] != "clip"]
    other.write_text(json.dumps(content))
    assert main(["bench", "compare", str(LOSSES), str(other)]) == 0
    warned = capsys.readouterr().err
    timed = [row for row in records.read(LOSSES).rows if row["operator"] == "clip" and row["p50"]]
    first = f"clip {timed[0]['n']} {timed[0]['width']} {timed[0]['baseline']}"
    assert f"{LOSSES.name} alone has {len(timed)} rows, first {first}" in warned
    assert "later.json was measured on a busy machine (load average 7.3 with 2 threads)" in warned


def test_other_devices_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(tmp_path, "gpu.json", environment={"device": "NVIDIA H100"})
    assert main(["bench", "compare", str(LOSSES), str(other)]) == 1
    assert "--across-devices" in capsys.readouterr().err
    assert main(["bench", "compare", str(LOSSES), str(other), "--across-devices"]) == 0
    assert "NVIDIA H100" in capsys.readouterr().err


def test_other_benchmarks_and_rows_are_refused(tmp_path: Path) -> None:
    losses, data = (records.read(RESULTS / f"2026-11-24-cpu-{x}.json") for x in ("clip", "loading"))
    with pytest.raises(ValueError, match="two files of one benchmark"):
        list(compare.differences(losses, data))

    def widen(row: dict[str, Any]) -> None:
        row["width"] = 7

    other = records.read(changed(tmp_path, "x.json", row=widen))
    with pytest.raises(ValueError, match="no row in common"):
        compare.compare(losses, other)


def test_the_page_is_made_of_committed_results() -> None:
    """After `fastclip bench report FILES --page docs/benchmarks.md` nothing is left to change."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    names = measured.named(text)
    content = measured.section(measured.merge([ROOT / name for name in names]), names)
    assert text == measured.replaced(text, content)
    front = (ROOT / "README.md").read_text()
    assert f"]({measured.PLOT.as_posix()})" in front and (ROOT / measured.PLOT).is_file()


def test_a_page_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{measured.BEGIN}\nold\n{measured.END}\n\nafter\n")
    shutil.copy(LOSSES, tmp_path / "r.json")
    assert main(["bench", "report", str(tmp_path / "r.json"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "`r.json`" in text and "| `clip_loss` | 887 |" in text
    assert "| `clip_loss` | 1.42 × | 1.46 × |" in text
    assert "open_clip compiled" in (tmp_path / measured.PLOT).read_text()
    # again, from the files that it names
    assert main(["bench", "report", "--page", str(page)]) == 0
    assert page.read_text() == text
    page.write_text("nothing")
    assert main(["bench", "report", str(tmp_path / "r.json"), "--page", str(page)]) == 1
    assert measured.BEGIN in capsys.readouterr().err and page.read_text() == "nothing"


def test_one_table_is_of_one_machine(tmp_path: Path) -> None:
    other = changed(tmp_path, "x.json", environment={"device": "another"})
    with pytest.raises(ValueError, match="one machine"):
        measured.merge([LOSSES, other])


def test_curves_are_against_rows_and_widths(tmp_path: Path) -> None:
    record = records.read(LOSSES)
    wider = [{**row, "width": 1024, "p50": row["p50"] and 2 * row["p50"]} for row in record.rows]
    both = dataclasses.replace(record, rows=[*record.rows, *wider])
    names = plots.draw(both, tmp_path, "x")
    of_clip = [name for name in names if "-clip-" in name]
    assert of_clip == ["x-clip-512.svg", "x-clip-1024.svg", "x-clip-widths.svg"]
    assert all((tmp_path / name).is_file() for name in names)
    # a single size is no curve
    single = [row for row in record.rows if row["n"] == 4096]
    assert plots.draw(dataclasses.replace(record, rows=single), tmp_path, "y") == []
    assert plots.draw(records.read(RESULTS / "2026-11-24-cpu-loading.json"), tmp_path, "z") == []


def test_the_same_plot_has_the_same_bytes(tmp_path: Path) -> None:
    panels = plots.loss_panels(records.read(LOSSES), "clip", 512, measured.SHOWN)
    speed, memory = panels
    assert isinstance(speed, plots.Bars) and isinstance(memory, plots.Panel)
    assert set(memory.lines) == set(measured.SHOWN)
    rows = [r for r in records.read(LOSSES).rows if (r["operator"], r["n"]) == ("clip", 8192)]
    times = {row["baseline"]: row["p50"] for row in rows}
    ratio = times["open_clip compiled"] / times["fastclip"]  # the fastest, as the table has it
    assert speed.bars[0] == ("clip_loss", ratio, f"{ratio:.1f} ×  open_clip compiled")
    for name in ("a.svg", "b.svg"):
        plots.figure(panels, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
