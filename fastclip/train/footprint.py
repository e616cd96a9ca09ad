"""What a model's towers need per sample, counted on fake tensors: no memory, no GPU, no data.

The model is built with shapes alone and run forward and backward under torch's fake tensors. Every
storage that an operation makes is followed until it is freed, so the counts are those of the very
model, whatever it is made of; a straight line through two batch sizes gives each for any number of
samples. They are the same on every machine.

Autocast is that of the CPU, changed where CUDA's differs in what a ViT or a text tower keeps:
CUDA runs normalizations and softmax in float32 and so keeps float32 copies of their inputs.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fastclip.device import AUTOCAST_DTYPES
from fastclip.models.clip import create
from fastclip.train.costs import Sharding
from fastclip.train.shard import blocks_of

# Few and many samples: what does not grow with the batch is separated from what does.
SAMPLES = (16, 256)
FLOAT32_ON_CUDA = ("layer_norm", "group_norm", "normalize", "softmax")


def attention_flop(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    """FLOP of attention between the shapes given; torch has them for GPUs' operators only."""
    return sdpa_flop_count(query, key, value)


@dataclass(frozen=True)
class Line:
    """Bytes that grow with the number of samples."""

    constant: float
    per_sample: float

    def __call__(self, samples: int) -> int:
        return round(self.constant + self.per_sample * samples)


@dataclass(frozen=True)
class Footprint:
    """The towers of one model at one precision.

    Attributes:
        parameters: numbers in the model.
        width: of the features.
        forward_flop: FLOP of both towers' forward, per sample; a multiplication and an addition
            are two.
        input_bytes: of a sample's uint8 image and int64 tokens, as the host holds them.
        saved: bytes kept from the forward for the backward, by whether activations are
            checkpointed.
        working: bytes on top of these at the backward's peak, likewise.
        cast_bytes: the parameters' copies in autocast's dtype.
        has_batch_norm: whether a sample's features depend on the others of its micro-batch.
        sharding: what FSDP2 divides.
    """

    parameters: int
    width: int
    forward_flop: int
    input_bytes: int
    saved: dict[bool, Line]
    working: dict[bool, Line]
    cast_bytes: int
    has_batch_norm: bool
    sharding: Sharding


def footprint(name: str, precision: str) -> Footprint:
    """Count a model of open_clip, of fastclip, or of a JSON file.

    Args:
        name: as `fastclip.models.clip.create` takes it.
        precision: of `fastclip.device.AUTOCAST_DTYPES`.

    Raises:
        ValueError: the name is unknown, or the model has no checkpointing that works.
    """
    with torch.device("meta"):
        built = create(name, device="meta")
    size = built.preprocess_config["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    shape = (3, height, width)
    context = int(getattr(built.model, "context_length", None) or built.tokenizer([""]).shape[1])
    with FakeTensorMode():
        model = as_fake(built.model)
        images, texts = _inputs(2, shape, context)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            features = model(images, texts)["image_features"]
        saved, working, casts = {}, {}, 0
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
            few, many = (measure(model, *_inputs(n, shape, context), precision) for n in SAMPLES)
            casts = casts or few.casts
            saved[checkpointing] = _line(few.saved, many.saved)
            working[checkpointing] = _line(few.peak - few.saved, many.peak - many.saved)
    return Footprint(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        width=features.shape[1],
        forward_flop=counter.get_total_flops() // 2,
        input_bytes=3 * height * width + 8 * context,
        saved=saved,
        working=working,
        cast_bytes=casts,
        has_batch_norm=_has_batch_norm(model),
        sharding=sharding_of(model),
    )


def sharding_of(model: nn.Module) -> Sharding:
    """What `fastclip.train.shard.shard` divides of a model, of real, fake or meta tensors."""
    blocks = blocks_of(model)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    return Sharding(
        rows=tuple((shape[0], math.prod(shape[1:])) if shape else (1, 1) for shape in shapes),
        outside=sum(map(math.prod, shapes)) - sum(sizes),
        largest=max(sizes, default=0),
        exact_blocks=any(map(_has_batch_norm, blocks)),
    )


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(each, _BatchNorm) for each in module.modules())


def as_fake(model: nn.Module) -> nn.Module:
    """The model in training mode with every parameter and buffer replaced by a fake one, in place.

    Call it inside a FakeTensorMode. Shared parameters stay shared.
    """
    # the original is kept beside its substitute, or another one might get its id
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, fake)
                tensors[key] = made[id(tensor)][1]  # type: ignore[assignment]
    return model.train()


@dataclass(frozen=True)
class Measured:
    """Bytes of one forward and backward: kept in between, at the peak, parameters' casts."""

    saved: int
    peak: int
    casts: int


def measure(model: nn.Module, images: Tensor, texts: Tensor, precision: str) -> Measured:
    """Follow one forward and backward of a two-tower model, of real or of fake tensors.

    Parameters, buffers and their gradients are left out, and so are autocast's copies of the
    parameters (`casts`); the inputs count.
    """
    # the CPU knows fewer operations in float16, and its numbers take as much
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST_DTYPES[precision] is not None)
    live = Live(model, (images, texts))
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key in live.bytes:
            saved[key] = live.bytes[key]
        return tensor

    model.zero_grad(set_to_none=True)
    with live, cuda_autocast():
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(images, texts)
        loss = output["image_features"].sum() + output["text_features"].sum()
        loss.backward()
    live.close()
    return Measured(sum(saved.values()), live.peak, sum(live.casts.values()))


class Live(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is freed.

    Attributes:
        bytes: of the storages that are alive, by key; not those of parameters, buffers, their
            gradients and casts.
        casts: bytes of the last copy of each parameter in another dtype, by the parameter's key.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.casts: dict[int, int] = {}
        # births and deaths in their order; keys are used again, so each birth has a number
        self._changes: list[tuple[int, int]] = []
        self._births: dict[int, int] = {}
        self._gradients: set[int] = set()
        self._parameters = {_key(parameter) for parameter in model.parameters()}
        self._left_out = self._parameters | {_key(buffer) for buffer in model.buffers()}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._leave_out_gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        for tensor in inputs:
            self._follow(tensor)

    @property
    def peak(self) -> int:
        """The most that was alive at once."""
        total = peak = 0
        for birth, change in self._changes:
            # what became a parameter's gradient never was anything else
            if birth not in self._gradients:
                total += change
                peak = max(peak, total)
        return peak

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and self._is_parameter(args[0]):
            storage = result.untyped_storage()
            self.casts[_key(args[0])] = storage.nbytes()
            self._left_out.add(_key(result))
            weakref.finalize(storage, self._left_out.discard, _key(result))
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return result

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Whole: not one that is expanded to a row for each sample."""
        size = tensor.numel() * tensor.element_size()
        return _key(tensor) in self._parameters and size <= tensor.untyped_storage().nbytes()

    def _follow(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self.bytes or key in self._left_out:
            return
        storage = tensor.untyped_storage()
        self.bytes[key] = storage.nbytes()
        self._births[key] = len(self._changes)
        self._changes.append((self._births[key], storage.nbytes()))
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        if key in self.bytes:
            self._changes.append((self._births.pop(key), -self.bytes.pop(key)))

    def _leave_out_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None and _key(parameter.grad) in self._births:
            self._gradients.add(self._births[_key(parameter.grad)])
            self._forget(_key(parameter.grad))


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let the CPU's autocast run in float32 what CUDA's does, as far as towers use it.

    Functions are replaced in torch.nn.functional: a mode would be off inside the backward, where
    checkpointing runs them again.
    """
    originals = {name: getattr(functional, name) for name in FLOAT32_ON_CUDA}
    for name, original in originals.items():
        setattr(functional, name, partial(_in_float32, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


def _in_float32(function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    wide = x.float() if torch.is_autocast_enabled("cpu") else x
    return function(wide, *args, **kwargs)


def _inputs(samples: int, shape: tuple[int, int, int], context: int) -> tuple[Tensor, Tensor]:
    images = torch.empty(samples, *shape).to(memory_format=torch.channels_last)
    return images, torch.zeros(samples, context, dtype=torch.long)


def _line(few: int, many: int) -> Line:
    slope = (many - few) / (SAMPLES[1] - SAMPLES[0])
    return Line(few - slope * SAMPLES[0], slope)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}
