"""UniCLIP on a tiny open_clip model: its space, its ablations, and that it learns."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.data.augment import PARAMS, Augmentation, AugmentationParams, draw_view
from fastclip.losses.mp_nce import MPNCELoss
from fastclip.models.clip import create
from fastclip.models.uniclip import IMAGE, TEXT, UniClip
from tests.train.conftest import TINY_MODEL

WIDTH = TINY_MODEL["embed_dim"]


def build(tmp_path: Path, **options: object) -> UniClip:
    torch.manual_seed(0)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_MODEL))
    return UniClip(create(str(config)).model, WIDTH, **options)


def batch(count: int = 6, views: int = 3) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(count, 3, 16, 16, generator=generator) for _ in range(views)]
    strong = Augmentation.strong(16)
    drawn = [draw_view(strong, 20, 30, random.Random(i)) for i in range(count * views)]
    params = torch.stack([draw.encode(20, 30) for draw in drawn]).view(count, views, PARAMS)
    texts = [torch.randint(1, 40_000, (count, 12), generator=generator)]
    return images, params, texts


def test_blocks_are_views_then_texts_in_one_space(tmp_path: Path) -> None:
    model = build(tmp_path, output=10)
    images, params, texts = batch()
    blocks = model(images, params, texts)
    assert blocks.domains == [IMAGE, IMAGE, IMAGE, TEXT]
    assert [tuple(block.shape) for block in blocks.features] == [(6, 10)] * 4
    for block in blocks.features:
        torch.testing.assert_close(block.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(
        blocks.features[1], model.encode_image(images[1], params[:, 1], normalize=True)
    )


def test_every_parameter_gets_a_gradient(tmp_path: Path) -> None:
    model = build(tmp_path)
    # the residual blocks begin at zero, behind which nothing has a gradient yet
    for layer in model.image_head.leave:
        torch.nn.init.normal_(layer.weight, std=0.1)
    model.objective(model(*batch())).backward()
    # the towers' own scale serves CLIP's loss; no two texts of a pair meet
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"towers.logit_scale"}
    silent = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert silent <= {"towers.transformer.resblocks.0.attn.in_proj_bias"}


def test_the_augmentation_counts_unless_it_is_left_out(tmp_path: Path) -> None:
    images, params, _ = batch()
    for told in (True, False):
        model = build(tmp_path, augmentation_encoder=told).eval()
        for layer in model.image_head.leave:
            torch.nn.init.normal_(layer.weight)
        a, b = (model.encode_image(images[0], params[:, view]) for view in (0, 1))
        assert torch.equal(a, b) != told
        # evaluation knows of no augmentation
        neutral = AugmentationParams.identity(33, 44).encode(33, 44).expand(6, -1)
        plain = model.encode_image(images[0])
        torch.testing.assert_close(plain, model.encode_image(images[0], neutral))


def test_one_shared_similarity_is_an_ablation(tmp_path: Path) -> None:
    shared = build(tmp_path, loss=MPNCELoss(num_domains=1))
    blocks = shared(*batch())
    expected = shared.loss(blocks.features, [0, 0, 0, 0])
    torch.testing.assert_close(shared.objective(blocks), expected)
    assert shared.loss.log_temperature.numel() == 1
    assert build(tmp_path).loss.log_temperature.numel() == 3


def test_it_learns_a_batch_and_is_saved_whole(tmp_path: Path) -> None:
    model = build(tmp_path)
    images, params, texts = batch(8, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model.objective(model(images, params, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_scale_()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = build(tmp_path)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for a, b in zip(
        again.eval()(images, params, texts).features,
        model.eval()(images, params, texts).features,
        strict=True,
    ):
        assert torch.equal(a, b)
    logits = F.normalize(model.encode_image(images[0]), dim=-1) @ model.encode_text(texts[0]).T
    assert logits.shape == (8, 8)


def test_params_of_other_views_are_refused(tmp_path: Path) -> None:
    images, params, texts = batch()
    with pytest.raises(ValueError, match=r"\(6, 2, 18\) for 3 views of 6 images"):
        build(tmp_path)(images, params[:, :2], texts)
