"""Which implementation of an operator runs, and why a faster one does not."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastclip import native
from fastclip.ops.compiling import constant_in_graphs

ENVIRONMENT_VARIABLE = "FASTCLIP_BACKEND"


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator.

    `unavailable_reason(device, dtype)` is None where it can run, else in one phrase.
    `automatic(device)` is False where "auto" does not pick it.
    """

    name: str
    description: str
    unavailable_reason: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: (
        None
    )
    automatic: Callable[[torch.device], bool] = lambda device: True


@functools.cache
def _is_installed(module: str) -> bool:
    # the search takes longer than a launch
    return importlib.util.find_spec(module) is not None


@functools.cache
def _build_reason() -> str | None:
    """Why Triton cannot build its launcher here, which it does at the first call."""
    compilers = (os.environ["CC"],) if "CC" in os.environ else ("cc", "gcc", "clang")
    if not any(map(shutil.which, compilers)):
        return "Triton builds its launcher with a C compiler: install gcc or clang, or set CC"
    scheme = sysconfig.get_default_scheme()
    # as Triton does where Debian has a scheme of its own
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"])
    if not (headers / "Python.h").is_file():
        return f"Triton's launcher needs Python.h, which {headers} lacks: install python3-dev"
    return None


def _triton_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _is_installed("triton"):
        return "triton is not installed (torch brings it on Linux with CUDA)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it runs on CUDA devices, the features are on {device.type}"
    reason = _gpu_unavailable_reason(device, dtype)
    return reason or (None if interpreted else _build_reason() or _old_triton(device))


@functools.cache
def _old_triton(device: torch.device) -> str | None:
    """Why an older Triton does not serve a B200; by what `compile_report --triton` found."""
    if torch.cuda.get_device_capability(device)[0] != 10:
        return None
    # not by the distribution, which has other names elsewhere
    from triton import __version__ as installed

    if tuple(int(number) for number in installed.split(".")[:2]) >= (3, 8):
        return None
    return (
        f"Triton {installed} cannot compile its kernels for this GPU, 3.8 can: update torch to 2.14"
    )


def _cuda_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not native.cuda_is_emulated():
        return f"it runs on CUDA devices, the features are on {device.type}"
    return _gpu_unavailable_reason(device, dtype) or native.cuda_unavailable_reason()


def _gpu_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or newer"
    if dtype == torch.float64:
        return "float64 gains nothing from fusion"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    return None


def _cpp_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, the features are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    return native.unavailable_reason()


def _flash_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _is_installed("flash_attn"):
        return "flash-attn is not installed"
    if device.type != "cuda":
        return f"it runs on CUDA devices, the inputs are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    return None


_FUSED = (
    Implementation(
        "triton",
        "fused into the product's epilogue, S never in memory",
        _triton_unavailable_reason,
        # elsewhere it is the interpreter
        automatic=lambda device: device.type == "cuda",
    ),
    Implementation("cpp", "torch's products, each swept once in cache", _cpp_unavailable_reason),
    Implementation(
        "cuda",
        "cuBLAS's products, each swept once",
        _cuda_unavailable_reason,
        # elsewhere it is the emulation
        automatic=lambda device: device.type == "cuda",
    ),
    Implementation("torch", "chunked, memory-linear, any device torch runs on"),
    Implementation(
        "reference", "dense, any dtype, twice differentiable", automatic=lambda device: False
    ),
)

_ATTENTION = (
    Implementation(
        "sdpa", "torch's scaled_dot_product_attention; auto, but where ours was measured faster"
    ),
    Implementation(
        "triton",
        "short sequences whole on chip, any layout read in place",
        _triton_unavailable_reason,
        automatic=lambda device: False,
    ),
    Implementation(
        "flash", "the flash-attn package", _flash_unavailable_reason, automatic=lambda device: False
    ),
    Implementation(
        "reference", "dense, any dtype, twice differentiable", automatic=lambda device: False
    ),
)

# In order of preference: "auto" takes the first automatic one that is available. `cuda` stands
# behind `triton` until a measurement shows an operator for which it should be before it.
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "similarity": _FUSED,
    "symmetric": _FUSED,
    "sigmoid": _FUSED,
    "distillation": _FUSED[-2:],
    "attention": _ATTENTION,
}


def environment_backend() -> str:
    """What FASTCLIP_BACKEND asks for; "auto" where it is not set, or empty."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


@constant_in_graphs  # a graph is compiled for what is chosen when it is traced
def choose(operator: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation to run.

    Args:
        operator: a key of `IMPLEMENTATIONS`.
        requested: "auto" or an implementation's name; "auto" defers to the environment variable
            FASTCLIP_BACKEND where that is set.
        device, dtype: those of the features.

    Raises:
        ValueError: the implementation is unknown or cannot run on this device and dtype.
    """
    wanted = requested
    candidates = IMPLEMENTATIONS[operator]
    if wanted == "auto":
        wanted = environment_backend()
        elsewhere = {i.name for rows in IMPLEMENTATIONS.values() for i in rows}
        if wanted in elsewhere - {i.name for i in candidates}:
            # the variable is for all operators, and some have fewer implementations
            wanted = "auto"
    if wanted == "auto":
        return next(
            i.name
            for i in candidates
            if i.automatic(device) and not i.unavailable_reason(device, dtype)
        )
    for implementation in candidates:
        if implementation.name == wanted:
            reason = implementation.unavailable_reason(device, dtype)
            if reason:
                raise ValueError(f"backend {wanted!r} cannot run {operator} here: {reason}")
            return wanted
    raise _unknown(operator, wanted)


def check_backend(requested: str, operator: str = "similarity") -> None:
    """Refuse a name that no implementation has; whether one can run is found out at the call.

    Raises:
        ValueError: as above.
    """
    if requested not in ("auto", *(i.name for i in IMPLEMENTATIONS[operator])):
        raise _unknown(operator, requested)


def _unknown(operator: str, name: str) -> ValueError:
    known = ", ".join(repr(i.name) for i in IMPLEMENTATIONS[operator])
    return ValueError(f"backend {name!r} of {operator} is unknown; use 'auto' or one of {known}")


def unavailable_reason(
    operator: str, name: str, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why an implementation cannot run, or None."""
    (found,) = (i for i in IMPLEMENTATIONS[operator] if i.name == name)
    return found.unavailable_reason(device, dtype)


def explain(operator: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """(name, status, description) of every implementation; the one "auto" picks is "used"."""
    chosen = choose(operator, "auto", device, dtype)
    rows = []
    for implementation in IMPLEMENTATIONS[operator]:
        reason = implementation.unavailable_reason(device, dtype)
        if implementation.name == chosen:
            status = "used"
        elif reason:
            status = f"not available: {reason}"
        elif implementation.automatic(device):
            status = f"available, {chosen} is preferred"
        else:
            status = "on request"
        rows.append((implementation.name, status, implementation.description))
    return rows
