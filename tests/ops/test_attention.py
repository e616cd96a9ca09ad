"""Attention against a float64 oracle written row by row, in all implementations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastclip.kernels import attention_plans
from fastclip.ops import attention as module
from fastclip.ops import backend as backends
from fastclip.ops.attention import attention, packed_attention
from fastclip.ops.gemm import count_products
from tests.ops.cases import pairwise

FACTORS = {
    "lines": [1, 5, 16, 49, 50, 64, 77, 196, 197, 256, 257, 576, 577],
    "heads": [1, 3, 12],
    "width": [32, 64, 80, 128],
    "causal": [False, True],
    "padded": [False, True],
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "backend": ["sdpa", "reference"],
}
BACKENDS = ("sdpa", "reference", "triton")


def oracle(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None, scale: float
) -> Tensor:
    """Query by query: a softmax over the keys that it sees, 0 where it sees none."""
    batches = []
    for b in range(q.shape[0]):
        rows = []
        for i in range(q.shape[2]):
            seen = k.shape[2] if lengths is None else int(lengths[b])
            seen = min(seen, i + 1) if causal else seen
            weights = torch.softmax(scale * (k[b, :, :seen] @ q[b, :, i, :, None]), dim=1)
            rows.append((weights * v[b, :, :seen]).sum(dim=1))
        batches.append(torch.stack(rows, dim=1))
    return torch.stack(batches)


def tensors(
    batch: int, heads: int, lines: int, width: int, dtype: torch.dtype, keys: int | None = None
) -> list[Tensor]:
    """Query, key, value and the output's upstream gradient."""
    generator = torch.Generator().manual_seed(lines + width)
    sizes = (lines, keys or lines, keys or lines, lines)
    return [
        torch.randn(batch, heads, size, width, generator=generator, dtype=torch.float64).to(dtype)
        for size in sizes
    ]


def results(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    """The output and the inputs' gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(inputs: list[Tensor], causal: bool, lengths: Tensor | None, backend: str) -> None:
    """Error at most twice the same computation's in torch plus 8 eps of the largest entry."""
    *parts, upstream = inputs
    options: dict[str, Any] = {"causal": causal, "key_lengths": lengths}
    scale = parts[0].shape[3] ** -0.5
    wide = [t.double() for t in parts]
    truth = results(lambda *t: oracle(*t, causal, lengths, scale), wide, upstream)
    torchs = results(lambda *t: oracle(*t, causal, lengths, scale), parts, upstream)
    got = results(lambda *t: attention(*t, **options, backend=backend), parts, upstream)
    # float64 has no truth above it, only another order of summation
    eps = torch.finfo(parts[0].dtype).eps * (8 if parts[0].dtype == torch.float64 else 1)
    for name, mine, theirs, want in zip(("out", "dq", "dk", "dv"), got, torchs, truth, strict=True):
        assert mine.dtype == parts[0].dtype
        # with one key dQ and dK cancel to 0, from terms as large as dV
        size = (want if parts[1].shape[2] > 1 else truth[3]).abs().max()
        bound = 2 * (theirs.double() - want).abs().max() + 8 * eps * size
        error = (mine.double() - want).abs().max()
        assert error <= bound, (name, error, bound)


@pytest.mark.parametrize(
    "case", list(pairwise(FACTORS, seed=1)), ids=lambda case: "-".join(map(str, case.values()))
)
def test_pairwise_coverage(case: dict[str, Any]) -> None:
    """Every two values of different factors meet in some case."""
    # the oracle is slow where there are many lines
    heads = min(case["heads"], 1200 // case["lines"])
    inputs = tensors(2, heads, case["lines"], case["width"], case["dtype"])
    lengths = torch.tensor([0, case["lines"] - case["lines"] // 3]) if case["padded"] else None
    check(inputs, case["causal"], lengths, case["backend"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_queries_and_keys_may_differ(backend: str) -> None:
    check(tensors(2, 2, 1, 32, torch.float32, keys=70), False, None, backend)
    check(tensors(2, 1, 18, 16, torch.bfloat16, keys=5), False, torch.tensor([0, 4]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_without_keys(backend: str, causal: bool) -> None:
    *parts, upstream = tensors(3, 2, 9, 16, torch.float32)
    lengths = torch.tensor([0, 9, 4])
    got = results(
        lambda *t: attention(*t, causal=causal, key_lengths=lengths, backend=backend),
        parts,
        upstream,
    )
    for value in got:
        assert torch.count_nonzero(value[0]) == 0
        assert value.isfinite().all()
    assert all(torch.count_nonzero(value[2, :, 4:]) == 0 for value in got[2:])


def test_what_padding_holds_does_not_matter() -> None:
    *parts, upstream = tensors(2, 1, 20, 16, torch.float32)
    lengths = torch.tensor([7, 20])
    run = lambda *t: attention(*t, key_lengths=lengths, backend="triton")  # noqa: E731
    want = results(run, parts, upstream)
    for t in parts[1:]:
        t[0, :, 7:] = torch.nan
    assert all(map(torch.equal, results(run, parts, upstream), want))


def test_reference_is_differentiable_twice() -> None:
    *parts, _ = tensors(2, 1, 4, 3, torch.float64)
    leaves = [t.requires_grad_() for t in parts]
    for options in ({}, {"causal": True}, {"key_lengths": torch.tensor([0, 3]), "scale": 0.7}):
        run = lambda *t, options=options: attention(*t, **options, backend="reference")  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_is_unpacked(backend: str, causal: bool) -> None:
    qkv = torch.randn(2, 21, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(2, 21, 2, 16)
    options: dict[str, Any] = {"causal": causal, "backend": backend}
    got = results(lambda t: packed_attention(t, **options), [qkv], upstream)
    parts = [t.contiguous() for t in qkv.permute(2, 0, 3, 1, 4)]
    out, *want = results(lambda *t: attention(*t, **options), parts, upstream.transpose(1, 2))
    assert backend != "triton" or all(t.is_contiguous() for t in got)
    pairs = [(got[0], out.transpose(1, 2))]
    pairs += [(got[1][:, :, i], g.transpose(1, 2)) for i, g in enumerate(want)]
    for mine, other in pairs:
        if backend == "sdpa":
            # its kernels depend on the layout
            torch.testing.assert_close(mine, other)
        else:
            assert torch.equal(mine, other)


def test_layouts_are_read_in_place_and_kept() -> None:
    *parts, upstream = tensors(2, 3, 10, 16, torch.float32)
    want = results(lambda *t: attention(*t, backend="triton"), parts, upstream)
    heads_inside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    shifted = [torch.stack([t, t], dim=2)[:, :, 0] for t in parts]
    reversed_heads = [
        t.flip(1).permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3).flip(1) for t in parts
    ]
    for layout in (heads_inside, shifted, reversed_heads):
        got = results(lambda *t: attention(*t, backend="triton"), layout, upstream)
        assert all(map(torch.equal, got, want))
    out = attention(*heads_inside, backend="triton")
    assert out.stride() == heads_inside[0].stride()
    # the upstream gradient of a sum is one number, expanded
    ones = torch.ones(()).expand_as(upstream)
    want = results(lambda *t: attention(*t, backend="triton"), parts, ones.contiguous())
    got = results(lambda *t: attention(*t, backend="triton"), parts, ones)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_once(backend: str) -> None:
    *parts, upstream = tensors(2, 2, 18, 16, torch.float32)

    def run(*t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(*t, backend=backend)

    got = results(run, parts, upstream)
    rounded = [t.bfloat16() for t in parts]
    want = results(lambda *t: attention(*t, backend=backend), rounded, upstream)
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*parts, backend=backend, precision="input").dtype == torch.float32


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole(backend: str, packed: bool) -> None:
    qkv = torch.randn(2, 18, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(2, 18, 2, 16)

    def run(t: Tensor) -> Tensor:
        if packed:
            return packed_attention(t, causal=True, backend=backend)
        parts = t.permute(2, 0, 3, 1, 4).unbind(0)
        return attention(*parts, causal=True, backend=backend).transpose(1, 2)

    got = results(torch.compile(run, fullgraph=True), [qkv], upstream)
    for mine, want in zip(got, results(run, [qkv], upstream), strict=True):
        torch.testing.assert_close(mine, want)


def test_operators_obey_their_contract() -> None:
    *parts, upstream = tensors(2, 2, 5, 16, torch.float32)
    lengths = torch.tensor([3, 5])
    ops = torch.ops.fastclip
    leaves = [t.requires_grad_() for t in parts]
    # the backward is differentiable once on purpose, so dynamic autograd checks stop at the first
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    options = {"causal": False, "scale": 0.25, "needs": ()}

    def check(operator: Any, inputs: tuple[Any, ...], **others: Any) -> None:
        torch.library.opcheck(operator.default, inputs, options | others, test_utils=checks)

    check(ops.attention, (*leaves, lengths))
    out, lse = ops.attention(*parts, lengths, **options)
    inputs = (*(t.detach() for t in parts), lengths, *(t.detach() for t in (out, lse, upstream)))
    check(ops.attention_backward, inputs, needs=(True, True, True))
    qkv = torch.randn(2, 5, 3, 2, 16, requires_grad=True)
    check(ops.packed_attention, (qkv, lengths), causal=True)


def test_gradients_nobody_asks_for() -> None:
    *parts, upstream = tensors(1, 1, 5, 16, torch.float32)
    parts[1].requires_grad_()
    out = attention(*parts, backend="triton")
    out.backward(upstream)
    assert parts[1].grad is not None and parts[0].grad is None


def test_derivatives_that_do_not_exist() -> None:
    *parts, _ = tensors(1, 1, 5, 16, torch.float32)
    leaf = parts[0].clone().requires_grad_()
    out = attention(leaf, *parts[1:], backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(parts[0], parts[0])
        with pytest.raises(RuntimeError, match="forward-mode"):
            attention(dual, *parts[1:], backend="triton")


def test_products_and_flop() -> None:
    *parts, upstream = tensors(2, 3, 40, 16, torch.float32)
    one = 2 * 2 * 3 * 40 * 40 * 16
    with count_products() as count:
        results(lambda *t: attention(*t, backend="triton"), parts, upstream)
    # heads that are not 64 wide take two passes
    assert count.flop == (2 + 7) * one
    with FlopCounterMode(display=False) as counter:
        results(lambda *t: attention(*t, backend="triton"), parts, upstream)
        packed = torch.randn(2, 40, 3, 3, 16)
        results(lambda t: packed_attention(t, backend="triton"), [packed], upstream.transpose(1, 2))
    assert counter.get_total_flops() == 2 * (2 + 5) * one


Q = torch.zeros(2, 3, 5, 16)


@pytest.mark.parametrize(
    "words, call",
    [
        ("give .batch, heads, tokens, width", lambda: attention(Q[0], Q, Q)),
        ("floating point", lambda: attention(Q.int(), Q.int(), Q.int())),
        ("nothing may be empty", lambda: attention(Q[:, :, :0], Q, Q)),
        ("cast one of them", lambda: attention(Q, Q.double(), Q)),
        ("give one shape", lambda: attention(Q, Q, Q[:, :, :4])),
        ("only the numbers of tokens may differ", lambda: attention(Q, Q[:, :2], Q[:, :2])),
        ("needs as many", lambda: attention(Q, Q[:, :, :4], Q[:, :, :4], causal=True)),
        ("scale is -1", lambda: attention(Q, Q, Q, scale=-1.0)),
        ("int32 or int64", lambda: attention(Q, Q, Q, key_lengths=torch.ones(2))),
        ("one id per row|shape", lambda: attention(Q, Q, Q, key_lengths=torch.ones(3).long())),
        ("unknown", lambda: attention(Q, Q, Q, backend="cuda")),
        ("flash-attn is not installed|CUDA", lambda: attention(Q, Q, Q, backend="flash")),
        ("float64 gains nothing", lambda: attention(*[Q.double()] * 3, backend="triton")),
        ("goes to 128", lambda: attention(*[torch.zeros(1, 1, 2, 136)] * 3, backend="triton")),
        ("tokens, 3, heads", lambda: packed_attention(Q)),
        ("precision is", lambda: attention(Q, Q, Q, precision="half")),
    ],
)
def test_errors_say_what_to_do(words: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_auto_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(lines: int, backend: str = "auto", causal: bool = False) -> str:
        device = torch.device("cuda")
        return module._choice(lines, lines, 64, causal, torch.bfloat16, backend, device)

    table = {"plans": {}, "faster": {"sm_90": ["197x197x64 16bit", "77x77x64 16bit causal"]}}
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "unavailable_reason", lambda *arguments: None)
    monkeypatch.setattr("fastclip.kernels.launch.true_architecture", lambda device: "sm_90")
    monkeypatch.setattr(attention_plans, "measured", lambda: table)
    assert chosen(197) == "triton" and chosen(257) == "sdpa"
    assert chosen(77, causal=True) == "triton" and chosen(77) == "sdpa"
    assert chosen(197, "sdpa") == "sdpa"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "sdpa")
    assert chosen(197) == "sdpa"
    # an implementation that attention does not have: the variable is for all operators
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert chosen(197) == "triton"
    monkeypatch.setattr(backends, "unavailable_reason", lambda *arguments: "no compiler")
    assert chosen(197) == "sdpa"


def test_lengths_and_layouts_in_any_memory() -> None:
    """Lengths with a stride of their own; queries whose heads lie outside tokens."""
    packed = torch.randn(3, 2, 2, 20, 16).permute(1, 3, 0, 2, 4)
    table = torch.tensor([[20, 9], [7, 9]], dtype=torch.int32)
    for lengths in (table[:, 0], table[:1, 1].expand(2)):
        want = packed_attention(packed, key_lengths=lengths.clone(), backend="reference")
        got = packed_attention(packed, key_lengths=lengths, backend="triton")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.is_contiguous()
