"""The parts of a GPU session that run without a GPU."""

import json
import subprocess
import sys

import pytest
import torch

from fastclip import native
from fastclip.bench import ceilings, check, tile_sweep
from fastclip.bench.gpu_lab import summary
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import Row, Settings, measure
from fastclip.kernels.launch import TILINGS_FILE, tilings
from tests.test_repo_shape import ROOT


@pytest.mark.slow
def test_the_check_passes_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases that a GPU session runs, thinned; Triton's under the interpreter, and narrower.

    A thousand rows of width 1152 take the interpreter as long as all other cases together.
    """
    compare = check.compare

    def narrow(operator, n, width, scale, dtype, chunk, device, backend):
        width = min(width, 77) if n == 1000 and backend == "triton" else width
        return compare(operator, n, width, scale, dtype, chunk, device, backend)

    monkeypatch.setattr(check, "compare", narrow)
    for backend in ("torch", "triton") if not torch.cuda.is_available() else ("torch",):
        found, well = check.report("cpu", backend, few=True)
        assert well and len(found) >= 12
    assert "0 wrong" in capsys.readouterr().out


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    operator = OPERATORS["siglip"]

    def wrong(*inputs, **options):
        loss = operator.ours(*inputs, **options)
        return loss if options["backend"] == "reference" else 1.02 * loss

    case = (65, 77, 14.3, torch.bfloat16, 40, "cpu", "torch")
    assert check.compare(operator, *case).ok
    assert not check.compare(replace(operator, ours=wrong), *case).ok
    broken = check.compare(replace(operator, ours=lambda *a, **o: 1 / 0), *case)
    assert not broken.ok and "ZeroDivisionError" in broken.failure


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
def test_on_the_gpu(backend: str) -> None:
    if backend == "cuda" and native.cuda_unavailable_reason():
        pytest.skip(f"the native library: {native.cuda_unavailable_reason()}")
    assert check.report("cuda", backend)[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, the lab would run")
@pytest.mark.parametrize("module", ["gpu_lab", "tile_sweep", "ceilings"])
def test_without_a_gpu_the_lab_says_so(module: str, tmp_path) -> None:
    arguments = ["--output", str(tmp_path)] if module == "gpu_lab" else []
    result = subprocess.run(
        [sys.executable, "-m", f"fastclip.bench.{module}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert "no CUDA device" in result.stderr


def test_the_rates_of_a_chunks_products() -> None:
    found = ceilings._chunk(64, 96, 16, "cpu")
    assert set(found) == {"width", "rows", "S", "dX", "dY"}
    assert all(value > 0 for value in found.values())


def test_parts_of_the_check_are_all_of_it() -> None:
    def cases(part: tuple[int, int]) -> list[tuple]:
        found = check.findings("cpu", "torch", few=True, part=part)
        return [(f.loss, f.n, f.width, f.scale, f.dtype, f.chunk) for f in found]

    whole = cases((0, 1))
    parts = [cases((part, 3)) for part in range(3)]
    assert sorted(map(str, whole)) == sorted(str(case) for part in parts for case in part)


def test_the_table_is_written_as_it_is_read() -> None:
    text = TILINGS_FILE.read_text()
    assert tile_sweep.format_table(json.loads(text)) == text


def test_candidates_fit_the_buffers() -> None:
    for candidates in tile_sweep.CANDIDATES.values():
        for tiling in candidates:
            assert max(tiling.rows, tiling.columns) <= 256
    # beside those of the second launches, and of variants, which are not swept
    own = {"own_statistics", "own_gradient"}
    plain = {name for name in tilings()["sm_90"] if " " not in name}
    assert set(tile_sweep.KERNELS) == plain - own


def test_the_summary_names_ratio_and_matmul_time() -> None:
    rows = measure(OPERATORS["clip"], 64, 16, Settings(rounds=1, compiled=False))
    header, line = summary(rows)
    assert "share" in header
    assert line.startswith("clip") and "open_clip" in line and "%" in line


def test_the_summary_is_short_and_has_host_times_and_launches() -> None:
    rows = []
    for n in range(1, 60):
        rows.append(Row("clip", "fastclip", n, 64, p50=2e-3, host=5e-4, launches=14))
        rows.append(Row("clip", "open_clip", n, 64, p50=3e-3, ratio=1.5, host=6e-4, launches=44))
    lines = summary(rows)
    assert len(lines) == 40 and lines[-1] == "and 21 more rows"
    assert lines[1].split()[3:6] == ["2.00", "0.50", "14"]
    assert "open_clip 1.50 (0.60 ms host, 44 runs)" in lines[1]
