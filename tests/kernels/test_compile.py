"""Every kernel and tiling compiled ahead of time for A100, H100 and B200: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastclip.kernels.launch import tilings

ARCHITECTURES = (80, 90, 100)


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
        if report["kernel"] in ("statistics_kernel", "gradient_kernel", "sigmoid_kernel"):
            expected = instruction[report["architecture"]] if on_tensor_cores else "none"
            assert report["tensor_core"] == expected, report
    assert {r["architecture"] for r in reports} == set(ARCHITECTURES)
    print(f"{len(reports)} compilations")


def test_the_table_is_whole() -> None:
    for kernels in tilings().values():
        assert set(kernels) == {"statistics", "gradient", "sigmoid"}
        for entries in kernels.values():
            assert set(entries) == {"16bit", "tf32", "ieee"}
            for tiling in entries.values():
                # a buffer of G has room for tiles of at most 256 x 256
                assert max(tiling.rows, tiling.columns) <= 256
                assert tiling.rows >= 64 or tiling.warps == 4
