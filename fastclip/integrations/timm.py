"""`patch_timm()`: a timm vision transformer with fastclip's attention."""

from torch import nn

from fastclip.integrations.attention import replace_attention
from fastclip.integrations.patch import PatchHandle


def patch_timm(model: nn.Module, *, backend: str = "auto") -> PatchHandle:
    """Replace the attention of a timm model's `Attention` layers; weights stay as they are.

    Calls with a mask, or with dropout of attention while training, keep timm's code.

    Args:
        model: from `timm.create_model`, or any module that contains timm's layers.
        backend: "auto", "triton", "sdpa" (torch's), "flash" (the flash-attn package) or
            "reference", of the attention.

    Returns:
        A handle with `undo()` that is also a context manager.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: the model has no layer that could be replaced.

    Examples:
        >>> import fastclip, timm, torch
        >>> model = timm.create_model("test_vit", pretrained=False).eval()
        >>> images = torch.zeros(1, 3, 160, 160)
        >>> before = model(images)
        >>> handle = fastclip.patch_timm(model)
        >>> model(images).allclose(before, atol=1e-5)
        True
        >>> handle.undo()
    """
    import timm  # noqa: F401

    handle = PatchHandle()
    if not replace_attention(model, handle, backend):
        raise ValueError(
            f"{type(model).__name__} has no timm Attention layer, or was patched before; "
            "give a vision transformer whose blocks have one"
        )
    return handle
