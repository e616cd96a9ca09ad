"""Gradients of micro-batches against the full batch's, in one process and over two ranks."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import fastclip
from fastclip import functional
from fastclip.train.accumulate import accumulate, refuse_batch_norm
from tests.processes import on_ranks
from tests.train.conftest import TINY_MODEL

PAIRS = 16
SPLITS = (1, 2, 4, 7)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]))
LOSSES = {"clip": fastclip.ClipLoss, "siglip": fastclip.SigLipLoss}
# float64: sums of a few hundred terms in another order
TOLERANCE = 1e-12

Batch = tuple[Tensor, Tensor]
Gradients = dict[str, Tensor]


def build(dropout: bool = False, device: str = "cpu") -> nn.Module:
    """The same float64 open_clip model each time; patch dropout draws on the CPU everywhere."""
    vision = {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.5 if dropout else 0.0}
    text = {**TINY_MODEL["text_cfg"], "vocab_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(16, vision, text, init_logit_bias=-2.0, output_dict=True)
    if dropout:
        model.visual.ln_post = nn.Sequential(model.visual.ln_post, nn.Dropout(0.2))
        model.ln_final = nn.Sequential(model.ln_final, nn.Dropout(0.2))
    return model.double().to(device)


def data(device: str = "cpu") -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.to(device), torch.randint(64, (PAIRS, 12), generator=generator).to(device)


def split(batch: Batch, count: int) -> list[Batch]:
    """Micro-batches, for 7 of two sizes."""
    return list(zip(*(t.tensor_split(count) for t in batch), strict=True))


def call(loss: nn.Module, output: Gradients) -> Tensor:
    names = "image_features", "text_features", "logit_scale", "logit_bias"
    return loss(*(output[name] for name in names))


def one_graph(forward: Callable[..., Gradients], batches: list[Any], loss: Any) -> Tensor:
    """What accumulation has to equal, in the memory it has to avoid."""
    outputs = [forward(batch) for batch in batches]
    names = [name for name, value in outputs[0].items() if value.dim()]
    value = loss({**outputs[0], **{name: torch.cat([o[name] for o in outputs]) for name in names}})
    value.backward()
    return value.detach()


def gradients(model: nn.Module) -> Gradients:
    """Every parameter's gradient, taken out of the model."""
    taken = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return taken


def assert_equal(got: Gradients, want: Gradients, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == want.keys()
    for name, reference in want.items():
        assert (got[name] - reference).norm() <= tolerance * reference.norm(), name


@pytest.mark.parametrize("count", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_gradient_is_the_full_batchs(name: str, count: int) -> None:
    model, loss = build(), LOSSES[name]()
    expected = call(loss, model(*data()))
    expected.backward()
    want = gradients(model)
    seen: list[float] = []
    value = accumulate(
        lambda batch: model(*batch),
        split(data(), count),
        functools.partial(call, loss),
        scale_loss=lambda value: 1024 * value,
        backward=lambda value: (seen.append(value.item()), value.backward()),
    )
    assert not value.requires_grad
    assert abs(value - expected) <= TOLERANCE * abs(expected)
    assert want["logit_scale"] != 0 and (name == "clip" or want["logit_bias"] != 0)
    assert_equal({key: g / 1024 for key, g in gradients(model).items()}, want)
    assert len(seen) == count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", SPLITS)
def test_with_dropout_it_is_that_of_one_graph(count: int, device: str) -> None:
    model, batches = build(dropout=True, device=device), split(data(device), count)

    def forward(batch: Batch) -> Gradients:
        return model(*batch)

    def loss(output: Gradients) -> Tensor:
        # draws as well: what comes next must not draw the same again
        return call(fastclip.ClipLoss(), output) * (1 + torch.rand((), device=device))

    results = []
    for method in (one_graph, accumulate):
        torch.manual_seed(2)
        value = method(forward, batches, loss)
        following = torch.cat([torch.rand(4), torch.rand(4, device=device).cpu()])
        results.append((value, gradients(model), following))
    (value, want, following), (got_value, got, got_following) = results
    assert_equal(got, want)
    assert abs(got_value - value) <= TOLERANCE * abs(value)
    assert torch.equal(got_following, following)


def test_inside_one_autocast_no_gradient_is_lost() -> None:
    model, batches = build(dropout=True).float(), split(data(), 4)

    def forward(batch: Batch) -> Gradients:
        return model(batch[0].float(), batch[1])

    results = []
    for method in (one_graph, accumulate):
        torch.manual_seed(2)
        # the reference casts anew each time: sharing one would add micro-batches up in bfloat16
        cached = method is accumulate
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            method(forward, batches, functools.partial(call, fastclip.ClipLoss()))
        results.append(gradients(model))
    # the same bfloat16 products, added up in float32
    assert_equal(results[1], results[0], 1e-5)


def train(model: nn.Module, step: Callable[[], Any], average: Any = lambda _: None) -> Gradients:
    """Two updates with momentum, large enough for an error to grow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(2):
        step()
        for parameter in model.parameters():
            average(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def hook(reduced: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    reduced.append(bucket.buffer().numel())
    return default_hooks.allreduce_hook(None, bucket)


def accumulated(loss: Any, batches: list[Batch], dropout: bool) -> tuple[Gradients, list[int]]:
    """Trained parameters and the sizes of all reductions."""
    ddp, reduced = DistributedDataParallel(build(dropout), bucket_cap_mb=0.01), []
    ddp.register_comm_hook(reduced, hook)

    def context(last: bool) -> Any:
        return contextlib.nullcontext() if last else ddp.no_sync()

    def step() -> None:
        accumulate(lambda batch: ddp(*batch), batches, loss, context=context)

    return train(ddp.module, step), reduced


def by_hand(loss: Any, batches: list[Batch]) -> Gradients:
    """Trained parameters, with dropout, of one graph a rank."""
    model = build(dropout=True)

    def average(gradient: Tensor) -> None:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()

    return train(model, lambda: one_graph(lambda batch: model(*batch), batches, loss), average)


def work(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    own = tuple(t.chunk(world)[rank] for t in data())
    results: dict[Any, Any] = {}
    for name, loss_class in LOSSES.items():
        options = {"gather_with_grad": True} if name == "clip" else {}
        loss = functools.partial(call, loss_class(rank=rank, world_size=world, **options))
        for count in SPLITS:
            batches = split(own, count)
            torch.manual_seed(rank)
            results[name, count, "exact"] = accumulated(loss, batches, dropout=False)
            torch.manual_seed(rank)
            results[name, count, "dropout"] = accumulated(loss, batches, dropout=True)
            torch.manual_seed(rank)
            results[name, count, "by hand"] = by_hand(loss, batches)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    on_ranks(work, (2, folder), ranks=2)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize("count", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_train_as_one_process(ranks: list[Any], name: str, count: int) -> None:
    model, loss = build(), LOSSES[name]()
    want = train(model, lambda: call(loss, model(*data())).backward())
    elements = sum(p.numel() for p in model.parameters())
    for results in ranks:
        parameters, reduced = results[name, count, "exact"]
        assert_equal(parameters, want)
        # every bucket once a step
        assert sum(reduced) == 2 * elements and len(reduced) > 4
        assert_equal(results[name, count, "dropout"][0], results[name, count, "by hand"])


class Saved:
    """A tensor saved for backward; counts the bytes alive, except parameters'."""

    alive = peak = 0
    parameters: frozenset[int] = frozenset()

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        own = tensor.untyped_storage().data_ptr() in Saved.parameters
        self.size = 0 if own else tensor.nbytes
        Saved.alive += self.size
        Saved.peak = max(Saved.peak, Saved.alive)

    def __del__(self) -> None:
        Saved.alive -= self.size


def test_activations_of_one_micro_batch_are_alive() -> None:
    model, loss, peaks = build(), functools.partial(call, fastclip.ClipLoss()), []
    Saved.parameters = frozenset(p.untyped_storage().data_ptr() for p in model.parameters())
    for count in (1, 4):
        Saved.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            accumulate(lambda batch: model(*batch), split(data(), count), loss)
        assert Saved.alive == 0
        peaks.append(Saved.peak)
    assert 0 < peaks[1] < 0.5 * peaks[0]


def test_any_two_encoders_and_heads_inside_the_loss() -> None:
    torch.manual_seed(0)
    encoders = nn.ModuleList(
        nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 8))
        for width in (5, 6)
    ).double()
    encoders.append(nn.Linear(8, 4).double())
    encoders.register_parameter("temperature", nn.Parameter(torch.tensor(0.3).double()))
    labels = torch.arange(12) % 4
    inputs = [torch.randn(12, width, dtype=torch.float64) for width in (5, 6)]

    def forward(batch: tuple[Tensor, ...]) -> Gradients:
        x, y = encoders[0](batch[0]), encoders[1](batch[1])
        return {"x": x, "y": y, "label": batch[2], "unused": 2 * y, "t": encoders.temperature}

    def loss(output: Gradients) -> Tensor:
        x, y = (F.normalize(encoders[2](output[name]), dim=-1) for name in ("x", "y"))
        contrast = functional.info_nce_loss(x, y, 1 / output["t"])
        return contrast + functional.sup_con_loss(x, output["label"], output["t"])

    batches = list(zip(*(t.split(5) for t in (*inputs, labels)), strict=True))
    torch.manual_seed(2)
    one_graph(forward, batches, loss)
    want = gradients(encoders)
    passes: list[str] = []
    for name, parameter in encoders.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: passes.append(name))
    torch.manual_seed(2)
    accumulate(forward, batches, loss, shared=["t"])
    assert_equal(gradients(encoders), want)
    # data-parallel wrappers count: every encoder parameter in every micro-batch, the head's once
    assert passes.count("temperature") == passes.count("1.0.weight") == len(batches) == 3
    assert passes.count("2.weight") == 1


def test_backward_may_scale_beyond_float16() -> None:
    # an engine's loss scale of 2**17 is infinite in float16, its product with 2**-3 is not
    x = torch.ones(4, 1, dtype=torch.float16, requires_grad=True)
    accumulate(
        lambda rows: {"x": x[rows]},
        [slice(0, 1), slice(1, 4)],
        lambda output: output["x"].float().sum() / 8,
        backward=lambda value: (value * 2.0**17).backward(),
    )
    assert torch.equal(x.grad, torch.full_like(x, 2.0**14))


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "no micro-batches: give at least one"),
        ([(X, X)], "gives a tuple; return a dictionary"),
        ([{"x": X, "note": "text"}], "output 'note' is a str, not a tensor"),
        ([{"x": X, "t": X.sum()}], r"'t': \(\)\}; return one row a sample .*name in `shared`"),
        ([{"x": X}, {"x": X, "more": torch.ones(4, 3)}], "batch 1 are x, more, of the first x"),
        ([{"x": X, "more": torch.ones(4, 3)}] * 2, r"'more': \(4, 3\)\}; .*hard negatives apart"),
    ],
)
def test_outputs_that_do_not_fit_are_reported(outputs: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accumulate(lambda output: output, outputs, lambda output: X.sum())


def test_batch_normalization_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), *(nn.BatchNorm1d(3) for _ in range(4)))
    refuse_batch_norm(model, 1)
    with pytest.raises(
        ValueError, match=r"2 micro.*\(1, 2, 3 and 1 more\).*--accum-freq 1.*freeze"
    ):
        refuse_batch_norm(model, 2)
    refuse_batch_norm(model.eval(), 2)
    # without running statistics it takes the batch's in evaluation as well
    with pytest.raises(ValueError, match="the model itself"):
        refuse_batch_norm(nn.BatchNorm2d(3, track_running_stats=False).eval(), 2)
    refuse_batch_norm(nn.GroupNorm(1, 3), 2)


def test_what_is_shared_is_held_once() -> None:
    """Copies of a criterion's parameters, of which one micro-batch's serve."""
    weight = torch.randn(3, 3, requires_grad=True)
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def forward(rows: Tensor) -> dict[str, Tensor]:
        copy = weight.clone()
        copies.append(weakref.ref(copy))
        return {"rows": rows @ weight, "head": copy}

    def loss(output: dict[str, Tensor]) -> Tensor:
        alive.append(sum(copy() is not None for copy in copies))
        return (output["rows"] @ output["head"]).square().sum()

    batches = list(torch.randn(12, 3).split(2))
    accumulate(forward, batches, loss, shared=("head",))
    assert alive == [1]
    found, weight.grad = weight.grad, None
    accumulate(forward, [torch.cat(batches)], loss, shared=("head",))
    torch.testing.assert_close(found, weight.grad)


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_micro_batch_is_announced(count: int) -> None:
    """Around its forward and its backward, so that data-parallel training reduces once a step."""
    weight, happened = torch.randn(3, 3, requires_grad=True), []

    @contextlib.contextmanager
    def context(last: bool) -> Iterator[None]:
        happened.append("last" if last else "one of several")
        yield
        happened.append("end")

    def backward(value: Tensor) -> None:
        happened.append("backward")
        value.backward()

    accumulate(
        lambda rows: {"x": rows @ weight},
        list(torch.randn(6, 3).split(6 // count)),
        lambda output: output["x"].square().sum(),
        backward=backward,
        context=context,
    )
    wanted = ["one of several"] * (count - 1) + ["last"]
    assert happened == [what for begin in wanted for what in (begin, "backward", "end")]
