"""`patch_open_clip()`: open_clip's own training code with fastclip's loss, one line added."""

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fastclip.losses.clip import ClipLoss

_MARK = "_fastclip_original"


class PatchHandle:
    """What a patch changed; `undo()`, or the end of a `with` block, restores it."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Restore the originals; a second call does nothing."""
        while self._restore:
            self._restore.pop()()

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def patch_open_clip(
    model: nn.Module | None = None, *, loss: bool = True, attention: bool = True
) -> PatchHandle:
    """Make open_clip compute its losses with fastclip, wherever they were imported to.

    The classes' `forward` is exchanged, so instances that exist already, names imported before,
    subclasses (CoCaLoss) and open_clip's trainer all follow. Values and gradients are open_clip's;
    modes that fastclip does not compute (local_loss without gather_with_grad, Horovod) keep
    open_clip's code, with a warning.

    Args:
        model: an open_clip model whose attention is to be exchanged; this version has no attention
            of its own, so it is left as it is.
        loss: whether to exchange the loss classes.
        attention: as `model`.

    Returns:
        A handle with `undo()` that is also a context manager. Patching twice is harmless: the
        second handle restores nothing.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
    """
    import open_clip.loss

    handle = PatchHandle()
    if loss:
        _exchange_forward(open_clip.loss.ClipLoss, handle)
    return handle


def _exchange_forward(loss_class: type[nn.Module], handle: PatchHandle) -> None:
    original = loss_class.forward
    if hasattr(original, _MARK):
        return

    def forward(
        self: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        ours = _equivalent(self)
        if ours is None:
            arguments = (image_features, text_features, logit_scale)
            return original(self, *arguments, logit_bias=logit_bias, output_dict=output_dict)
        return ours(image_features, text_features, logit_scale, logit_bias, output_dict)

    setattr(forward, _MARK, original)
    loss_class.forward = forward

    def restore() -> None:
        loss_class.forward = original

    handle._restore.append(restore)


def _equivalent(theirs: Any) -> ClipLoss | None:
    """fastclip's loss with the options of an open_clip ClipLoss; None where there is none."""
    options = {
        name: getattr(theirs, name)
        for name in ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")
    }
    try:
        return ClipLoss(**options, use_horovod=getattr(theirs, "use_horovod", False))
    except ValueError as error:
        warnings.warn(f"open_clip's own loss is kept: {error}", stacklevel=4)
        return None
