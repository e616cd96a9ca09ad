"""`fastclip info`: what is installed, what is used, and why."""

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from fastclip import __version__, native
from fastclip.device import cuda_unavailable_reason
from fastclip.integrations import apex
from fastclip.ops.backend import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, explain

PACKAGES = (
    *("torch", "triton", "open_clip_torch", "timm", "torchvision", "transformers", "deepspeed"),
    *("nvidia-dali-cuda130", "numpy", "pillow", "simplejpeg", "tyro"),
)


def main(arguments: Sequence[str]) -> int:
    """Print the report; takes no options."""
    if arguments:
        print("usage: fastclip info")
        return 0 if arguments[0] in ("-h", "--help") else 2
    print(f"fastclip {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    for package in PACKAGES:
        print(f"  {package:20} {_version(package)}")
    print("\ndevices")
    vectors = torch.backends.cpu.get_cpu_capability()
    print(f"  cpu       {torch.get_num_threads()} threads, {vectors}")
    devices = [torch.device("cpu")]
    reason = cuda_unavailable_reason()
    for index in range(0 if reason else torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"  cuda:{index}    {gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}")
        devices.append(torch.device("cuda", index))
    if reason:
        print(f"  cuda      not used: {reason}")
    print("\nnative library (FASTCLIP_NATIVE=off leaves it unused)")
    print(f"  cpu       {native.unavailable_reason() or _instructions()}")
    print(f"  cuda      {native.cuda_unavailable_reason() or 'built'}")
    print(f"\noperators ({ENVIRONMENT_VARIABLE} or backend= chooses another)")
    for operator in IMPLEMENTATIONS:
        for device in {device.type: device for device in devices}.values():
            for name, status, description in explain(operator, device, torch.float32):
                print(f"  {operator} on {device.type:5} {name:10} {status} ({description})")
    print("\nfused layer norm and optimizers (--layer-norm, --optimizer)")
    print(f"  apex      {apex.unavailable_reason() or 'available'}")
    print("\ndata (--data-backend chooses another)")
    for device in {device.type: device for device in devices}.values():
        print(f"  decoding and augmenting for {device.type:5} {_data_backend(device)}")
    return 0


def _data_backend(device: torch.device) -> str:
    try:
        from fastclip.train.training_data import choose_backend
    except ModuleNotFoundError as error:
        return f"none: {error.name} is not installed"
    return choose_backend("auto", device)


def _instructions() -> str:
    first, *others = native.library().usable_instructions()
    bf16 = "with" if native.has_bf16_product() else "without"
    return f"built; uses {first} of {', '.join((first, *others))}; {bf16} bf16 products"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
