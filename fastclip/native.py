"""The native library `fastclip._native` (from `csrc/`): loaded once, refused where it does not fit.

It is optional. `FASTCLIP_NATIVE=off` leaves an existing one unused, as it leaves it unbuilt.
"""

import ctypes
import functools
import importlib
import importlib.machinery
import os
from pathlib import Path
from typing import Any

import torch

from fastclip._version import __version__

ABI = 8
"""csrc/include/fastclip/epilogues.h has the same number."""
HOW_TO_BUILD_CUDA = "install nvcc 12.8 or newer, or set CUDACXX"
HOW_TO_BUILD = "pip install again with a C++ compiler (gcc 11 or clang 14, or newer)"


class Unusable(Exception):
    """Why there is no native library."""


@functools.cache
def _load() -> Any:
    """The module, or why there is none."""
    if os.environ.get("FASTCLIP_NATIVE") == "off":
        return Unusable("FASTCLIP_NATIVE is off")
    try:
        found = importlib.import_module("fastclip._native")
    except ImportError as error:
        return Unusable(_missing(error))
    built = getattr(found, "VERSION", "?"), getattr(found, "ABI", "?")
    if built != (__version__, ABI):
        return Unusable(
            f"it is of fastclip {built[0]}, interface {built[1]}; this is {__version__}, "
            f"interface {ABI}: {HOW_TO_BUILD}"
        )
    found.use_team(team())
    return found


def _missing(error: ImportError) -> str:
    ours = importlib.machinery.EXTENSION_SUFFIXES
    reason = _recorded("_native_missing.txt")
    if reason:
        return f"it is not built: {reason}; then install fastclip again"
    found = Path(__file__).parent.glob("_native*")
    files = [path.name for path in found if path.is_file() and path.suffix != ".txt"]
    if not files:
        return f"it is not built: {HOW_TO_BUILD}"
    if not any(f"_native{suffix}" in files for suffix in ours):
        return f"{files[0]} is of another Python, this one takes _native{ours[0]}: {HOW_TO_BUILD}"
    return f"it does not load ({error}): {HOW_TO_BUILD}"


def _recorded(name: str) -> str | None:
    """The reason that the build left in the package folder, if it left one."""
    path = Path(__file__).parent / name
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def team() -> int:
    """The address of GOMP_parallel in torch's own OpenMP runtime, or 0.

    Its threads spin for milliseconds after each product. On their processors ours would wait.
    """
    return _in_torch("GOMP_parallel")


@functools.cache
def has_float_product() -> bool:
    """Whether the library is there and multiplies float32, by the BLAS in torch's own library."""
    return unavailable_reason() is None and library().use_blas(_in_torch("sgemm_"))


def _in_torch(function: str) -> int:
    """The address of a function in torch's library or what it links to; 0 where it is not."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # what is loaded already, and what it links to
        runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        return ctypes.cast(getattr(runtime, function), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def unavailable_reason() -> str | None:
    """Why the library cannot be used, in one phrase, or None."""
    found = _load()
    return str(found) if isinstance(found, Unusable) else None


def library() -> Any:
    """The module.

    Raises:
        Unusable: there is none that fits.
    """
    found = _load()
    if isinstance(found, Unusable):
        raise found
    return found


def cuda_unavailable_reason() -> str | None:
    """Why the library's CUDA part cannot be used, in one phrase, or None."""
    reason = unavailable_reason()
    if reason:
        return reason
    if not hasattr(library(), "cuda"):
        reason = _recorded("_native_cuda_missing.txt") or HOW_TO_BUILD_CUDA
        return f"the library has no CUDA part: {reason}; then install fastclip again"
    driver = library().cuda.driver_unavailable_reason()
    return f"its CUDA part is built, but: {driver}" if driver else None


def cuda_is_emulated() -> bool:
    """Whether the CUDA part is the tests', whose kernels run on the CPU."""
    return unavailable_reason() is None and hasattr(library(), "cuda") and library().cuda.EMULATED


@functools.cache
def has_bf16_product() -> bool:
    """Whether the library is there and the processor has bf16 products that return float32."""
    return unavailable_reason() is None and library().has_bf16_product()
