"""`patch_timm()`: a timm vision transformer with fastclip's attention."""

from torch import nn

from fastclip.integrations.attention import exchange_attention
from fastclip.integrations.patch import PatchHandle


def patch_timm(model: nn.Module, *, backend: str = "auto") -> PatchHandle:
    """Replace the attention of a timm model's `Attention` layers; weights stay as they are.

    Calls with a mask, or with dropout of attention while training, keep timm's code.

    Args:
        model: from `timm.create_model`, or any module that contains timm's layers.
        backend: implementation of `fastclip.functional.attention`.

    Returns:
        A handle with `undo()` that is also a context manager.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: the model has no layer that could be exchanged.
    """
    import timm  # noqa: F401

    handle = PatchHandle()
    if not exchange_attention(model, handle, backend):
        raise ValueError(
            f"{type(model).__name__} has no timm Attention layer, or was patched before; "
            "give a vision transformer whose blocks have one"
        )
    return handle
