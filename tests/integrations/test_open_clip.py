"""An open_clip user's own script with one line added."""

from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from open_clip import ClipLoss  # bound before the patch, as in a user's script

import fastclip
from fastclip.ops import dense
from fastclip.ops.gemm import count_products
from tests.integrations.towers import open_clip_case


@pytest.fixture(autouse=True)
def originals_come_back() -> Iterator[None]:
    classes = [getattr(open_clip.loss, f"{name}Loss") for name in ("Clip", "SigLip", "DistillClip")]
    before = [loss_class.forward for loss_class in classes]
    yield
    assert [loss_class.forward for loss_class in classes] == before


def users_script(steps: int = 32) -> list[float]:
    """Train an open_clip model with open_clip's loss, in a loop as users write it."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        text_cfg={"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_function = ClipLoss()
    images, texts = torch.randn(4, 24, 3, 16, 16), torch.randint(1, 100, (4, 24, 8))
    losses = []
    for step in range(steps):
        image_features, text_features, logit_scale = model(images[step % 4], texts[step % 4])
        loss = loss_function(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        losses.append(loss.item())
    return losses


def test_same_loss_curve_and_undo() -> None:
    plain = users_script()
    handle = fastclip.patch_open_clip()
    with count_products() as count, dense.switched_off():
        patched = users_script()
    # three products a step: the patch was in use
    assert count.products_of(24, 24, 16) == 3 * 32
    assert patched == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0]
    handle.undo()
    handle.undo()
    with count_products() as count:
        users_script(steps=1)
    assert count.calls == 0


def test_context_manager_and_patching_twice() -> None:
    instance = ClipLoss()
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    with fastclip.patch_open_clip(), count_products() as count:
        with fastclip.patch_open_clip():
            instance(x, x, torch.tensor(10.0))
        # the inner block's end leaves the outer patch in place
        result = instance(x, x, torch.tensor(10.0), output_dict=True)
    assert count.calls == 2
    assert set(result) == {"contrastive_loss"}


def test_subclasses_follow() -> None:
    coca = open_clip.CoCaLoss(caption_loss_weight=0.0, clip_loss_weight=1.0)
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    logits, labels = torch.randn(4, 3, 7), torch.randint(0, 7, (4, 3))
    want, _ = coca(x, x, logits, labels, torch.tensor(9.0))
    with fastclip.patch_open_clip(), count_products() as count:
        got, _ = coca(x, x, logits, labels, torch.tensor(9.0))
    assert count.calls == 1
    torch.testing.assert_close(got, want)


def test_siglip_and_distillation_follow() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, u, v = (
        torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=-1)
        for _ in range(4)
    )
    siglip, distill = open_clip.loss.SigLipLoss(), open_clip.loss.DistillClipLoss()
    scale, bias = torch.tensor(9.0), torch.tensor(-9.0)
    want = siglip(x, y, scale, bias), *distill(x, y, scale, u, v, scale)
    with fastclip.patch_open_clip(), count_products() as count:
        by_name = distill(
            image_features=x,
            text_features=y,
            logit_scale=scale,
            dist_image_features=u,
            dist_text_features=v,
            dist_logit_scale=scale,
        )
        got = siglip(x, y, scale, bias), *by_name
        # one S for the sigmoid loss, one for the contrastive, student and teacher for the third
        assert count.calls == 4
        assert set(siglip(x, y, scale, bias, output_dict=True)) == {"contrastive_loss"}
    torch.testing.assert_close(got, want)
    with count_products() as count:
        siglip(x, y, scale, bias)
    assert count.calls == 0


def test_siglip_of_other_versions_follows() -> None:
    """Before, it had no choice of the exchange; since, it has chunks."""
    x = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    scale, bias = torch.tensor(9.0), torch.tensor(-9.0)
    before, since = open_clip.loss.SigLipLoss(), open_clip.loss.SigLipLoss()
    want = since(x, x.flip(0), scale, bias)
    del before.dist_impl
    since.chunk_size = 2
    with fastclip.patch_open_clip(), count_products() as count:
        for loss in (before, since):
            torch.testing.assert_close(loss(x, x.flip(0), scale, bias), want)
    assert count.calls == 2


def test_a_teacher_that_is_trained_stays_open_clips() -> None:
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    teacher = x.clone().requires_grad_()
    loss = open_clip.loss.DistillClipLoss()
    scale = torch.tensor(9.0)
    with (
        fastclip.patch_open_clip(),
        pytest.warns(UserWarning, match="the teacher requires a gradient"),
    ):
        _, distill = loss(x, x, scale, teacher, x, scale)
    distill.backward()
    assert teacher.grad.abs().sum() > 0


def test_what_fastclip_does_not_compute_stays_open_clips() -> None:
    loss = open_clip.loss.DistillClipLoss(local_loss=True, world_size=2)
    x = torch.randn(4, 8)
    scale = torch.tensor(1.0)
    with (
        fastclip.patch_open_clip(),
        pytest.warns(UserWarning, match="open_clip's own loss"),
        # without a process group open_clip's own gather fails: it was called
        pytest.raises(Exception, match=r"(?i)process group|initialized|default"),
    ):
        loss(x, x, scale, x, x, scale)


def test_nothing_is_patched_without_loss() -> None:
    with fastclip.patch_open_clip(loss=False), count_products() as count:
        users_script(steps=1)
    assert count.calls == 0


def test_a_subclass_with_a_part_of_its_own_stays_open_clips() -> None:
    class Margin(ClipLoss):
        def get_logits(self, *arguments: Any, **options: Any) -> Any:
            return [
                logits - 5 * torch.eye(4) for logits in super().get_logits(*arguments, **options)
            ]

    class Named(ClipLoss):
        note = "adds nothing to the loss"

    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    scale = torch.tensor(9.0)
    want = Margin()(x, x, scale)
    with fastclip.patch_open_clip():
        with pytest.warns(UserWarning, match="Margin has its own get_logits"):
            assert Margin()(x, x, scale) == want
        with count_products() as count:
            Named()(x, x, scale)
    assert count.calls == 1


def test_losses_of_releases_with_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 2.24 to 2.30 the CLIP loss takes no bias: output_dict is the fourth."""

    def forward(self: Any, image_features: Any, text_features: Any, logit_scale: Any,
                output_dict: bool = False) -> Any:  # fmt: skip
        raise AssertionError("open_clip's own loss")

    monkeypatch.setattr(open_clip.loss.ClipLoss, "forward", forward)
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    scale = torch.tensor(10.0)
    with fastclip.patch_open_clip():
        by_name = ClipLoss()(x, x, scale, output_dict=True)
        assert torch.equal(
            ClipLoss()(x, x, scale, True)["contrastive_loss"], ClipLoss()(x, x, scale)
        )
    assert by_name.keys() == {"contrastive_loss"}


def test_a_patch_that_fails_changes_nothing() -> None:
    model = open_clip_case().model
    # of the losses' implementations, not of the attention's
    with pytest.raises(ValueError, match="cpp"):
        fastclip.patch_open_clip(model, backend="cpp")
    fastclip.patch_open_clip().undo()
    other = pytest.raises(ValueError, match="patched before with other options; undo that patch")
    with fastclip.patch_open_clip(model, loss=False, backend="reference"), other:
        fastclip.patch_open_clip(model, backend="sdpa")
