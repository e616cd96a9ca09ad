"""Other libraries' towers with fastclip's attention: the same features, gradients and weights."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastclip
from fastclip.integrations.patch import MARK
from fastclip.kernels.launch import INTERPRETED
from tests.integrations.towers import (
    CASES,
    Case,
    gradients,
    open_clip_case,
    products_of,
    timm_case,
    transformers_case,
)

BACKENDS = ["sdpa", "reference", *(["triton"] if INTERPRETED or torch.cuda.is_available() else [])]


def check(case: Case, backend: str) -> None:
    """Patched by fastclip no worse than unpatched, against unpatched float64."""
    model = case.model
    theirs = gradients(model, case.outputs)
    exact = gradients(copy.deepcopy(model).double(), case.outputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with case.patch(model, backend=backend):
        ours = gradients(model, case.outputs)
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    rows = [(ours[0], theirs[0], exact[0])]
    rows += [(ours[1][name], theirs[1][name], exact[1][name]) for name in exact[1]]
    for got, eager, want in rows:
        error, allowed = ((t.double() - want).abs().max().item() for t in (got, eager))
        # a weight's gradient has gone through some ten layers' roundings
        floor = 80 * torch.finfo(torch.float32).eps * max(want.abs().max().item(), 1e-3)
        assert error <= 2 * allowed + floor
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_features_and_gradients(name: str, backend: str) -> None:
    check(CASES[name](), backend)


@pytest.mark.parametrize("make", [open_clip_case, timm_case])
def test_a_patched_model_is_pickled_and_copied(make: Callable[[], Case]) -> None:
    """Saved whole or sent to a process, it comes back with the patch and the same values."""
    case = make()
    with case.patch(case.model, backend="reference"):
        want = case.outputs(case.model)
        file = io.BytesIO()
        torch.save(case.model, file)
        copies = [pickle.loads(pickle.dumps(case.model)), copy.deepcopy(case.model)]
    copies.append(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
    for copied in copies:
        assert any(hasattr(type(module), MARK) for module in copied.modules())
        assert torch.equal(case.outputs(copied), want)
        # a copy of a copy
        assert torch.equal(case.outputs(pickle.loads(pickle.dumps(copied))), want)


@pytest.mark.slow
def test_vit_b_32() -> None:
    check(open_clip_case("ViT-B-32", batch=2), "sdpa")


@pytest.mark.parametrize("name", CASES)
def test_in_use_and_undone(name: str) -> None:
    """A backend that cannot run here is asked for by every layer; after undo by none."""
    case = CASES[name]()
    classes = [type(module) for module in case.model.modules()]
    kept = copy.deepcopy(case.model.state_dict())
    want = case.outputs(case.model)
    handle = case.patch(case.model, backend="flash")
    with pytest.raises(ValueError, match="flash"):
        case.outputs(case.model)
    handle.undo()
    handle.undo()
    assert [type(module) for module in case.model.modules()] == classes
    assert torch.equal(case.outputs(case.model), want)
    assert case.model.state_dict().keys() == kept.keys()


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels run nowhere here")
def test_every_layer_is_exchanged() -> None:
    """Two products a layer, counted where fastclip's kernels count theirs."""
    for make, layers in ((open_clip_case, 4), (timm_case, 2)):
        case = make()
        with case.patch(case.model, backend="triton"), torch.no_grad():
            assert products_of(lambda case=case: case.outputs(case.model)) == 2 * layers


@pytest.mark.parametrize("name", CASES)
def test_the_same_loss_curve(name: str) -> None:
    def curve(patched: bool) -> list[float]:
        case = CASES[name]()
        handle = case.patch(case.model, backend="sdpa") if patched else None
        optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-3)
        losses = []
        for _ in range(32):
            features = case.outputs(case.model)
            loss = (features - torch.linspace(-1, 1, features.shape[1])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if handle:
            handle.undo()
        return losses

    plain, ours = curve(False), curve(True)
    # Adam makes a step of a sign where a gradient is all rounding, so curves part slowly
    assert ours == pytest.approx(plain, rel=1e-3)
    assert plain[-1] < 0.9 * plain[0]


def test_what_the_operator_does_not_cover_is_left_to_the_layer() -> None:
    layer = nn.MultiheadAttention(64, 2, batch_first=True)
    tokens = torch.randn(2, 5, 64)
    mask = torch.randn(5, 5)
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: layer(tokens, tokens, tokens)[1],
        lambda: layer(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0],
        lambda: layer(tokens, tokens + 1, tokens, need_weights=False)[0],
        lambda: layer(tokens[0], tokens[0], tokens[0], need_weights=False)[0],
    ]
    want = [call() for call in calls]
    with fastclip.patch_open_clip(layer, loss=False, backend="flash"):
        got = [call() for call in calls]
        with pytest.raises(ValueError, match="flash"):
            layer(tokens, tokens, tokens, need_weights=False)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_keys_of_another_width() -> None:
    """As open_clip's attentional pooler has them."""
    layer = nn.MultiheadAttention(64, 2, kdim=24, vdim=24, batch_first=True)
    query, tokens = torch.randn(2, 7, 64), torch.randn(2, 5, 24)
    want = layer(query, tokens, tokens, need_weights=False)[0]
    with fastclip.patch_open_clip(layer, loss=False, backend="reference"):
        got = layer(query, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(got, want)


def test_a_mask_that_is_not_causal_stays() -> None:
    case = open_clip_case()
    case.model.attn_mask.fill_(0.0)
    want = case.outputs(case.model)
    with case.patch(case.model, backend="reference"):
        torch.testing.assert_close(case.outputs(case.model), want)


def test_sequence_first_layers() -> None:
    layer = nn.MultiheadAttention(64, 2)
    tokens = torch.randn(5, 3, 64)
    want = layer(tokens, tokens, tokens, need_weights=False)[0]
    with fastclip.patch_open_clip(layer, loss=False, backend="reference"):
        got = layer(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(got, want)


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no timm Attention layer"):
        fastclip.patch_timm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Linear is not a CLIP or SigLIP"):
        fastclip.patch_transformers(nn.Linear(3, 3))


@pytest.mark.slow
def test_compiled() -> None:
    case = timm_case()
    with case.patch(case.model, backend="sdpa"):
        want = case.outputs(case.model)
        compiled = torch.compile(case.model, fullgraph=True)
        torch.testing.assert_close(case.outputs(compiled), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_with_a_padding_mask(kind: str) -> None:
    case = transformers_case(kind)
    texts = torch.randint(1, 100, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = 0

    def features() -> torch.Tensor:
        return case.model.get_text_features(texts, attention_mask=mask).pooler_output

    want = features()
    with case.patch(case.model, backend="reference"):
        torch.testing.assert_close(features(), want)


def test_a_subclass_with_its_own_forward_keeps_it() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *arguments, **options):  # type: ignore[override]
            attended, maps = super().forward(*arguments, **options)
            return 2 * attended, maps

    layer, tokens = Doubled(64, 2, batch_first=True), torch.randn(2, 5, 64)
    want = layer(tokens, tokens, tokens, need_weights=False)[0]
    with fastclip.patch_open_clip(layer, loss=False, backend="reference"):
        assert torch.equal(layer(tokens, tokens, tokens, need_weights=False)[0], want)


def test_the_hint_of_a_causal_mask_without_one_is_torchs_error() -> None:
    layer, tokens = nn.MultiheadAttention(64, 2, batch_first=True), torch.randn(2, 5, 64)
    with (
        fastclip.patch_open_clip(layer, loss=False),
        pytest.raises(RuntimeError, match="attn_mask"),
    ):
        layer(tokens, tokens, tokens, need_weights=False, is_causal=True)


def test_an_implementation_that_does_not_exist_is_refused_at_once() -> None:
    layer = nn.MultiheadAttention(64, 2)
    with pytest.raises(ValueError, match="backend 'nonsense' of attention is unknown"):
        fastclip.patch_open_clip(layer, loss=False, backend="nonsense")
    assert type(layer) is nn.MultiheadAttention


@pytest.mark.parametrize("make", [open_clip_case, timm_case])
def test_equal_layers_stay_of_one_class(make: Callable[[], Case]) -> None:
    """torch.compile compiles a block for each class of its parts, and only a few of them."""
    case = make()
    with case.patch(case.model):
        kinds = [type(module) for module in case.model.modules() if hasattr(type(module), MARK)]
    originals = {getattr(kind, MARK) for kind in kinds}
    assert len(kinds) > len(set(kinds)) == len(originals)


def test_a_class_given_after_the_patch_is_not_taken_away() -> None:
    """fully_shard and parametrizations give one, too."""
    case = timm_case()
    handle = case.patch(case.model)
    layer = next(module for module in case.model.modules() if hasattr(type(module), MARK))
    patched, sharded = type(layer), type("Sharded", (type(layer),), {})
    layer.__class__ = sharded
    with pytest.raises(RuntimeError, match="given another class after it was patched"):
        handle.undo()
    assert type(layer) is sharded
    layer.__class__ = patched
