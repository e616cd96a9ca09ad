"""Which device to compute on and in which precision, and why a GPU is not used."""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# What the towers compute in by --precision; None is the parameters' own float32.
AUTOCAST_DTYPES = {"fp32": None, "amp": torch.float16, "amp_bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: the GPU asked for, or one that is plainly there, cannot be used. A GPU whose
            driver is too old for the installed torch is an error, not a silent run on the CPU.
    """
    reason = cuda_unavailable_reason()
    if name == "auto":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
        if reason and driver_is_installed() and not hidden:
            raise ValueError(f"{reason}; to run on the CPU nevertheless: --device cpu")
        name = "cpu" if reason else "cuda"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and reason:
        raise ValueError(f"--device {name}: {reason}")
    if device.type == "cuda" and device.index is None:
        # set_device and comparisons want the number
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which towers run at a precision of `AUTOCAST_DTYPES`."""
    dtype = AUTOCAST_DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def has_bf16_product(device: torch.device) -> bool:
    """Whether the device itself multiplies bf16; where torch emulates it, float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # of torch versions that do not say it, no processor is known to
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def precision_flags(device: torch.device) -> list[str]:
    """Flags of `fastclip train`: float32 on a device without bf16; otherwise the recipe decides."""
    return [] if has_bf16_product(device) else ["--precision", "fp32"]


def cuda_unavailable_reason() -> str | None:
    """Why torch cannot use a GPU here, in torch's own words where it has some; None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f"torch {torch.__version__} (CUDA {torch.version.cuda}): {error}".split("\n")[0]
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU"


def driver_is_installed() -> bool:
    """Whether this machine has an NVIDIA driver, usable or not."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def available_cores() -> int:
    """The cores this process may run on: fewer than the machine has where it is bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """This process's share of the cores; torchrun and DeepSpeed's launcher set how many share."""
    counts = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    processes = next((int(value) for value in counts if value), 1)
    return max(1, available_cores() // processes)
