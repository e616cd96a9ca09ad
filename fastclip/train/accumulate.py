"""Exact gradient accumulation: micro-batches that together give the full batch's gradient.

A contrastive loss compares every sample with every other, so the losses of micro-batches do not
add up to the whole batch's. Contributions to its gradient do: for L(F, s), with F_m(θ) the rows of
F that are micro-batch m's features and s(θ) what all samples share (a logit scale),

    dL/dθ = Σ_m (dF_m/dθ)ᵀ dL/dF_m + (ds/dθ)ᵀ dL/ds

All F_m are computed without a graph; dL/dF and dL/ds come from one run of the loss on the whole
batch; then one micro-batch after another is computed again, with a graph and the same random
numbers, and Σ F_m ∘ dL/dF_m goes backward. Encoders run twice, activations of one micro-batch are
alive at a time. Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup" (GradCache), arXiv:2101.06983.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = TypeVar("Batch")


def accumulate(
    forward: Callable[[Batch], Mapping[str, Tensor]],
    micro_batches: Sequence[Batch],
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    shared: Collection[str] = ("logit_scale", "logit_bias"),
    constant: Callable[[Batch], Mapping[str, Tensor]] = lambda batch: {},
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
    scale_loss: Callable[[Tensor], Tensor] | None = None,
    context: Callable[[bool], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Tensor:
    """Add the whole batch's gradient to every parameter's `.grad`, one micro-batch at a time.

    The gradient is the full batch's, logit scale and bias included, and with dropout that of one
    graph over the same micro-batches. A single micro-batch goes the plain way: one forward, one
    backward. `forward` runs twice on each of several, so it must not change its own state (batch
    normalization, see `refuse_batch_norm`; the power iterations of spectral normalization) and may
    draw random numbers only from torch's default generators of the CPU and of CUDA devices, the
    same ones with gradients off and on. These generators end where one plain pass leaves them.

    Args:
        forward: a micro-batch's outputs by name: tensors of one row a sample, (n, ...), and those
            named in `shared`, of any shape. Integer tensors (labels) reach the loss as they are.
            Autocast belongs inside.
        micro_batches: one or more, of any sizes.
        loss: the 0-d loss of the outputs of the whole batch, (N, ...) in the order of the
            micro-batches, the shared ones once. Parameters of its own (a projection head) get
            their gradient too, but must not be under data-parallel averaging.
        shared: names of outputs that belong to no sample and are equal in all micro-batches.
        constant: further outputs of a micro-batch, by names of their own, that no gradient reaches
            (a teacher's); computed once, without a graph, after `forward`'s.
        backward: takes a 0-d tensor backward: once a micro-batch, through every output. Of several
            micro-batches it gets surrogates, whose values mean nothing and whose gradients are to
            be added up, not averaged.
        scale_loss: a factor against underflow (`GradScaler.scale`); multiplies the loss only, from
            where it reaches every gradient.
        context: entered with whether this micro-batch is the last, around its forward and its
            backward with gradients. For one reduction a step under DistributedDataParallel:
            `lambda last: nullcontext() if last else ddp.no_sync()`.

    Returns:
        The loss of the whole batch, 0-d, detached and without `scale_loss`.

    Raises:
        ValueError: there is no micro-batch, or outputs are not as described: not a dictionary of
            tensors, other names in another micro-batch, not one row a sample.

    Examples:
        >>> import torch
        >>> from torch.nn.functional import normalize
        >>> from fastclip import ClipLoss
        >>> from fastclip.train.accumulate import accumulate
        >>> tower, scale = torch.nn.Linear(8, 4), torch.nn.Parameter(torch.tensor(10.0))
        >>> def forward(batch):
        ...     images, texts = (normalize(tower(part), dim=1) for part in batch)
        ...     return {"image_features": images, "text_features": texts, "logit_scale": scale}
        >>> micro_batches = [torch.randn(2, 16, 8) for _ in range(4)]  # 4 x 16 pairs
        >>> accumulate(forward, micro_batches, lambda outputs: ClipLoss()(**outputs)).shape
        torch.Size([])
        >>> scale.grad.shape, tower.weight.grad.shape  # of the loss among all 64 pairs
        (torch.Size([]), torch.Size([4, 8]))
    """
    if not micro_batches:
        raise ValueError("no micro-batches: give at least one")
    last = len(micro_batches) - 1
    if last == 0:
        with context(True):
            output = forward(micro_batches[0])
            _check(output, output, 0, shared)
            with torch.no_grad():
                fixed = constant(micro_batches[0])
            value = loss({**output, **fixed})
            backward(value if scale_loss is None else scale_loss(value))
        return value.detach()

    outputs: list[Mapping[str, Tensor]] = []
    constants, states = [], []
    with torch.no_grad():
        for index, batch in enumerate(micro_batches):
            states.append(_random_state())
            output = forward(batch)
            _check(output, outputs[0] if outputs else output, index, shared)
            if outputs:
                # the first one's serve: these may be copies of large parameters
                output = {name: v for name, v in output.items() if name not in shared}
            outputs.append(output)
            constants.append(constant(batch))
    # casts of weights that older releases of torch cached just now have no gradient
    torch.clear_autocast_cache()

    whole = {
        name: value if name in shared else torch.cat([output[name] for output in outputs])
        for name, value in outputs[0].items()
    }
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in whole.items()
        if value.is_floating_point()
    }
    fixed = {name: torch.cat([part[name] for part in constants]) for name in constants[0]}
    value = loss({**whole, **leaves, **fixed})
    (value if scale_loss is None else scale_loss(value)).backward()
    end = _random_state()
    gradients = {}
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if name in shared:
            # zeros, not left out: data-parallel wrappers want a gradient of every parameter
            gradients[name] = [torch.zeros_like(leaf)] * last + [gradient]
        else:
            gradients[name] = list(gradient.split([len(output[name]) for output in outputs]))
    del outputs, whole, leaves, constants, fixed

    for index, batch in enumerate(micro_batches):
        with context(index == last):
            _set_random_state(states[index])
            output = forward(batch)
            terms = [_product(output[name], parts[index]) for name, parts in gradients.items()]
            backward(functools.reduce(operator.add, terms))
    # a loss may have drawn as well
    _set_random_state(end)
    return value.detach()


def refuse_batch_norm(model: nn.Module, micro_batches: int) -> None:
    """Check that a model's outputs do not depend on how the batch is cut into micro-batches.

    Of torch's layers only batch normalization lets them: in training mode it normalizes by the
    micro-batch's statistics (and would update the running ones twice). In evaluation mode with
    running statistics, or replaced by a frozen layer, it is a fixed affine map. Heads of
    `fastclip.nn.heads` with batch normalization over all processes are not looked at: call them in
    the loss, on the whole batch.

    Args:
        model: in the mode, training or evaluation, that it is trained in.
        micro_batches: how many there are; one is never refused.

    Raises:
        ValueError: there are several micro-batches and such a module.

    Examples:
        >>> import torch
        >>> from fastclip.train.accumulate import refuse_batch_norm
        >>> tower = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> refuse_batch_norm(tower.eval(), micro_batches=4)  # frozen
        >>> refuse_batch_norm(tower.train(), micro_batches=4)
        Traceback (most recent call last):
            ...
        ValueError: 4 micro-batches and batch normalization (1): its statistics would be ...
    """
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    if micro_batches > 1 and names:
        first = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        raise ValueError(
            f"{micro_batches} micro-batches and batch normalization ({first}): its statistics "
            "would be a micro-batch's, and the gradient not the full batch's; use --accum-freq 1, "
            "a model without batch normalization, or freeze it (evaluation mode)"
        )


def _check(
    output: Mapping[str, Tensor], first: Mapping[str, Tensor], index: int, shared: Collection[str]
) -> None:
    """Refuse outputs of micro-batch `index` that are not as described, or unlike the first's."""
    if not isinstance(output, Mapping):
        raise ValueError(f"forward gives a {type(output).__name__}; return a dictionary")
    if output.keys() != first.keys():
        raise ValueError(
            f"outputs of micro-batch {index} are {', '.join(output)}, of the first "
            f"{', '.join(first)}; return the same names every time"
        )
    for name, value in output.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"output {name!r} is a {kind}, not a tensor; leave it out")
    shapes = {name: tuple(v.shape) for name, v in output.items() if name not in shared}
    if () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"outputs of micro-batch {index} have shapes {shapes}; return one row a sample "
            "(views and hard negatives apart or along a further dimension), and name in "
            f"`shared` (now {', '.join(shared)}) what belongs to no sample"
        )


def _product(value: Tensor, gradient: Tensor) -> Tensor:
    """The sum of value * gradient, 0-d, whose derivative by `value` is `gradient`."""
    # at least in float32: `backward` may multiply by a loss scale that float16 cannot hold
    dtype = torch.promote_types(value.dtype, torch.float32)
    return (value.to(dtype) * gradient.to(dtype)).sum()


def _random_state() -> list[Tensor]:
    """Of the CPU's default generator, then of every CUDA device's; reads no device."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
