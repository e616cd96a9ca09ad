"""The tower: what is frozen, which way tokens see, pooling, training."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastclip.models.language_model import LanguageModelTower
from fastclip.train.accumulate import accumulate
from tests.models.language import LAYERS, draw_tokens, make_language_model, make_tower

FAMILIES = ("gpt2", "llama", "bert")


def first_or_it(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def last_states(plain: nn.Module, family: str, text: Tensor, unfrozen: int) -> Tensor:
    """(L, width) of one text without padding, by the untouched model's own modules."""
    output = plain(text[None], output_hidden_states=True)
    if family == "bert":
        return output.last_hidden_state[0]
    states = output.hidden_states[LAYERS - unfrozen]
    how = {"attention_mask": torch.ones(1, 1, len(text), len(text), dtype=torch.bool)}
    if family == "llama":
        how["position_embeddings"] = plain.rotary_emb(states, torch.arange(len(text))[None])
    layers, norm = (plain.h, plain.ln_f) if family == "gpt2" else (plain.layers, plain.norm)
    for layer in layers[LAYERS - unfrozen :]:
        states = first_or_it(layer(states, **how))
    return norm(states)[0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("unfrozen", [1, LAYERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_layers_called_by_hand(
    family: str, unfrozen: int, pooling: str, tmp_path: Path
) -> None:
    tower = make_tower(tmp_path, family, unfrozen_layers=unfrozen, pooling=pooling)
    plain = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    tokens = draw_tokens(7, 2, 5)
    for text, found in zip(tokens, tower(tokens), strict=True):
        states = last_states(plain, family, text[text >= 0], unfrozen)
        pooled = sum(states) / len(states) if pooling == "mean" else states[-1]
        # llama's norms compute in float32
        tolerance = 1e-5 if family == "llama" else 1e-12
        expected = tower.projection.weight @ pooled
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_unfrozen_layers_see_later_tokens(family: str, tmp_path: Path) -> None:
    model = make_tower(tmp_path, family).language_model
    tokens = draw_tokens(8)
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 10
    states, others = model.states(tokens), model.states(changed)
    assert torch.equal(states[0, :-1], others[0, :-1]) == (family != "bert")
    assert not torch.equal(states[0, -1], others[0, -1])
    # only what enters at the last token differs
    others = torch.cat([states[:, :-1], others[:, -1:]], 1)
    moved = (model(tokens, states) - model(tokens, others)).abs().amax(-1)
    assert moved.min() > 1e-4


def test_windows_stay_windows(tmp_path: Path) -> None:
    model = make_tower(tmp_path, "mistral").language_model
    tokens = draw_tokens(8)
    states = model.states(tokens).detach().requires_grad_()
    output = model(tokens, states)
    for token in range(8):
        (gradient,) = torch.autograd.grad(output[0, token, 0], states, retain_graph=True)
        seen = gradient[0].abs().amax(-1) > 0
        assert seen.tolist() == [abs(token - other) < 3 for other in range(8)]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_padding_does_not_matter(family: str, cache_bytes: int, tmp_path: Path) -> None:
    dtype = torch.float32 if family == "gemma2" else torch.float64
    tower = make_tower(tmp_path, family, dtype, cache_bytes=cache_bytes)
    tokens = draw_tokens(9, 3, 1)
    together = tower(nn.functional.pad(tokens, (0, 20), value=-1))
    tower.cache.clear()
    alone = torch.cat([tower(row[row >= 0][None]) for row in tokens])
    tolerance = 1e-12 if family in ("gpt2", "bert") else 1e-5
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


def frozen_names(tower: LanguageModelTower) -> set[str]:
    """Embeddings, the layers but for the last, and a pooler that nothing asks."""
    return {
        name
        for name, _ in tower.named_parameters()
        if any(f".{i}." in name for i in range(LAYERS - 1))
        or any(part in name for part in ("wte", "wpe", "embed", "pooler"))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_leaves_the_frozen_part(family: str, tmp_path: Path) -> None:
    tower = make_tower(tmp_path, family, cache_bytes=1 << 20).train()
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    optimizer = torch.optim.AdamW(tower.parameters(), lr=0.01, weight_decay=0.5)
    tokens, images = draw_tokens(6, 4, 2, 5), torch.eye(4, 8, dtype=torch.float64)
    losses = []
    for _ in range(8):
        logits = images @ nn.functional.normalize(tower(tokens), dim=-1).T * 5
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    frozen = frozen_names(tower)
    assert 0 < len(frozen) < len(before)
    for name, parameter in tower.named_parameters():
        assert parameter.requires_grad == (name not in frozen), name
        assert (parameter.grad is None) == (name in frozen), name
        assert torch.equal(parameter, before[name]) == (name in frozen), name


def test_what_the_frozen_layers_use_too_is_frozen(tmp_path: Path) -> None:
    tower = make_tower(tmp_path, "mpnet")
    trained = {name for name, p in tower.named_parameters() if p.requires_grad}
    # the bias of relative positions belongs to all layers
    assert trained and not any("relative_attention_bias" in name for name in trained)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dropout_only_where_it_is_trained(family: str, tmp_path: Path) -> None:
    tower = make_tower(tmp_path, family)
    tokens = draw_tokens(6, 4)
    states = tower.language_model.states(tokens)
    evaluated = tower(tokens)
    tower.train()
    assert torch.equal(tower.language_model.states(tokens), states)
    assert not torch.equal(tower(tokens), tower(tokens))
    tower.eval()
    assert torch.equal(tower(tokens), evaluated)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    tower = make_tower(tmp_path, family, unfrozen_layers=2).train()
    layers = [m.layer for n, m in tower.named_modules() if n.endswith((".1", ".2"))]
    calls: list[nn.Module] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: calls.append(module))
    found = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        # two texts before one backward, as with two views
        features = tower(draw_tokens(6, 4)), tower(draw_tokens(2, 3, 9))
        tower.zero_grad()
        (features[0].square().sum() + features[1].sum()).backward()
        found.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))
    # twice two texts through two layers, and once more in the second backward
    assert len(layers) == 2 and len(calls) == 12


def test_autocast_computes_in_bfloat16(tmp_path: Path) -> None:
    tower = make_tower(tmp_path, "llama", torch.float32)
    tokens = draw_tokens(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(tokens)
        features.float().square().sum().backward()
    assert features.dtype == torch.bfloat16
    # 8 bits of mantissa, errors of some ten operations
    torch.testing.assert_close(features.float(), tower(tokens), rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in tower.parameters() if p.requires_grad)


def test_gradient_cache_runs_the_frozen_part_once(tmp_path: Path) -> None:
    tower = make_tower(tmp_path, "gpt2", cache_bytes=1 << 20)
    rows: list[int] = []
    tower.language_model.model.h[0].layer.register_forward_hook(
        lambda module, args, output: rows.append(len(args[0]))
    )
    tokens = draw_tokens(6, 4, 2, 5)

    def forward(part: Tensor) -> dict[str, Tensor]:
        return {"text_features": tower(part)}

    def loss(output: dict[str, Tensor]) -> Tensor:
        return output["text_features"].softmax(0).square().sum()

    gradients = []
    for parts in (tokens.split(4), tokens.split(3)):
        tower.zero_grad()
        accumulate(forward, parts, loss)
        gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    # the second time, in two micro-batches, each went forward twice
    assert rows == [4] and tower.cache.hits == 8
    for whole, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-14)


def small(kind: type, **sizes: int) -> nn.Module:
    return transformers.AutoModel.from_config(kind(vocab_size=20, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(transformers.T5Config, d_model=8, num_layers=2), "one stack of text layers"),
        (lambda: small(transformers.AlbertConfig, hidden_size=64), "0 lists of 12 layers"),
        (lambda: small(transformers.GPT2Config, n_embd=8, n_head=2, n_layer=2), "give 1 to 2"),
        (
            lambda: small(transformers.GPTNeoConfig, hidden_size=16, num_layers=24),
            "takes no notice of its mask",
        ),
        (
            lambda: small(transformers.XLNetConfig, d_model=8, n_head=2, n_layer=3, d_inner=8),
            "take no attention_mask",
        ),
    ],
    ids=["encoder-decoder", "one layer for all", "too few layers", "causal itself", "no mask"],
)
def test_refuses_what_does_not_fit(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelTower(make(), 8, unfrozen_layers=3)


def test_refuses_bad_input(tmp_path: Path) -> None:
    name = make_language_model(tmp_path / "lm", "gpt2")
    with pytest.raises(ValueError, match="pooling is 'max'"):
        LanguageModelTower.from_pretrained(name, 8, unfrozen_layers=1, pooling="max")
    with pytest.raises(ValueError, match="0 unfrozen layers"):
        LanguageModelTower.from_pretrained(name, 8, unfrozen_layers=0)
    tower = LanguageModelTower.from_pretrained(name, 8, unfrozen_layers=1)
    with pytest.raises(ValueError, match="25 tokens and the language model takes 24"):
        tower(draw_tokens(25))
    sharded = LanguageModelTower.from_pretrained(name, 8, unfrozen_layers=1, cache_bytes=9)
    sharded.projection.weight.ds_id = 0
    with pytest.raises(ValueError, match="cache-bytes is 9, but ZeRO-3"):
        sharded(draw_tokens(3))
