"""`fastclip.ClipLoss` in the place of `open_clip.ClipLoss`."""

import inspect

import open_clip
import pytest
import torch
import torch.nn.functional as F

import fastclip


def inputs(n: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = (
        F.normalize(torch.randn(n, 16, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    return x, y, torch.tensor(14.0, dtype=torch.float64)


def test_signatures_are_open_clips() -> None:
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        theirs = inspect.signature(getattr(open_clip.ClipLoss, method)).parameters
        ours = inspect.signature(getattr(fastclip.ClipLoss, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].default == parameter.default


def test_call_and_dictionary() -> None:
    ours, theirs = fastclip.ClipLoss(), open_clip.ClipLoss()
    torch.testing.assert_close(ours(*inputs()), theirs(*inputs()), rtol=1e-12, atol=0)
    result = ours(*inputs(), output_dict=True)
    assert list(result) == ["contrastive_loss"]
    for got, want in zip(ours.get_logits(*inputs()), theirs.get_logits(*inputs()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_hard_negative_texts_join_the_images_direction_only() -> None:
    x, y, scale = inputs()
    extra = F.normalize(torch.ones(3, 16, dtype=torch.float64) * torch.arange(1, 17), dim=-1)
    texts = torch.cat([y, extra])
    labels = torch.arange(len(x))
    want = (
        F.cross_entropy(scale * x @ texts.T, labels) + F.cross_entropy(scale * y @ x.T, labels)
    ) / 2
    torch.testing.assert_close(fastclip.ClipLoss()(x, texts, scale), want, rtol=1e-12, atol=0)


def test_label_smoothing_is_cross_entropys() -> None:
    x, y, scale = inputs()
    labels = torch.arange(len(x))
    logits = scale * x @ y.T
    want = sum(F.cross_entropy(L, labels, label_smoothing=0.2) for L in (logits, logits.T)) / 2
    got = fastclip.ClipLoss(label_smoothing=0.2)(x, y, scale)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_what_is_not_supported_is_said() -> None:
    with pytest.raises(ValueError, match="needs gather_with_grad=True"):
        fastclip.ClipLoss(local_loss=True, world_size=2, label_smoothing=0.1)
    with pytest.raises(ValueError, match="Horovod"):
        fastclip.ClipLoss(use_horovod=True)


def test_a_training_step_in_open_clips_own_way() -> None:
    """A short run with each loss from the same start gives the same losses."""

    def losses(loss_function: torch.nn.Module) -> list[float]:
        torch.manual_seed(0)
        images, texts = torch.nn.Linear(20, 16), torch.nn.Linear(12, 16)
        log_scale = torch.nn.Parameter(torch.tensor(2.66))
        parameters = [*images.parameters(), *texts.parameters(), log_scale]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        data = torch.randn(24, 20), torch.randn(24, 12)
        values = []
        for _ in range(20):
            x, y = (F.normalize(t(d), dim=-1) for t, d in zip((images, texts), data, strict=True))
            loss = loss_function(x, y, log_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    assert losses(fastclip.ClipLoss()) == pytest.approx(losses(open_clip.ClipLoss()), rel=1e-5)
