"""`fastclip.ClipLoss` instead of `open_clip.ClipLoss`."""

import inspect
from collections.abc import Iterator

import open_clip
import pytest
import torch
import torch.distributed as dist
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
    for bias in ((), (torch.tensor(-3.0, dtype=torch.float64),)):
        given = *inputs(), *bias
        for got, want in zip(ours.get_logits(*given), theirs.get_logits(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:(local_loss|gather_with_grad)")
@pytest.mark.parametrize("local", [False, True])
def test_labels_are_open_clips(local: bool) -> None:
    options = {"local_loss": local, "rank": 2, "world_size": 4}
    got, want = (m.ClipLoss(**options).get_ground_truth("cpu", 5) for m in (fastclip, open_clip))
    assert torch.equal(got, want)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:(local_loss|gather_with_grad)")
@pytest.mark.parametrize(
    "local, with_grad", [(False, False), (False, True), (True, False), (True, True)]
)
def test_a_bias_cancels_and_has_a_gradient_of_zero(local: bool, with_grad: bool) -> None:
    """In every mode: data-parallel wrappers wait for the gradient of every parameter."""
    loss = fastclip.ClipLoss(local, with_grad, world_size=2)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    value = loss(*inputs(), bias)
    torch.testing.assert_close(value, loss(*inputs()), rtol=1e-12, atol=0)
    value.backward()
    assert bias.grad is not None and bias.grad == 0


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
    for loss_class, smoothing in ((fastclip.ClipLoss, 0.1), (fastclip.DistillClipLoss, 0.0)):
        with pytest.raises(ValueError, match="needs gather_with_grad=True"):
            loss_class(local_loss=True, world_size=2, label_smoothing=smoothing)
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
