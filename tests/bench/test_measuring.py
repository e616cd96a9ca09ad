"""What would spoil the figures of a session on a GPU."""

from dataclasses import replace

import pytest
import torch

from fastclip.bench import ceilings, check, gpu_lab, losses, runner
from fastclip.bench.losses import OPERATORS
from fastclip.bench.runner import MATMUL, Row, Settings, interleave, measure

FEW = Settings(rounds=1, warmup=1, compiled=False)


def _fails(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_losses_are_timed_without_an_exact_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = OPERATORS["clip"].ours

    def one(*inputs, **options):
        return _fails() if options.get("backend") == "torch" else ours(*inputs, **options)

    rows = measure(replace(OPERATORS["clip"], ours=one), 64, 16, FEW)
    assert rows[0].p50 is not None and rows[0].error is None


def test_what_the_losses_keep_can_be_set() -> None:
    ours, kept = OPERATORS["clip"].ours, []

    def one(*inputs, **options):
        kept.append(options.get("keep_bytes"))
        return ours(*inputs, **options)

    for keep_bytes in (None, 0, 4096):
        kept.clear()
        rows = measure(
            replace(OPERATORS["clip"], ours=one), 64, 16, replace(FEW, keep_bytes=keep_bytes)
        )
        assert rows[0].p50 is not None and set(kept) == {keep_bytes}


def test_losses_are_timed_without_bare_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_bare", _fails)
    rows = measure(OPERATORS["clip"], 64, 16, FEW)
    assert rows[0].p50 is not None and rows[0].matmul_share is None
    assert rows[-1].baseline == MATMUL and rows[-1].status == "out of memory"


def test_rows_are_saved_after_each_loss() -> None:
    saved: list[list[Row]] = []
    rows, _ = losses.run(["clip", "siglip"], [64], [16], FEW, saved.append)
    assert [found[0].operator for found in saved] == ["clip", "siglip"]
    assert [*saved[0], *saved[1]] == rows


def test_a_ceiling_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceilings, "product", _fails)
    monkeypatch.setattr(ceilings, "CHUNKS", (64, 96))
    found = ceilings.ceilings("cpu", columns=128, side=64)
    assert found["product"] > 0 and found["copy"] > 0
    assert [chunk["rows"] for chunk in found["chunks"]] == [64, 96] * len(ceilings.WIDTHS)
    assert all(chunk["dX"] is None and chunk["S"] > 0 for chunk in found["chunks"])
    assert "dX: out of memory" in capsys.readouterr().out


def test_inputs_are_made_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def make(n: int, width: int, scale: float) -> list[torch.Tensor]:
        devices.append(torch.get_default_device().type)
        return [torch.zeros(n, width), torch.tensor(scale)]

    made = runner.make_inputs(
        replace(OPERATORS["clip"], make=make), 8, 4, 2.0, torch.float32, "meta"
    )
    assert devices == ["meta"] and all(t.device.type == "meta" for t in made)


class _Gpu:
    """A stand-in for torch's CUDA calls that writes down their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.slept: list[int] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.calls.append("event")

            def synchronize(self) -> None:
                gpu.calls.append("wait")

            def elapsed_time(self, other: "Event") -> float:
                return 3.0

        def sleep(cycles: int) -> None:
            gpu.calls.append("sleep")
            gpu.slept.append(cycles)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(runner, "warm_clocks", lambda: gpu.calls.append("warm"))


def test_work_is_queued_behind_a_sleep_and_clocks_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu(monkeypatch)
    host: dict[str, list[float]] = {}
    runs = {name: lambda name=name: gpu.calls.append(name) for name in "ab"}
    seconds, failed = interleave(runs, 2, Settings(device="cuda", warmup=1), host)
    assert not failed and seconds == {"a": [0.003] * 2, "b": [0.003] * 2}
    assert [len(host[name]) for name in "ab"] == [2, 2]
    turn = {
        order: [w for name in order for w in ("sleep", "event", name, "event", "wait")]
        for order in ("ab", "ba")
    }
    # how long the host takes is found without a sleep; each round begins with another one
    assert gpu.calls == ["a", "b", "warm", *turn["ba"], *turn["ab"]]
    assert all(cycles > 0 for cycles in gpu.slept)


def test_a_copy_reads_and_writes_each_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CHUNKS", ())
    seen = []

    def seconds(runs, device):
        if "copy" in runs:
            target = runs["copy"]()
            seen.append(target.nbytes)
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(ceilings, "_seconds", seconds)
    found = ceilings.ceilings("cpu", columns=8, side=32)
    assert found["copy"] * 1e12 == 2 * seen[0] and found["product"] * 1e12 == 2 * 32**3
    # on a GPU the source is larger than the largest L2 cache many times
    assert ceilings.COPIED * 8192 * 4 > 20 * (100 << 20)


def test_the_check_on_a_gpu_begins_with_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows over 1,000 are several chunks and many tiles: an index that overflows shows there."""
    monkeypatch.setattr(check, "compare", lambda operator, *case: (operator.name, *case))
    count = gpu_lab.CHECKERS["triton"]
    for part in range(count):
        first = next(iter(check.findings("cuda", "triton", part=(part, count))))
        assert first[1] in check.LARGE_ROWS
    large = [f for f in check.findings("cuda", "triton") if f[1] in check.LARGE_ROWS]
    names = (*OPERATORS, "clip not kept")
    assert {(f[0], f[1]) for f in large} == {(name, n) for name in names for n in check.LARGE_ROWS}


def test_the_check_of_many_rows_is_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LARGE_ROWS", (300,))
    case = (300, 16, 14.3, torch.float32, None, "cpu", "torch")
    assert check.compare(OPERATORS["clip"], *case).ok
    ours = OPERATORS["clip"].ours

    def wrong(*inputs, **options):
        loss = ours(*inputs, **options)
        return loss if inputs[0].dtype == torch.float64 else 1.02 * loss

    assert not check.compare(replace(OPERATORS["clip"], ours=wrong), *case).ok


def test_the_check_of_small_batches_leaves_chunks_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where chunks are asked for, S is not held whole."""
    monkeypatch.setattr(check, "compare", lambda operator, *case: (operator.name, *case))
    cases = list(check.findings("cuda", "auto"))
    assert {case[5] for case in cases} == {None} and max(case[1] for case in cases) <= 1000
    assert {case[0] for case in cases} == set(check.CHECKED)


def test_a_finding_is_saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what repeats, synchronizes or cannot be captured is looked for before."""
    order: list[str] = []
    monkeypatch.setattr(check, "same_bits", lambda *how: order.append("bits") or [])
    report = check.report("cpu", "torch", few=True, save=lambda finding: order.append(finding.loss))
    assert order == ["bits", *(finding.loss for finding in report[0])]


@pytest.mark.parametrize(("device", "rounds"), [("cuda", 3), ("cpu", 10)])
def test_a_gpus_long_call_is_made_a_few_times(
    device: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Gpu(monkeypatch)
    # the first call of "short" compiles
    times = {"short": [0.9, *[0.01] * 11], "long": [0.5] * 12}
    monkeypatch.setattr(runner, "_timed", lambda run, *how: (times[run()].pop(0),) * 2)
    settings = Settings(device=device, warmup=2)
    found, _ = interleave({name: lambda name=name: name for name in times}, 10, settings)
    assert {name: len(seconds) for name, seconds in found.items()} == {"short": 10, "long": rounds}


def test_a_call_that_waits_is_not_delayed_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host time has the delay in it."""
    delays: list[float | None] = []

    def timed(run, device: str, delay: float | None) -> tuple[float, float]:
        delays.append(delay)
        return 0.001, 0.001 + (delay or 0.0)

    monkeypatch.setattr(runner, "_timed", timed)
    interleave({"a": lambda: None}, 4, Settings(device="cpu", warmup=2))
    assert delays[:2] == [None, None] and delays[2:] == [pytest.approx(2.1e-3)] * 4
    delays.clear()
    interleave({"a": lambda: None}, 4, Settings(device="cpu", warmup=2, delayed=False))
    assert set(delays) == {None}


@pytest.mark.parametrize("broken", [True, False])
def test_a_way_that_is_wrong_spoils_the_sizes_that_take_it(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_of(operator, settings: Settings) -> float:
        whole = losses.dense.ENTRIES["cpu", "clip"] == losses.dense.MOST_ENTRIES
        return 1.0 if whole == broken else 0.0

    monkeypatch.setattr(losses, "quick_check", check_of)
    monkeypatch.setitem(losses.dense.ENTRIES, ("cpu", "clip"), 100 * 100)
    saved: list[Row] = []
    _, wrong = losses.run(["clip"], [64, 128], [16], FEW, saved.extend)
    assert wrong == ["clip"] and {row.n for row in saved} == {128 if broken else 64}


@pytest.mark.parametrize("name", OPERATORS)
def test_sizes_that_are_held_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit, and by what the loss does."""
    monkeypatch.setitem(losses.dense.ENTRIES, ("cpu", name), 24 * 24)
    for n, whole in ((24, True), (32, False)):
        assert losses.is_whole(name, n, "cpu") is whole
        inputs = runner.leaves(OPERATORS[name], n, 16, FEW)
        loss = OPERATORS[name].ours(*inputs)
        assert ("Dense" in type(loss.grad_fn).__name__) is whole, loss.grad_fn
