"""Scales and temperatures at the ends of their ranges: 16 bits, zero, negative, beyond float32."""

import math

import pytest
import torch
from torch import Tensor

from fastclip import functional, native
from fastclip.ops import checks
from tests.ops.cases import LOSSES, Case, ours, theirs, unit

BACKENDS = ("torch", "reference", *(() if native.unavailable_reason() else ("cpp",)))
WITH_TEMPERATURE = ("nt_xent", "sup_con")
TEMPERATURE = {"nt_xent": functional.nt_xent_loss, "sup_con": functional.sup_con_loss}


def _arguments(name: str) -> tuple[Tensor, Tensor]:
    z = unit(8, 6, seed=3).float()
    return (z, unit(8, 6, seed=4).float()) if name == "nt_xent" else (z, torch.arange(8) % 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_a_temperature_of_16_bits_is_inverted_in_32(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    """The value is that of the temperature as it is; only its gradient is rounded, once."""
    for value in (0.07, 0.0041):
        case = LOSSES[name].make(20, 6, 1 / value, 0.3, seed=2).cast(torch.float32)
        narrow = case.leaves[case.features].to(dtype)
        case.leaves[case.features] = narrow
        truth = theirs(name, case.double())
        loss, *gradients = ours(name, case, backend=backend)
        assert abs(loss - truth[0]) <= 1e-5 * truth[0].abs()
        assert gradients[-1].dtype == dtype
        assert math.isfinite(gradients[-1])
        # a float32 rounding of S times 1/T, and the last one
        near = torch.finfo(dtype).eps + 1e-3
        assert abs(gradients[-1].double() - truth[-1]) <= near * truth[-1].abs()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_a_temperature_beside_float64_features(name: str, dtype: torch.dtype, backend: str) -> None:
    """Its inverse rounded to float32 would show: 1e-8 of the loss."""
    case = LOSSES[name].make(20, 6, 1 / 0.07, 0.3, seed=2)
    case.leaves[case.features] = case.leaves[case.features].to(dtype)
    got, want = ours(name, case, backend=backend), theirs(name, case.double())
    for mine, truth in zip(got[:-1], want[:-1], strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)
    assert abs(got[-1].double() - want[-1]) <= torch.finfo(dtype).eps * want[-1].abs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_16_bits_have_whole_gradients(dtype: torch.dtype, backend: str) -> None:
    """Each a sum over thousands of pairs, rounded once and not at each."""
    case = LOSSES["mp_nce"].make(240, 8, 40.0, 0.3, seed=2).cast(torch.float32)
    for index in range(case.features, len(case.leaves)):
        case.leaves[index] = case.leaves[index].to(dtype)
    got = ours("mp_nce", case, backend=backend)[-2:]
    for mine, want in zip(got, theirs("mp_nce", case.double())[-2:], strict=True):
        assert mine.dtype == dtype
        # the lower triangle is not read; float16's last digit below its smallest normal number
        near = 2 * torch.finfo(dtype).eps * want.abs() + 6e-8 + 1e-5 * want.abs().max()
        assert ((mine.double() - want).abs() <= near).all()


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, -math.inf])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_a_temperature_that_is_not_positive(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, arguments = TEMPERATURE[name], _arguments(name)
    for given in (value, torch.tensor(value), torch.tensor([value], dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"temperature is .*; give a positive number"):
            loss(*arguments, given)
    # a device is not waited for
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    for backend in BACKENDS:
        assert torch.isnan(loss(*arguments, torch.tensor(value), backend=backend))


def test_a_compiled_temperature_is_not_read() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(functional.nt_xent_loss, fullgraph=True)
    arguments = _arguments("nt_xent")
    want = functional.nt_xent_loss(*arguments, torch.tensor(0.1))
    torch.testing.assert_close(compiled(*arguments, torch.tensor(0.1)), want)
    assert torch.isnan(compiled(*arguments, torch.tensor(-0.1)))


def _at_scale(name: str, scale: float, dtype: torch.dtype) -> Case:
    case = LOSSES[name].make(30, 6, 7.0, 0.3, seed=5)
    case.leaves[case.features] *= scale
    return case.cast(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-44])
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in WITH_TEMPERATURE])
def test_no_scale_has_its_gradient(name: str, scale: float, backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        if backend == "cpp" and dtype == torch.float64:
            continue
        case = _at_scale(name, scale, dtype)
        truth = theirs(name, case.double())
        near = 64 * torch.finfo(dtype).eps
        for got, want in zip(ours(name, case, backend=backend), truth, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=near, atol=near)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in WITH_TEMPERATURE])
def test_a_negative_scale_is_taken_as_it_is(name: str, backend: str) -> None:
    case = _at_scale(name, -1.0, torch.float32)
    truth = theirs(name, case.double())
    for got, want in zip(ours(name, case, backend=backend), truth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_distillation_without_a_scale(scale: float, backend: str) -> None:
    if backend == "cpp":
        backend = "auto"
    from fastclip.ops.distillation import distillation

    features = [unit(9, 4, seed=k).float() for k in range(4)]
    found = []
    for chosen, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        x, y, u, v = (f.to(dtype) for f in features)
        leaf = torch.tensor(scale, dtype=dtype, requires_grad=True)
        row, column = distillation(x, y, leaf, u, v, torch.tensor(3.0, dtype=dtype), backend=chosen)
        found.append(torch.autograd.grad((row + column).sum(), leaf)[0].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_beyond_float32_show(name: str, backend: str) -> None:
    """NaN, or about dense float32's: exp of a logit below the bound errs by e^1 at most."""
    for exponent in (7.5, 8.0, 8.5, 9.5, 11.0, 13.0):
        for rows in (3, 64, 130):
            case = LOSSES[name].make(rows, 8, 10**exponent, 0.3, seed=rows).cast(torch.float32)
            truth, dense = theirs(name, case.double()), theirs(name, case)
            got = ours(name, case, backend=backend, chunk_bytes=4 * rows * 20)
            for mine, eager, want in zip(got, dense, truth, strict=True):
                if mine.isnan().any():
                    continue
                error = (mine.double() - want).abs().max()
                bound = 2 * (eager.double() - want).abs().max() + 2 * want.abs().max()
                # a last rounding may make of two logits a tie
                assert error <= bound + 1e-6 * case.largest_logit()
