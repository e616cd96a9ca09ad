"""fastclip: exact, memory-linear contrastive image-text training.

Public names are imported on first use, so `import fastclip` needs torch and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastclip._version import __version__

if TYPE_CHECKING:
    from fastclip import functional as functional
    from fastclip.integrations.open_clip import patch_open_clip as patch_open_clip
    from fastclip.integrations.sentence_transformers import (
        patch_sentence_transformers as patch_sentence_transformers,
    )
    from fastclip.integrations.timm import patch_timm as patch_timm
    from fastclip.integrations.transformers import patch_transformers as patch_transformers
    from fastclip.losses.clip import ClipLoss as ClipLoss
    from fastclip.losses.clip import CoCaLoss as CoCaLoss
    from fastclip.losses.clip import DistillClipLoss as DistillClipLoss
    from fastclip.losses.global_contrastive import GlobalContrastiveLoss as GlobalContrastiveLoss
    from fastclip.losses.info_nce import InfoNCELoss as InfoNCELoss
    from fastclip.losses.mp_nce import MPNCELoss as MPNCELoss
    from fastclip.losses.nt_xent import NTXentLoss as NTXentLoss
    from fastclip.losses.siglip import SigLipLoss as SigLipLoss
    from fastclip.losses.sup_con import SupConLoss as SupConLoss
    from fastclip.models.build import load as load

_LAZY = {
    "ClipLoss": "fastclip.losses.clip",
    "CoCaLoss": "fastclip.losses.clip",
    "DistillClipLoss": "fastclip.losses.clip",
    "GlobalContrastiveLoss": "fastclip.losses.global_contrastive",
    "InfoNCELoss": "fastclip.losses.info_nce",
    "MPNCELoss": "fastclip.losses.mp_nce",
    "NTXentLoss": "fastclip.losses.nt_xent",
    "SigLipLoss": "fastclip.losses.siglip",
    "SupConLoss": "fastclip.losses.sup_con",
    "functional": "fastclip",
    "load": "fastclip.models.build",
    "patch_open_clip": "fastclip.integrations.open_clip",
    "patch_sentence_transformers": "fastclip.integrations.sentence_transformers",
    "patch_timm": "fastclip.integrations.timm",
    "patch_transformers": "fastclip.integrations.transformers",
}

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "GlobalContrastiveLoss",
    "InfoNCELoss",
    "MPNCELoss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
    "__version__",
    "functional",
    "load",
    "patch_open_clip",
    "patch_sentence_transformers",
    "patch_timm",
    "patch_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastclip' has no attribute {name!r}")
    if _LAZY[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__name__):
            raise
        # losses need torch alone; this is somebody who has that and wants a model
        raise ModuleNotFoundError(
            f"fastclip.{name} needs the package {error.name!r}, which is not installed: "
            "pip install 'fastclip-kernels[train]'",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
