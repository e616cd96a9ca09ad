"""Attention at the lengths of image and text towers: correctness, plans, and rivals.

`python -m fastclip.bench.attention --check --sweep --rivals [--seconds N] [--output DIR]` runs what
it is asked for, in this order: the operator against float64, the plans of every length against
each other (with the best to be put in kernels/attention_plans.json), and the operator beside its
rivals. On a CPU, under TRITON_INTERPRET=1, the check takes small shapes.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as PoolTimeout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastclip.bench import records
from fastclip.bench.runner import Row, Settings, interleave
from fastclip.ops.attention import attention, packed_attention

HEADS, WIDTH = 12, 64
# lines and whether causal: ViT-B/32, CLIP's text tower, ViT-B/16 at 224, ViT-L/14, ViT-L/14 at 336
SHAPES = ((50, False), (77, True), (197, False), (257, False), (577, False))
LENGTHS = (1, 5, 16, 49, 50, 64, 77, 196, 197, 256, 257, 576, 577)
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# held, whole | whole, held; each with warps, stages and, where given, registers
ON_CHIP = [
    (64, 64, True, True, 4, 1),
    (64, 128, True, True, 4, 1),
    (64, 256, True, True, 4, 1),
    (128, 64, True, True, 8, 1),
    (128, 128, True, True, 8, 1),
    (64, 64, False, False, 4, 2),
    (128, 64, False, False, 8, 2),
    (64, 64, False, True, 4, 2),
]
FORWARD = {
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
GRADIENT = {
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


@dataclass
class AttentionRow(Row):
    """A rival at one length: `n` lines, heads `width` wide."""

    causal: bool = False
    forward_p20: float | None = None
    forward_p80: float | None = None


@dataclass(frozen=True)
class Case:
    """One case of the check."""

    lines: int
    heads: int
    width: int
    dtype: str
    causal: bool
    padded: bool
    packed: bool


def say(*words: Any) -> None:
    """Print at once, with the time."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def inputs_of(
    batch: int, lines: int, heads: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Tensor:
    """A packed projection (B, S, 3, H, D), normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, lines, 3, heads, width)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)


def split(qkv: Tensor) -> list[Tensor]:
    """Its query, key and value, (B, H, S, D), each on its own."""
    return [t.contiguous() for t in qkv.permute(2, 0, 3, 1, 4).unbind(0)]


def cases(device: str, count: int, seed: int) -> list[Case]:
    """A random subset of the grid, small on a CPU."""
    rng = random.Random(seed)
    small = device == "cpu"
    grid = itertools.product(
        [n for n in LENGTHS if not small or n <= 77],
        (1, 3) if small else (1, 3, 12),
        (32, 64, 80, 128),
        ("bfloat16", "float16", "float32"),
        (False, True),
        (False, True),
        (False, True),
    )
    every = [Case(*values) for values in grid]
    return rng.sample(every, min(count, len(every)))


def check(device: str, seconds: float, output: Path | None, seed: int = 0) -> bool:
    """The operator against float64 by the error rule until the time is up; and its bits."""
    stop = time.monotonic() + seconds
    drawn = cases(device, 6 if device == "cpu" else max(int(seconds / 2), 12), seed)
    if device == "cuda":
        jobs = [("case", case) for case in (*_repeated(device), *drawn)]
        in_parallel(jobs, stop - seconds / 3)
    worst, failed, done = 0.0, [], 0
    for case in drawn:
        if time.monotonic() > stop:
            break
        try:
            share = _share_of_bound(case, device)
        except Exception as error:
            share = float("inf")
            say("FAILED", case, f"{type(error).__name__}: {str(error)[:200]}")
        done += 1
        worst = max(worst, share)
        if not share <= 1:
            failed.append(asdict(case))
            say(f"WRONG {share:.2f} of the bound", case)
    repeats = _same_bits(device)
    say(f"check: {done} cases, worst error {worst:.2f} of its bound, {len(failed)} wrong;",
        f"the same bits every time: {repeats}")  # fmt: skip
    _write(output, "attention-check.json", device, cases=done, worst=worst, failed=failed,
           same_bits=repeats)  # fmt: skip
    return repeats and not failed


def _run_case(case: Case, device: str, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    # results of ours and what they are made of
    dtype = getattr(torch, case.dtype)
    qkv = inputs_of(batch, case.lines, case.heads, case.width, dtype, device, case.lines)
    lengths = None
    if case.padded:
        # one has no key at all
        lengths = torch.arange(batch, device=device) * case.lines // max(batch - 1, 1)
    upstream = torch.randn(
        (batch, case.lines, case.heads, case.width),
        generator=torch.Generator(device).manual_seed(1), device=device,
    ).to(dtype)  # fmt: skip
    options: dict[str, Any] = {"causal": case.causal, "key_lengths": lengths}
    leaf = qkv.clone().requires_grad_()
    if case.packed:
        out = packed_attention(leaf, **options, backend="triton")
    else:
        parts = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(*parts, **options, backend="triton").transpose(1, 2)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return [out.detach(), gradient], [qkv, upstream, *([] if lengths is None else [lengths])]


def _share_of_bound(case: Case, device: str) -> float:
    got, (qkv, upstream, *lengths) = _run_case(case, device, 3)
    options: dict[str, Any] = {
        "causal": case.causal,
        "key_lengths": lengths[0] if lengths else None,
    }

    def run(qkv: Tensor, backend: str) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = packed_attention(leaf, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaf, upstream.to(leaf.dtype))]

    truth, torchs = run(qkv.double(), "reference"), run(qkv, "sdpa")
    eps = torch.finfo(qkv.dtype).eps
    shares = []
    for mine, theirs, want in zip(got, torchs, truth, strict=True):
        bound = 2 * (theirs.double() - want).abs().max() + 8 * eps * want.abs().max()
        shares.append(((mine.double() - want).abs().max() / bound.clamp(min=1e-30)).item())
    # a NaN is over every bound
    return max(share if share == share else float("inf") for share in shares)


def _repeated(device: str) -> list[Case]:
    lines = (21,) if device == "cpu" else (50, 197, 257, 577)
    return [Case(n, 2, 64, "bfloat16", False, True, True) for n in lines]


def _same_bits(device: str) -> bool:
    for case in _repeated(device):
        first, _ = _run_case(case, device, 2)
        for _ in range(2 if device == "cpu" else 20):
            again, _ = _run_case(case, device, 2)
            if not all(map(torch.equal, first, again)):
                return False
    return True


def sweep(
    seconds: float,
    output: Path | None,
    tokens: int,
    shapes: Sequence[tuple[int, bool]] = SHAPES,
    heads: int = HEADS,
    width: int = WIDTH,
) -> dict[str, Any]:
    """Time all plans at every length and keep the fastest, here and in a file."""
    from fastclip.kernels.attention_plans import measured, shape_key
    from fastclip.kernels.launch import true_architecture

    stop = time.monotonic() + seconds
    jobs = [
        (kind, (lines, causal, heads, width, plan))
        for kind, table in (("forward", FORWARD), ("gradient", GRADIENT))
        for lines, causal in shapes
        for plan in table[lines]
    ]
    in_parallel(jobs, stop - 0.6 * seconds)
    found = measured()["plans"].setdefault(true_architecture(torch.device("cuda")), {})
    rows: list[dict[str, Any]] = []
    for lines, causal in shapes:
        qkv = inputs_of(max(tokens // lines, 1), lines, heads, width, torch.bfloat16, "cuda")
        work = _Work(split(qkv), causal)
        for kind, table in (("forward", FORWARD), ("gradient", GRADIENT)):
            if time.monotonic() > stop:
                say("out of time before", lines, kind)
                break
            runs, about = work.runs(kind, table[lines])
            times, broken = interleave(runs, 9, Settings(device="cuda", warmup=3))
            for name, status in broken.items():
                say(lines, kind, name, status)
            best = None
            for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
                p50 = statistics.median(values)
                rows.append({"lines": lines, "kind": kind, "plan": name, "p50": p50, "ms": values,
                             **about.get(name, {})})  # fmt: skip
                say(f"{lines:4} {kind:8} {p50 * 1e3:7.3f} ms  {name} {about.get(name, '')}")
                if best is None and name in about:
                    best = about[name]["fields"]
            key = shape_key(lines, lines, width, torch.bfloat16, causal)
            if best is not None:
                found.setdefault(kind, {})[key] = best
            # after every table, so that a run cut short leaves what it found
            _write(output, "attention-sweep.json", "cuda", results=rows)
            if output is not None:
                content = json.dumps(measured(), indent=1) + "\n"
                (output / "attention_plans.json").write_text(content)
        del work, qkv
        torch.cuda.empty_cache()
    return found


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

        self.lse = forward(
            *self.parts, self.out, None, self.scale, self.causal, Plan(*plan)
        )  # fmt: skip

    def gradient(self, plan: tuple[Any, ...]) -> None:
        from fastclip.kernels.attention_gradient import gradient
        from fastclip.kernels.attention_plans import GradientPlan

        gradient(*self.parts, self.out, self.lse, self.upstream, *self.gradients, None, self.scale,
                 self.causal, GradientPlan(*plan))  # fmt: skip

    def runs(
        self, kind: str, plans: Sequence[tuple[Any, ...]]
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
        """What to time by name, right ones only, and of ours the fields and resources."""
        runs: dict[str, Callable[[], Any]] = {}
        about: dict[str, dict[str, Any]] = {}
        # of the last two sequences: a wrong offset shows there
        some = [t[-2:].double().requires_grad_() for t in self.parts]
        exact = attention(*some, causal=self.causal, backend="reference")
        truth = [exact.detach()]
        if kind == "gradient":
            self.forward(FORWARD[self.parts[0].shape[2]][0])
            truth = list(torch.autograd.grad(exact, some, self.upstream[-2:].double()))
        for plan in plans:
            name = str(plan)
            try:
                with _kernels_made() as made:
                    getattr(self, kind)(plan)
                torch.cuda.synchronize()
                got = [self.out] if kind == "forward" else self.gradients
                error = max(map(_relative, (t[-2:] for t in got), truth))
            except Exception as problem:
                say(self.parts[0].shape[2], kind, name, f"FAILED {type(problem).__name__}",
                    str(problem).splitlines()[-1][:150] if str(problem) else "")  # fmt: skip
                continue
            if not error < 0.02:
                say(self.parts[0].shape[2], kind, name, f"WRONG: relative error {error:.1e}")
                continue
            runs[name] = lambda plan=plan: getattr(self, kind)(plan)
            about[name] = {"fields": list(plan), "error": error, **made}
        for name, backend in list(SDPA.items())[:2]:
            with contextlib.suppress(Exception):
                runs[name] = self._sdpa(kind, backend)
        return runs, about

    def _sdpa(self, kind: str, backend: SDPBackend) -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_() for t in self.parts]

        def forward() -> Tensor:
            with sdpa_kernel(backend), torch.set_grad_enabled(kind == "gradient"):
                return scaled_dot_product_attention(*leaves, is_causal=self.causal)

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


def in_parallel(jobs: Sequence[tuple[str, Any]], stop: float) -> None:
    """Compile ahead in processes of their own, which leave it in the cache on disk."""
    started = time.monotonic()
    processes = max(min((multiprocessing.cpu_count() or 2) - 1, len(jobs), 14), 1)
    say(f"compiling for {len(jobs)} jobs in {processes} processes")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    late = False
    try:
        futures = {pool.submit(_warm, *job): job for job in jobs}
        for future in as_completed(futures, timeout=max(stop - time.monotonic(), 5)):
            problem = future.exception()
            if problem is not None:
                say(futures[future], f"failed to compile: {type(problem).__name__}",
                    str(problem).splitlines()[-1][:150] if str(problem) else "")  # fmt: skip
    except PoolTimeout:
        late = True
        say("the rest compiles when it is needed")
    finally:
        if late:
            # still at work, they would disturb what is timed next
            for process in list((pool._processes or {}).values()):
                process.terminate()
        pool.shutdown(wait=not late, cancel_futures=True)
    say(f"compiled in {time.monotonic() - started:.0f} s")


def _warm(kind: str, what: Any) -> None:
    if kind == "case":
        _run_case(what, "cuda", 2)
    else:
        lines, causal, heads, width, plan = what
        work = _Work(split(inputs_of(2, lines, heads, width, torch.bfloat16, "cuda")), causal)
        work.lse = torch.zeros(work.out.shape[:3], device="cuda")
        getattr(work, kind)(plan)
    torch.cuda.synchronize()


def rivals(
    settings: Settings,
    output: Path | None,
    tokens: int,
    shapes: Sequence[tuple[int, bool]] = SHAPES,
    flex: bool = True,
    heads: int = HEADS,
    width: int = WIDTH,
) -> list[AttentionRow]:
    """All ways to the same output, forward and forward with backward, in interleaved rounds.

    `output`, a JSON file, has after every length what was measured until then.
    """
    rows: list[AttentionRow] = []
    for lines, causal in shapes:
        say("lines", lines)
        batch = max(tokens // lines, 1)
        qkv = inputs_of(batch, lines, heads, width, settings.dtype, settings.device)
        rows += _measure(qkv, causal, settings, flex)
        if output is not None:
            records.write(output, "attention", settings, rows, settings.device, tokens=tokens)
        del qkv
    return rows


def _measure(qkv: Tensor, causal: bool, settings: Settings, flex: bool) -> list[AttentionRow]:
    lines, width = qkv.shape[1], qkv.shape[4]
    packed = qkv.requires_grad_()
    parts = [t.detach().requires_grad_() for t in split(qkv.detach())]
    upstream = torch.randn_like(parts[0])
    some = [t.detach()[:2].double().requires_grad_() for t in parts]
    exact = attention(*some, causal=causal, backend="reference")
    (truth,) = torch.autograd.grad(exact, some[0], upstream[:2].double())
    rows, runs = [], {}
    for name, function in _ways(causal, flex, settings.device).items():
        row = AttentionRow("attention", name, lines, width, causal=causal)
        rows.append(row)
        of_packed = name.endswith("packed")
        leaves = [packed] if of_packed else parts
        # a packed result has its lines before its heads
        given = upstream.transpose(1, 2).contiguous() if of_packed else upstream

        def run(backward: bool, function=function, leaves=leaves, given=given) -> Any:
            with torch.set_grad_enabled(backward):
                out = function(*leaves)
            return torch.autograd.grad(out, leaves, given) if backward else None

        try:
            first = run(True)[0]
            dq = first[:, :, 0].transpose(1, 2) if of_packed else first
            row.error = _relative(dq[:2], truth)
            del first, dq
            before = _memory(settings.device, reset=True)
            second = run(True)
            row.peak_bytes = _memory(settings.device) - before
            row.repeatable = all(map(torch.equal, second, run(True)))
            runs[name] = run
        except Exception as problem:
            row.status = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:80]}"
    forward = {name: lambda run=run: run(False) for name, run in runs.items()}
    both = {name: lambda run=run: run(True) for name, run in runs.items()}
    times, lost = interleave(forward, settings.rounds, settings)
    for row in rows:
        if row.rival in times:
            row.forward_p20, row.forward, row.forward_p80 = _spread(times[row.rival])
    times, more = interleave(both, settings.rounds, settings)
    for row in rows:
        row.status = {**lost, **more}.get(row.rival, row.status)
        if row.rival in times:
            row.p20, row.p50, row.p80 = _spread(times[row.rival])
    ours = rows[0].p50
    for row in rows:
        if row.p50 and ours:
            row.ratio = row.p50 / ours
        say(line_of(row))
    return rows


def _ways(causal: bool, flex: bool, device: str) -> dict[str, Callable[..., Tensor]]:
    # by name; those that end in "packed" take (B, S, 3, H, D) and return (B, S, H, D)
    ours = "triton" if device == "cuda" else "auto"
    ways: dict[str, Callable[..., Tensor]] = {
        "fastclip": lambda q, k, v: attention(q, k, v, causal=causal, backend=ours),
        "fastclip packed": lambda qkv: packed_attention(qkv, causal=causal, backend=ours),
    }

    def of_sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        return run

    for name, backend in SDPA.items():
        ways[name] = of_sdpa(backend)
    for name in ("sdpa flash", "sdpa cudnn"):
        ways[f"{name} packed"] = lambda qkv, run=ways[name]: run(
            *qkv.permute(2, 0, 3, 1, 4).unbind(0)
        ).transpose(1, 2)
    if flex and device == "cuda":
        ways["flex compiled"] = _flex(causal)
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

        ways["flash-attn"] = lambda q, k, v: flash_attn_func(
            *(t.transpose(1, 2) for t in (q, k, v)), causal=causal
        ).transpose(1, 2)
        ways["flash-attn packed"] = lambda qkv: flash_attn_qkvpacked_func(qkv, causal=causal)
    return ways


def _flex(causal: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None
        if causal:
            mask = masks.setdefault(
                q.shape[2],
                create_block_mask(
                    lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], q.device.type
                ),
            )
        return compiled(q, k, v, block_mask=mask)

    masks: dict[int, Any] = {}
    return run


def line_of(row: AttentionRow) -> str:
    """One line of the table."""
    if row.p50 is None:
        return f"{row.n:4} {row.rival:20} {row.status}"
    spread = f"[{row.p20 * 1e3:.3f}, {row.p80 * 1e3:.3f}]"  # type: ignore[operator]
    return (
        f"{row.n:4}{'c' if row.causal else ' '} {row.rival:20} "
        f"forward {row.forward * 1e3:7.3f} ms  "  # type: ignore[operator]
        f"both {row.p50 * 1e3:7.3f} ms {spread}  {row.ratio:.2f}x  "
        f"{(row.peak_bytes or 0) >> 20} MiB  error {row.error:.1e}"
    )


def _spread(seconds: Sequence[float]) -> list[float]:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return [tenths[1], statistics.median(seconds), tenths[7]]


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def _memory(device: str, reset: bool = False) -> int:
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def _write(output: Path | None, name: str, device: str, **content: Any) -> None:
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        content = {"environment": records.environment(device), **content}
        (output / name).write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name in ("check", "sweep", "rivals"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seconds", type=float, default=120, help="for each of check and sweep")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--lines", type=int, nargs="*", help="only these lengths")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    shapes = [shape for shape in SHAPES if not given.lines or shape[0] in given.lines]
    right = True
    if given.check:
        right = check(given.device, given.seconds, given.output)
    if given.sweep:
        sweep(given.seconds, given.output, given.tokens, shapes)
    if given.rivals or not (given.check or given.sweep):
        settings = Settings(torch.bfloat16, rounds=given.rounds, warmup=3, device=given.device)
        file = given.output / "attention.json" if given.output else None
        rows = rivals(settings, file, given.tokens, shapes, given.flex)
        print(*map(line_of, rows), sep="\n", flush=True)
    if not right:
        raise SystemExit("the check failed")


if __name__ == "__main__":
    main()
