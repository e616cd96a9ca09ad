"""The implementation of the tiles by its name."""

import torch

from fastclip.ops.tiles.base import Tiles
from fastclip.ops.tiles.torch import TorchTiles


def tiles_of(backend: str, compute_dtype: torch.dtype, maxima: bool) -> Tiles:
    """A new instance of the implementation of that name.

    Without `maxima`, `max` of the statistics may be any anchor of about that size.
    """
    if backend == "triton":
        # triton is not everywhere
        from fastclip.ops.tiles.triton import TritonTiles

        return TritonTiles(compute_dtype, maxima)
    if backend == "cpp":
        # nor is the library
        from fastclip.ops.tiles.cpp import CppTiles

        return CppTiles(compute_dtype)
    if backend == "cuda":
        from fastclip.ops.tiles.cuda import CudaTiles

        return CudaTiles(compute_dtype, maxima)
    return TorchTiles(compute_dtype)
