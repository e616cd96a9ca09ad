"""Every kernel and tiling compiled ahead of time for A100, H100 and B200: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastclip.kernels.launch import tilings

ARCHITECTURES = (80, 90, 100)
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
    """Compiled in processes of their own: this one may have Triton's interpreter in place."""
    folder: Path = tmp_path_factory.mktemp("compile")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "fastclip.bench.compile_report"]
    processes = [
        subprocess.Popen(
            [*command, str(folder / f"{number}.json"), str(number)],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for number in ARCHITECTURES
    ]
    assert [process.wait() for process in processes] == [0] * len(processes)
    return [r for n in ARCHITECTURES for r in json.loads((folder / f"{n}.json").read_text())]


@pytest.mark.slow
def test_resources(reports: list[dict]) -> None:
    """No spills, shared memory within the architecture's limit, the right matrix instruction."""
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for report in reports:
        assert report["spills"] == 0, report
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


def test_the_table_is_whole() -> None:
    for kernels in tilings().values():
        kinds = {"statistics", "gradient", "sigmoid", "own_statistics", "own_gradient"}
        assert set(kernels) == kinds
        for entries in kernels.values():
            assert set(entries) == {"16bit", "tf32", "ieee"}
            for tiling in entries.values():
                # a buffer of G has room for tiles of at most 256 x 256
                assert max(tiling.rows, tiling.columns) <= 256
                assert tiling.rows >= 64 or tiling.warps == 4
