"""Tilings are tried in processes of their own and checked before they can win."""

import json
import sys
import time

import pytest
import torch

from fastclip.bench import attention_sweep, tile_sweep, trials
from fastclip.bench.attention_sweep import FORWARD, TABLES, Job, try_job
from fastclip.bench.tile_sweep import KERNELS, Trial, timed, try_all, try_candidate
from fastclip.kernels import lean
from fastclip.kernels.launch import INTERPRETED, Tiling

SMALL = Tiling(32, 64, 32, 4, 1, parts=2)
OTHER = Tiling(64, 64, 32, 4, 1)
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: the lab runs on it")


@needs_interpreter
@pytest.mark.parametrize("precision", ["16bit", "tf32"])
def test_a_right_tiling_is_ok(precision: str) -> None:
    statuses = {t.kernel: t.status for t in try_candidate(precision, SMALL, "cpu")}
    assert statuses == dict.fromkeys(KERNELS, "ok")


@needs_interpreter
def test_a_wrong_tiling_is_distinguished_from_a_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(kernel, tiles, tile, weight):
        found = original(kernel, tiles, tile, weight)
        return [1.1 * t for t in found] if weight.dtype == torch.float32 else found

    original = tile_sweep.results
    monkeypatch.setattr(tile_sweep, "results", double)
    assert all(t.status.startswith("wrong") for t in try_candidate("16bit", SMALL, "cpu"))


@needs_interpreter
def test_a_tiling_that_does_not_compile_costs_no_other_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lean, "statistics", lambda *a, **k: 1 / 0)
    statuses = {t.kernel: t.status for t in try_candidate("16bit", SMALL, "cpu")}
    assert "ZeroDivisionError" in statuses["statistics"]
    assert statuses["gradient"] == statuses["sigmoid"] == "ok"


SAYS = {
    "well": "[print(json.dumps([k, 'ok']), flush=True) for k in KERNELS]",
    "crashes": "print(json.dumps(['statistics', 'ok']), flush=True); os.abort()",
    "hangs": "print(json.dumps(['statistics', 'ok']), flush=True); time.sleep(600)",
}


def test_a_candidate_that_crashes_or_hangs_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trials, "TRIAL_SECONDS", 5.0)

    def command(precision: str, candidate: Tiling) -> list[str]:
        code = f"import json, os, time; KERNELS = {KERNELS}; {SAYS[precision]}"
        return [sys.executable, "-c", code]

    began = time.monotonic()
    tried = try_all([(name, SMALL) for name in SAYS], 60.0, command)
    assert time.monotonic() - began < 30
    found = {(t.precision, t.kernel): t.status for t in tried}
    assert len(found) == 9
    assert all(found["well", kernel] == "ok" for kernel in KERNELS)
    for name, status in (("crashes", "died"), ("hangs", "hung")):
        assert found[name, "statistics"] == "ok"
        assert found[name, "gradient"].startswith(status)


@needs_interpreter
def test_a_candidate_that_fails_while_timed_is_a_row_that_says_so() -> None:
    used = []

    def call() -> None:
        used.append(tile_sweep.launch.INTERPRETER_TILINGS[0])
        if used[-1] == OTHER and used.count(OTHER) > 3:
            raise RuntimeError("an illegal access")

    tried = [Trial("16bit", "gradient", c, "ok") for c in (SMALL, OTHER)]
    tried.append(Trial("16bit", "gradient", Tiling(1, 1, 1, 1, 1), "wrong: relative error 1.0"))
    rows = timed("gradient", "16bit", tried, call, "cpu", time.monotonic() + 60)
    assert [row["status"][:5] for row in rows] == ["ok", "wrong", "faile"]
    # in turn, not one after the other; each round begins with another one
    assert used[:4] == [SMALL, OTHER, OTHER, SMALL]
    assert json.dumps(rows)


def test_what_is_not_timed_cannot_win(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    table = tmp_path / "tilings.json"
    table.write_text(tile_sweep.launch.TILINGS_FILE.read_text())
    monkeypatch.setattr(tile_sweep.launch, "TILINGS_FILE", table)
    monkeypatch.setattr(tile_sweep.launch, "true_architecture", lambda device: "sm_90")
    monkeypatch.setattr(tile_sweep.launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tile_sweep.launch.architecture, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = json.loads(table.read_text())["tilings"]["sm_90"]
    wrong = [{"tiling": [1, 1, 1, 1, 1], "status": "wrong: relative error 1.0"}]
    right = [{"tiling": [64, 64, 64, 4, 3, 8], "status": "ok", "seconds": 0.1}]
    tile_sweep.write_table({"gradient": {"16bit": wrong}, "sigmoid": {"16bit": right}})
    after = json.loads(table.read_text())["tilings"]["sm_90"]
    assert after["gradient"] == before["gradient"]
    assert after["sigmoid"]["16bit"] == right[0]["tiling"]


def test_slow_compilations_keep_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stands for 30: the slowest compilation is the limit of one trial."""
    monkeypatch.setattr(trials, "TRIAL_SECONDS", 3.0)
    jobs = [
        (precision, candidate)
        for precision in tile_sweep.CANDIDATES
        for candidate in tile_sweep.candidates_with_shipped(precision, "cpu")
    ]
    shipped = tile_sweep.launch.tilings()["sm_90"]["gradient"]["16bit"]
    assert shipped in [candidate for _, candidate in jobs[: len(KERNELS)]]
    code = "import json, time; time.sleep(2.5); print(json.dumps(['gradient', 'ok']))"
    began = time.monotonic()
    tried = try_all(jobs, 4.0, lambda *job: [sys.executable, "-c", code])
    assert time.monotonic() - began < 8
    statuses = [t.status for t in tried if t.kernel == "gradient"]
    # the table's entries come first, what does not fit into the time is said
    assert statuses[0] == "ok" and len(statuses) == len(jobs)
    assert all(s in ("ok", "out of time") or s.startswith("hung") for s in statuses)


@needs_interpreter
@pytest.mark.parametrize("kind", TABLES)
def test_a_plan_is_tried_before_it_is_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(kind, 50, False, 100, 1, 64, TABLES[kind][50][0])
    found = try_job(job, "cpu")
    assert found["status"] == "ok" and tuple(found["fields"]) == job.plan
    original = getattr(attention_sweep._Work, kind)

    def wrong(self, plan):
        original(self, plan)
        (self.out if kind == "forward" else self.gradients[0]).mul_(1.1)

    monkeypatch.setattr(attention_sweep._Work, kind, wrong)
    assert try_job(job, "cpu")["status"].startswith("wrong")
    monkeypatch.setattr(attention_sweep._Work, kind, lambda self, plan: 1 / 0)
    assert "ZeroDivisionError" in try_job(job, "cpu")["status"]


def test_plans_that_crash_or_hang_cost_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIAL_SECONDS", 3.0)
    codes = {
        "well": "print(json.dumps(['trial', {'status': 'ok'}]))",
        "crashes": "os.abort()",
        "hangs": "time.sleep(600)",
    }
    jobs = [Job(name, 50, False, 100, 1, 64, FORWARD[50][0]) for name in codes]
    found = attention_sweep.try_all(
        jobs, 60.0, lambda job: [sys.executable, "-c", f"import json, os, time; {codes[job.kind]}"]
    )
    assert [found[job]["status"][:4] for job in jobs] == ["ok", "died", "hung"]
