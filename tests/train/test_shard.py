"""What is sharded by itself: the blocks of towers of every origin."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastclip.models.clip import create
from fastclip.models.split_model import SplitModel
from fastclip.models.system import Criterion, TwoTowers
from fastclip.train.shard import blocks_of


def open_clip_resnet() -> nn.Module:
    return create("RN10t-64").model


def timm_stages() -> nn.Module:
    import timm

    return timm.create_model("convnext_atto")


def timm_transformer() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=3)


def language_model() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=3, **sizes))


def split_language_model() -> nn.Module:
    """Frozen and trained layers have wrappers of two kinds, and some wrappers raise."""
    return SplitModel(language_model(), 1)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (open_clip_resnet, ["BasicBlock"] * 4 + ["ResidualAttentionBlock"] * 2),
        # of the blocks of stages, not the stages
        (timm_stages, ["ConvNeXtBlock"] * 12),
        (timm_transformer, ["Block"] * 3),
        (language_model, ["BertLayer"] * 3),
        (split_language_model, ["BertLayer"] * 3),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []),
    ],
)
def test_blocks_are_found(build: Callable[[], nn.Module], expected: list[str]) -> None:
    blocks = blocks_of(build())
    assert [type(block).__name__ for block in blocks] == expected
    parameters = [id(p) for block in blocks for p in block.parameters()]
    assert len(parameters) == len(set(parameters)), "one block is inside another"


def test_a_criterion_has_none() -> None:
    """Its parameters are handed out of the model's forward, which makes what is no block whole."""
    criterion = Criterion()
    criterion.heads = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
    towers = create("ViT-mini-16px").model
    system = TwoTowers(towers, criterion, 1, 1)
    blocks = blocks_of(system)
    assert len(blocks) == len(blocks_of(towers)) > 0
    assert len(blocks_of(nn.Sequential(*criterion.heads))) == 2
    assert all(isinstance(p, torch.Tensor) for b in blocks for p in b.parameters())
