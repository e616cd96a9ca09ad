"""Shipped kernels and tilings compiled ahead of time, from A100 to B200: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastclip.bench import compile_limits
from fastclip.kernels.launch import VARIANTS, tiling_of, tilings

ARCHITECTURES = (80, 86, 90, 100)
LEAN = ("lean_statistics_kernel", "lean_gradient_kernel", "sigmoid_kernel")
OWN = ("flagged_statistics_kernel", "flagged_gradient_kernel", "sigmoid_entries_kernel")
WITH_PRODUCT = (*LEAN, *OWN, "statistics_kernel")

# the most instructions, shuffles, barriers and loads behind the product of a 128 x 256 tile on
# Hopper, of 128 x 128 on the others, and the largest share of the product's cycles at D = 768 that
# a unit needs for them; a compiler's next version may add a few
MOST = {
    (90, "lean_statistics_kernel", "both"): (1300, 240, 16, 8, 0.35),
    (90, "lean_statistics_kernel", "maxima"): (1850, 440, 16, 8, 0.45),
    (90, "lean_statistics_kernel", "kept"): (1300, 240, 16, 8, 0.35),
    (90, "lean_gradient_kernel", "both"): (1100, 240, 16, 48, 0.35),
    (90, "sigmoid_kernel", "gradient"): (2200, 240, 16, 16, 0.4),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Compiled in a process of its own: this one may have Triton's interpreter in place."""
    folder: Path = tmp_path_factory.mktemp("compile")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "fastclip.bench.compile_report", "--json"]
    # a limit that is exceeded is for the tests to say
    found = subprocess.run(
        [*command, str(folder / "found.json")], env=environment, capture_output=True, text=True
    )
    assert found.returncode in (0, 1), found.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_resources(reports: list[dict]) -> None:
    """Shared memory and registers within the architecture's, the right matrix instruction."""
    instruction = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for report in reports:
        limits = compile_limits.limits_of(report["triton"], report["architecture"])
        stated = limits.get(compile_limits.name_of(report), {}).get("spilled", 0)
        assert report["spills"] <= stated, report
        # a candidate of the sweep may spill, and second launches
        shipped = report["kernel"] in LEAN and "/walking/" not in report["variant"]
        assert stated == 0 or not shipped, report
        assert report["shared"] <= report["shared_limit"], report
        assert report["registers"] <= 255, report
        on_tensor_cores = report["variant"].endswith(("16bit", "tf32"))
        if report["kernel"] in WITH_PRODUCT:
            expected = instruction[report["architecture"]] if on_tensor_cores else "none"
            assert report["tensor_core"] == expected, report
        if report["kernel"] == "weigh_kernel":
            # memory limits it: programs that run side by side hide its latency
            assert report["registers"] <= 96, report
    assert {r["architecture"] for r in reports} == set(ARCHITECTURES)
    print(f"{len(reports)} compilations")


@pytest.mark.slow
def test_epilogues(reports: list[dict]) -> None:
    """An epilogue costs a fraction of its tile's product, whatever limits it."""
    counted = {
        (r["architecture"], r["kernel"], r["variant"].removesuffix("/16bit")): r
        for r in reports
        if r["epilogue"] is not None
    }
    for key, report in counted.items():
        found = report["epilogue"]
        floors = [found[unit] / report["product"] for unit in ("issue", "exchange", "special")]
        print(*key, *found.values(), *(f"{floor:.2f}" for floor in floors))
        assert found["spills"] == 0, key
    for key, (instructions, shuffles, barriers, loads, floor) in MOST.items():
        found, product = counted[key]["epilogue"], counted[key]["product"]
        assert found["instructions"] <= instructions, (key, found)
        assert found["shuffles"] <= shuffles, (key, found)
        assert found["barriers"] <= barriers, (key, found)
        assert found["loads"] <= loads, (key, found)
        for unit in ("issue", "exchange", "special"):
            assert found[unit] <= floor * product, (key, unit, found)
    assert {key[0] for key in counted} == set(ARCHITECTURES)


@pytest.mark.slow
def test_limits_of_every_variant(reports: list[dict]) -> None:
    """On every architecture, of all that is timed a tile; nothing else spills."""
    problems = [line for report in reports for line in compile_limits.exceeded(report)]
    assert not problems, "\n".join(problems)
    # and a row of the table stands for something that is compiled
    for architecture in ARCHITECTURES:
        compiled = {compile_limits.name_of(r) for r in reports if r["architecture"] == architecture}
        assert compiled >= set(compile_limits.limits_of("3.8", architecture))


def test_a_limit_above_the_aim_says_why() -> None:
    for version, architectures in compile_limits.read().items():
        for architecture, rows in architectures.items():
            for name, row in rows.items():
                above = row.get("floor", 0) > compile_limits.aim_of(name)
                above |= row.get("spilled", 0) > 0 or compile_limits.FAILS in row
                assert above == (compile_limits.REASON in row), (version, architecture, name)


def report_of(**changed: Any) -> dict[str, Any]:
    kinds = ("instructions", "shuffles", "barriers", "loads", "spills")
    epilogue = dict.fromkeys((*kinds, "issue", "exchange", "special"), 0)
    known: dict[str, Any] = {"kernel": "sigmoid_kernel", "variant": "gradient/16bit"}
    known |= {"architecture": 90, "triton": "3.8.0", "limited": True, "spills": 0, "product": 1000}
    return {**known, "epilogue": epilogue, **changed}


@pytest.mark.parametrize("unit", compile_limits.COUNTED)
def test_one_more_than_the_limit_is_too_many(unit: str) -> None:
    report = report_of()
    limit = compile_limits.limits_of("3.8", 90)["sigmoid_kernel gradient/16bit"][unit]
    report["epilogue"][unit] = limit
    assert compile_limits.exceeded(report) == []
    report["epilogue"][unit] += 1
    (line,) = compile_limits.exceeded(report)
    assert f"{unit} {limit + 1} above {limit}" in line and "sm_90 sigmoid_kernel" in line


def test_spills_floors_and_what_has_no_limit_are_found() -> None:
    assert "spilled 8 above 0" in compile_limits.exceeded(report_of(spills=8))[0]
    assert "spilled 8" in compile_limits.exceeded(report_of(kernel="x", epilogue=None, spills=8))[0]
    slow = report_of()
    slow["epilogue"]["exchange"] = 990
    assert "floor 0.99 above" in compile_limits.exceeded(slow)[0]
    assert "no limits" in compile_limits.exceeded(report_of(variant="new/16bit"))[0]


def test_older_versions_have_the_newest_limits_but_for_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "limits.json"
    file.write_text('{"about": "", "limits": {}}')
    monkeypatch.setattr(compile_limits, "FILE", file)
    other = report_of(kernel="other")
    compile_limits.renew([report_of(), other])
    more, same = report_of(triton="3.6.0", spills=16), report_of(kernel="other", triton="3.6.0")
    assert len(compile_limits.exceeded(more)) == 1
    compile_limits.renew([more, same])
    assert compile_limits.exceeded(more) == compile_limits.exceeded(same) == []
    assert list(compile_limits.read()["3.6"]["sm_90"]) == ["sigmoid_kernel gradient/16bit"]
    assert compile_limits.exceeded(report_of(spills=16)) != []
    # a version that nobody has measured has the newest's
    assert compile_limits.exceeded(report_of(triton="4.1.0")) == []


def test_the_table_is_whole() -> None:
    precisions = {"16bit", "tf32", "ieee"}
    for kernels in tilings().values():
        assert {name for name in kernels if " " not in name} == set(VARIANTS)
        for name, entries in kernels.items():
            kernel, *words = name.split()
            assert set(words) <= VARIANTS[kernel] and words == sorted(words)
            assert set(entries) <= precisions if words else set(entries) == precisions
            for tiling in entries.values():
                # a buffer of G has room for tiles of at most 256 x 256
                assert max(tiling.rows, tiling.columns) <= 256
                assert tiling.rows >= 64 or tiling.warps == 4


def test_a_variant_has_the_entry_that_names_most_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "gradient": {"16bit": "plain", "ieee": "plain in float32"},
        "gradient ids": {"16bit": "ids"},
        "gradient ids offset": {"16bit": "both"},
        "own_gradient ids": {"16bit": "another kernel's"},
    }
    monkeypatch.setattr("fastclip.kernels.launch.tilings", lambda: {"sm_1": table})
    tiling_of.cache_clear()
    for words, precision, want in (
        ("", "16bit", "plain"),
        ("offset", "16bit", "plain"),
        ("ids", "16bit", "ids"),
        ("ids rows", "16bit", "ids"),
        ("ids offset rows", "16bit", "both"),
        ("ids", "ieee", "plain in float32"),
    ):
        assert tiling_of("sm_1", "gradient", frozenset(words.split()), precision) == want
    tiling_of.cache_clear()
