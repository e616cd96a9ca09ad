"""Text dropout against a tower that is gone through layer by layer with the same random numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.options import SystemOptions
from fastclip.models.rocket import Rocket
from fastclip.models.text_dropout import TextDropout
from fastclip.train.accumulate import accumulate
from fastclip.train.config import TrainConfig
from tests.models.harness import WIDTH, draw_batch, rows_of, tiny_towers

RATE = 0.3
BATCH = draw_batch(9, images=2, texts=2)
SHAPE: dict[str, Any] = {"strong_views": 1, "head_width": 8, "head_hidden": 10}


def make(folder: Path, rate: float = RATE) -> Rocket:
    return Rocket(tiny_towers(folder), WIDTH, text_dropout=rate, **SHAPE).double().train()


def layer_by_layer(towers: Any, tokens: Tensor) -> Tensor:
    """The published form: the residual stream is dropped from in front of each layer."""
    states = towers.token_embedding(tokens) + towers.positional_embedding[: tokens.shape[1]]
    for layer in towers.transformer.resblocks:
        states = layer(F.dropout(states, RATE), attn_mask=towers.attn_mask)
    last = towers.ln_final(states)[torch.arange(len(tokens)), tokens.argmax(-1)]
    return last @ towers.text_projection


def test_strong_views_alone_are_dropped_from(tmp_path: Path) -> None:
    system = make(tmp_path)
    torch.manual_seed(5)
    weak, strong = system.features(BATCH).texts
    torch.manual_seed(5)
    want = layer_by_layer(system.towers, BATCH["texts"][1])
    torch.testing.assert_close(strong, want, rtol=1e-10, atol=1e-10)
    plain = make(tmp_path, rate=0.0).features(BATCH).texts
    assert torch.equal(weak, plain[0])
    assert (strong - plain[1]).abs().max() > 1e-3
    # nor is anything dropped outside of it, or in evaluation
    tokens = BATCH["texts"][1]
    assert torch.equal(system.towers.encode_text(tokens), plain[1])
    assert torch.equal(system.eval().features(BATCH).texts[1], plain[1])


def test_micro_batches_drop_the_same_entries_twice(tmp_path: Path) -> None:
    """The gradient is that of the features that the loss was computed with."""
    parts = [rows_of(BATCH, 0, 4), rows_of(BATCH, 4, 9)]
    system = make(tmp_path)
    torch.manual_seed(6)
    outputs = [system(part) for part in parts]
    shared = system.shared
    whole = {
        name: value if name in shared else torch.cat([output[name] for output in outputs])
        for name, value in outputs[0].items()
    }
    # parameters are handed out with each micro-batch; the loss takes them once
    want = system.loss(whole)
    want.backward()
    expected = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    system = make(tmp_path)
    torch.manual_seed(6)
    loss = accumulate(system, parts, system.loss, shared=shared)
    found = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_checkpointing_leaves_the_text_tower(tmp_path: Path) -> None:
    """Its layers would be run again without the dropout."""
    gradients = []
    for checkpointing in (False, True):
        system = make(tmp_path)
        system.set_grad_checkpointing(checkpointing)
        assert system.towers.visual.transformer.grad_checkpointing == checkpointing
        torch.manual_seed(7)
        system.loss(system(BATCH)).backward()
        gradients.append(system.towers.token_embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    without = make(tmp_path, rate=0.0)
    without.set_grad_checkpointing()
    assert without.towers.transformer.grad_checkpointing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "rocket", "text_dropout": 1.0}, r"is 1.0; give one in \[0, 1\)"),
        (
            {"objective": "rocket", "text_dropout": 0.1, "strong_views": 0},
            "rocket has no strong views here",
        ),
        ({"objective": "uniclip", "text_dropout": 0.1}, "--text-dropout is for siamlip, .*uniclip"),
        ({"objective": "rocket", "text_dropout": 0.1, "text_lm": "gpt2"}, "leave out --text-lm"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SystemOptions(**options)


def test_what_it_does_not_go_with() -> None:
    with pytest.raises(ValueError, match="text towers of open_clip's own"):
        TextDropout(nn.Linear(2, 2), RATE)
    with pytest.raises(ValueError, match="--torchcompile does not work with --text-dropout"):
        TrainConfig.from_flat(objective="rocket", text_dropout=0.1, torchcompile=True)
