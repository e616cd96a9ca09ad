"""`patch_open_clip()`: open_clip's own training code with fastclip's parts, one line added."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastclip.integrations.attention import replace_attention
from fastclip.integrations.patch import MARK, PatchHandle
from fastclip.losses.clip import ClipLoss, DistillClipLoss
from fastclip.losses.siglip import SigLipLoss
from fastclip.ops.backend import check_backend


def patch_open_clip(
    model: nn.Module | None = None,
    *,
    loss: bool = True,
    attention: bool = True,
    backend: str = "auto",
) -> PatchHandle:
    """Make open_clip compute its losses, and a model its attention, with fastclip.

    Losses follow wherever they were imported to: the `forward` of ClipLoss, SigLipLoss and
    DistillClipLoss is replaced, so instances that exist already, names imported before,
    subclasses (CoCaLoss) and the open_clip trainer all follow. Values and gradients are those of
    open_clip; what fastclip does not compute (distillation with local_loss without
    gather_with_grad, Horovod, a teacher that is trained, a subclass with its own `get_logits` or
    another part of the loss) keeps open_clip's code, with a warning.

    Args:
        model: an open_clip model whose attention is to be replaced, in towers of its own and of
            timm's; weights stay as they are. For text towers from Hugging Face see
            `patch_transformers`.
        loss: whether to replace the loss classes.
        attention: whether to replace the attention of `model`.
        backend: "auto", "triton", "sdpa" (torch's), "flash" (the flash-attn package) or
            "reference", of the attention.

    Returns:
        A handle with `undo()` that is also a context manager. Patching twice is harmless: the
        second handle restores nothing.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: `model` is not a module, the backend is unknown, or the model was patched with
            another one before; nothing is changed then.

    Examples:
        >>> import fastclip, open_clip, torch
        >>> vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1}
        >>> model = open_clip.CLIP(64, vision, {"width": 64, "heads": 2, "layers": 1})
        >>> handle = fastclip.patch_open_clip(model)
        >>> model.encode_image(torch.zeros(2, 3, 32, 32)).shape  # by fastclip's attention
        torch.Size([2, 64])
        >>> open_clip.ClipLoss()(torch.eye(3), torch.eye(3), torch.tensor(2.0))  # by its loss
        tensor(0.2395)
        >>> handle.undo()
    """
    import open_clip.loss

    if not isinstance(model, (nn.Module, type(None))):
        raise ValueError(f"model is {model!r}; give an open_clip model, not its class or name")
    # before the losses are replaced: an error leaves nothing behind
    check_backend(backend, "attention")
    handle = PatchHandle()
    if attention and model is not None:
        replace_attention(model, handle, backend)
    if loss:
        for name, replacement in _REPLACEMENTS.items():
            _replace_forward(getattr(open_clip.loss, name), replacement, handle)
    return handle


def _replace_forward(
    loss_class: type[nn.Module], replacement: Callable[..., Any], handle: PatchHandle
) -> None:
    original = loss_class.forward
    if hasattr(original, MARK):
        return

    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        call = signature.bind(self, *arguments, **options)
        call.apply_defaults()
        try:
            ours = replacement(self)
            # by name: older releases have other arguments before the last
            return ours(**dict(list(call.arguments.items())[1:]))
        except _Refusal as refusal:
            warnings.warn(f"open_clip's own loss is kept: {refusal}", stacklevel=2)
            return original(self, *arguments, **options)

    setattr(forward, MARK, original)
    loss_class.forward = forward

    def restore() -> None:
        loss_class.forward = original

    handle.on_undo(restore)


class _Refusal(Exception):
    """Why fastclip leaves a call to open_clip."""


def _clip(theirs: Any) -> Callable[..., Any]:
    return _softmax(theirs, ClipLoss)


def _distill(theirs: Any) -> Callable[..., Any]:
    ours = _softmax(theirs, DistillClipLoss)

    def call(**arguments: Any) -> Any:
        teacher = [value for name, value in arguments.items() if name.startswith("dist_")]
        if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in teacher):
            raise _Refusal("the teacher requires a gradient")
        return ours(**arguments)

    return call


def _check_parts(theirs: Any) -> None:
    """Refuse a loss whose class replaces a part that open_clip's `forward` calls."""
    library = [kind for kind in type(theirs).__mro__ if kind.__module__ == "open_clip.loss"]
    parts = {name for kind in library for name in vars(kind) if not name.startswith("__")}
    for name in sorted(parts - {"forward"}):
        if getattr(type(theirs), name) is not getattr(library[0], name):
            raise _Refusal(f"{type(theirs).__name__} has its own {name}")


def _softmax(theirs: Any, loss_class: type[ClipLoss]) -> ClipLoss:
    _check_parts(theirs)
    options = {
        name: getattr(theirs, name)
        for name in ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")
    }
    try:
        return loss_class(**options, use_horovod=getattr(theirs, "use_horovod", False))
    except ValueError as error:
        raise _Refusal(str(error)) from error


def _siglip(theirs: Any) -> SigLipLoss:
    _check_parts(theirs)
    # by version: the exchange is chosen from 2.25 on, the chunk from 4.0 on
    exchange, chunk = getattr(theirs, "dist_impl", "bidir"), getattr(theirs, "chunk_size", 0)
    return SigLipLoss(theirs.cache_labels, theirs.rank, theirs.world_size, exchange, chunk)


_REPLACEMENTS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "ClipLoss": _clip,
    "SigLipLoss": _siglip,
    "DistillClipLoss": _distill,
}
