"""Plans of attention's kernels against each other, and the best of them for the table.

Each plan is first tried in a process of its own, as tilings are in `fastclip.bench.tile_sweep`:
only one that runs and is right is timed.
"""

import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastclip.atomic import write_text
from fastclip.bench.attention_parts import (
    HEADS,
    SDPA,
    SHAPES,
    WIDTH,
    inputs_of,
    say,
    split,
    write_findings,
)
from fastclip.bench.runner import Settings, interleave, relative, status_of
from fastclip.bench.trials import run_trials
from fastclip.ops.attention import attention

# held, whole | whole, held; each with warps, stages and, where given, registers
ON_CHIP: list[tuple[Any, ...]] = [
    (64, 64, True, True, 4, 1),
    (64, 128, True, True, 4, 1),
    (64, 256, True, True, 4, 1),
    (128, 64, True, True, 8, 1),
    (128, 128, True, True, 8, 1),
    (64, 64, False, False, 4, 2),
    (128, 64, False, False, 8, 2),
    (64, 64, False, True, 4, 2),
]
FORWARD: dict[int, list[tuple[Any, ...]]] = {
    50: [(64, 64, True, True, 4, 1), (64, 64, True, True, 8, 1)],
    77: [(64, 64, True, True, 4, 1), (64, 64, True, True, 8, 1), (64, 64, False, False, 4, 2)],
    197: ON_CHIP,
    257: ON_CHIP,
    577: [
        (64, 64, False, False, 4, 2),
        (64, 64, False, False, 4, 3),
        (64, 128, False, False, 4, 2),
        (128, 64, False, False, 8, 2),
        (128, 64, False, False, 8, 3),
        (128, 128, False, False, 8, 2),
        (128, 64, False, True, 8, 2),
    ],
}
GRADIENT: dict[int, list[tuple[Any, ...]]] = {
    50: [(64, 64, True, False, 4, 1), (64, 64, True, False, 8, 1)],
    77: [
        (64, 64, True, False, 4, 1),
        (64, 64, True, False, 8, 1),
        (64, 64, False, True, 4, 1),
    ],
    197: [
        (64, 64, True, False, 8, 1),
        (64, 128, True, False, 8, 1),
        (64, 64, True, False, 4, 1),
        (128, 128, True, False, 8, 1),
        (64, 64, False, True, 4, 1),
        (64, 64, False, True, 4, 1, 168),
        (64, 64, False, False, 4, 2),
    ],
    257: [
        (64, 64, True, False, 8, 1),
        (64, 128, True, False, 8, 1),
        (64, 64, False, True, 4, 1),
        (64, 128, False, True, 8, 1),
        (64, 64, False, False, 4, 2),
    ],
    577: [
        (64, 64, False, False, 4, 2),
        (64, 64, False, False, 4, 3),
        (64, 64, False, False, 8, 2),
        (64, 128, False, False, 8, 2),
        (128, 64, False, False, 8, 2),
    ],
}
TABLES = {
    "forward": FORWARD,
    "gradient": GRADIENT,
}


def sweep(
    seconds: float,
    output: Path | None,
    tokens: int,
    shapes: Sequence[tuple[int, bool]] = SHAPES,
    heads: int = HEADS,
    width: int = WIDTH,
) -> dict[str, Any]:
    """Time all plans at every length and keep the fastest, for the package and in `output`."""
    from fastclip.kernels.attention_plans import PLANS_FILE, measured, shape_key
    from fastclip.kernels.launch import true_architecture

    stop = time.monotonic() + seconds
    jobs = [
        Job(kind, length, causal, tokens, heads, width, plan)
        for length, causal in shapes
        for kind, table in TABLES.items()
        for plan in table[length]
    ]
    tried = try_all(jobs, 0.6 * seconds)
    found = measured()["plans"].setdefault(true_architecture(torch.device("cuda")), {})
    rows: list[dict[str, Any]] = []
    for length, causal in shapes:
        qkv = inputs_of(max(tokens // length, 1), length, heads, width, torch.bfloat16, "cuda")
        work = _Work(split(qkv), causal)
        for kind in TABLES:
            if time.monotonic() > stop:
                say("out of time before", length, kind)
                break
            about = {
                str(job.plan): found
                for job, found in tried.items()
                if (job.kind, job.length) == (kind, length)
            }
            for name, trial in about.items():
                if trial["status"] != "ok":
                    rows.append({"length": length, "kind": kind, "plan": name, **trial})
                    say(length, kind, name, trial["status"])
            runs = work.runs(kind, [f["fields"] for f in about.values() if f["status"] == "ok"])
            times, broken = interleave(runs, 9, Settings(device="cuda", warmup=3))
            for name, status in broken.items():
                say(length, kind, name, status)
            best = None
            for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
                p50 = statistics.median(values)
                rows.append({"length": length, "kind": kind, "plan": name, "p50": p50, "ms": values,
                             **about.get(name, {})})  # fmt: skip
                say(f"{length:4} {kind:8} {p50 * 1e3:7.3f} ms  {name} {about.get(name, '')}")
                if best is None and name in about:
                    best = about[name]["fields"]
            key = shape_key(length, length, width, torch.bfloat16, causal)
            if best is not None:
                found.setdefault(kind, {})[key] = best
            # after every table, so that a run cut short leaves what it found
            write_findings(output, "attention-sweep.json", "cuda", results=rows)
            content = json.dumps(measured(), indent=1) + "\n"
            write_text(PLANS_FILE, content)
            if output is not None:
                write_text(output / "attention_plans.json", content)
        del work, qkv
        torch.cuda.empty_cache()
    return found


class Job(NamedTuple):
    """A plan to try, and on what."""

    kind: str
    length: int
    causal: bool
    tokens: int
    heads: int
    width: int
    plan: tuple[Any, ...]


def try_all(
    jobs: Sequence[Job],
    seconds: float,
    command: Callable[[Job], Sequence[str]] = lambda job: (
        sys.executable, "-m", "fastclip.bench.attention_sweep", json.dumps(job),
    ),
) -> dict[Job, dict[str, Any]]:  # fmt: skip
    """Try plans in processes of their own; what was found of each, with its status."""
    began = time.monotonic()
    found = run_trials([command(job) for job in jobs], seconds)
    say(f"tried {len(jobs)} plans in {time.monotonic() - began:.0f} s")
    return {
        job: said.get("trial", {"status": ended})
        for job, (said, ended) in zip(jobs, found, strict=True)
    }


class _Work:
    """Tensors of one length, and what to time on them."""

    def __init__(self, parts: list[Tensor], causal: bool) -> None:
        self.parts, self.causal = parts, causal
        self.scale = parts[0].shape[3] ** -0.5
        self.out = torch.empty_like(parts[0])
        self.upstream = torch.randn_like(parts[0])
        self.gradients = [torch.empty_like(t) for t in parts]
        self.lse: Tensor | None = None

    def forward(self, plan: tuple[Any, ...]) -> None:
        from fastclip.kernels.attention import forward
        from fastclip.kernels.attention_plans import Plan

        q, k, v = self.parts
        self.lse = forward(q, k, v, self.out, None, self.scale, self.causal, Plan(*plan))

    def gradient(self, plan: tuple[Any, ...]) -> None:
        from fastclip.kernels.attention_gradient import gradient
        from fastclip.kernels.attention_plans import GradientPlan

        assert self.lse is not None, "forward comes first"
        (q, k, v), (dq, dk, dv) = self.parts, self.gradients
        results = self.out, self.lse, self.upstream
        made = GradientPlan(*plan)
        gradient(q, k, v, *results, dq, dk, dv, None, self.scale, self.causal, made)

    def trial(self, kind: str, plan: tuple[Any, ...]) -> dict[str, Any]:
        """Whether a plan is right, with its fields and resources."""
        # of the last two sequences: a wrong offset shows there
        some = [t[-2:].double().requires_grad_() for t in self.parts]
        exact = attention(*some, causal=self.causal, backend="reference")
        truth = [exact.detach()]
        if kind == "gradient":
            self.forward(FORWARD[self.parts[0].shape[2]][0])
            truth = list(torch.autograd.grad(exact, some, self.upstream[-2:].double()))
        try:
            with _kernels_made() as made:
                getattr(self, kind)(plan)
            if self.out.is_cuda:
                torch.cuda.synchronize()
            got = [self.out] if kind == "forward" else self.gradients
            error = max(map(relative, (t[-2:] for t in got), truth))
        except Exception as problem:
            return {"status": status_of(problem)}
        # not below: a NaN is wrong too
        status = "ok" if error < 0.02 else f"wrong: relative error {error:.1e}"
        return {"status": status, "fields": list(plan), "error": error, **made}

    def runs(self, kind: str, plans: Sequence[Sequence[Any]]) -> dict[str, Callable[[], Any]]:
        """What to time, by name: plans that are right, and torch's own."""
        runs: dict[str, Callable[[], Any]] = {}
        if kind == "gradient":
            self.forward(FORWARD[self.parts[0].shape[2]][0])
        for plan in map(tuple, plans):
            runs[str(plan)] = functools.partial(getattr(self, kind), plan)
        for name, backend in list(SDPA.items())[:2]:
            with contextlib.suppress(Exception):
                runs[name] = self._sdpa(kind, backend)
        return runs

    def _sdpa(self, kind: str, backend: SDPBackend) -> Callable[[], Any]:
        q, k, v = leaves = [t.detach().requires_grad_() for t in self.parts]

        def forward() -> Tensor:
            with sdpa_kernel(backend), torch.set_grad_enabled(kind == "gradient"):
                return scaled_dot_product_attention(q, k, v, is_causal=self.causal)

        out = forward()
        if kind == "forward":
            return forward
        return lambda: torch.autograd.grad(out, leaves, self.upstream, retain_graph=True)


@contextlib.contextmanager
def _kernels_made() -> Iterator[dict[str, Any]]:
    # registers and spills of what was compiled inside, where this Triton says
    from fastclip.kernels import attention, attention_gradient

    kernels = (
        attention.forward_kernel,
        attention_gradient.whole_kernel,
        attention_gradient.two_pass_kernel,
    )

    def every() -> list[Any]:
        with contextlib.suppress(Exception):
            caches = [cache for k in kernels for cache in k.device_caches.values()]
            return [made for cache in caches for made in cache[0].values()]
        return []

    found: dict[str, Any] = {}
    before = {id(made) for made in every()}
    yield found
    for made in every():
        if id(made) not in before:
            with contextlib.suppress(Exception):
                found |= {
                    "registers": made.n_regs,
                    "spills": made.n_spills,
                    "shared": made.metadata.shared,
                }


def try_job(job: Job, device: str = "cuda") -> dict[str, Any]:
    """Try one plan in this process."""
    batch = max(job.tokens // job.length, 2)
    qkv = inputs_of(batch, job.length, job.heads, job.width, torch.bfloat16, device)
    return _Work(split(qkv), job.causal).trial(job.kind, tuple(job.plan))


if __name__ == "__main__":
    print(json.dumps(["trial", try_job(Job(*json.loads(sys.argv[1])))]), flush=True)
