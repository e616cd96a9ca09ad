"""apex's fused layer norm and optimizers, where apex is installed.

Known by `from apex.normalization import FusedLayerNorm`: the package that is called apex on PyPI is
another project.
"""

import importlib.util
from typing import Any

from torch import Tensor, nn

from fastclip.integrations.patch import PatchHandle, forward_owner, replace_forward

# classes whose `forward` is a layer norm of the last dimensions; others permute, or add to it
_KNOWN = {
    ("torch.nn.modules.normalization", "LayerNorm"),
    ("open_clip.transformer", "LayerNorm"),
    ("open_clip.transformer", "LayerNormFp32"),
    ("timm.layers.norm", "LayerNorm"),
    ("timm.layers.norm", "LayerNormFp32"),
}
_HOW = "build it from https://github.com/NVIDIA/apex with --cpp_ext --cuda_ext on the GPU machine"


def unavailable_reason() -> str | None:
    """Why apex cannot be used here, in one phrase; None where it can."""
    try:
        from apex.normalization import FusedLayerNorm  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "apex":
            return f"apex lacks {error.name}"
        if importlib.util.find_spec("apex") is not None:
            return f"the apex that is installed is not NVIDIA's; {_HOW}"
        return f"NVIDIA's apex is not installed; {_HOW}"
    except ImportError as error:
        return f"apex does not import: {error}; {_HOW}"
    return None


def optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> Any:
    """apex's optimizer of that name ("FusedAdam", "FusedLAMB").

    Raises:
        ValueError: apex is not there.
    """
    _demand(f"--optimizer for apex's {name}")
    from apex import optimizers

    return getattr(optimizers, name)(groups, **options)


def replace_layer_norms(model: nn.Module, handle: PatchHandle) -> int:
    """Compute every affine LayerNorm by apex's kernel; weights stay as they are.

    Left alone are subclasses with another `forward`, such as timm's for images (LayerNorm2d).

    Raises:
        ValueError: apex is not there.
    """
    _demand("--layer-norm apex")
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    def forward(self: nn.LayerNorm, tokens: Tensor) -> Tensor:
        # open_clip's layers cast their result back, apex's kernel wants one dtype
        normed = fused_layer_norm_affine(
            tokens.to(self.weight.dtype), self.weight, self.bias, self.normalized_shape, self.eps
        )
        return normed.to(tokens.dtype)

    return sum(
        replace_forward(module, forward, handle)
        for module in list(model.modules())
        if isinstance(module, nn.LayerNorm)
        and _is_known(module)
        and module.elementwise_affine
        and module.bias is not None
    )


def _is_known(module: nn.Module) -> bool:
    owner = forward_owner(module)
    return (owner.__module__, owner.__qualname__) in _KNOWN


def _demand(what: str) -> None:
    reason = unavailable_reason()
    if reason:
        raise ValueError(f"{what}: {reason}")
