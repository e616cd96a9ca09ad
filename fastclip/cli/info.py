"""`fastclip info`: what is installed, what is used, and why."""

import importlib.metadata
import platform
from collections.abc import Iterable, Sequence

import torch

from fastclip import __version__, native
from fastclip.device import cuda_unavailable_reason
from fastclip.integrations import apex
from fastclip.messages import counted, filled
from fastclip.ops.backend import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, choose, explain

PACKAGES = (
    *("torch", "triton", "open_clip_torch", "timm", "torchvision", "transformers", "deepspeed"),
    *("nvidia-dali-cuda130", "numpy", "pillow", "simplejpeg", "tyro"),
)

_TEXT_COLUMN = 23


def main(arguments: Sequence[str]) -> int:
    """Print the report; takes no options."""
    if arguments:
        print(
            "usage: fastclip info\n\nPrint versions, devices, and what each operator uses and why."
        )
        return 0 if arguments[0] in ("-h", "--help") else 2
    devices = [torch.device("cpu")]
    reason = cuda_unavailable_reason()
    gpus = range(0 if reason else torch.cuda.device_count())
    if gpus:
        devices.insert(0, torch.device("cuda", 0))
    used = [choose("similarity", "auto", device, torch.float32) for device in devices]
    names = [f"{name} ({device.type})" for name, device in zip(used, devices, strict=True)]
    print(f"losses on this machine use: {', '.join(names) if gpus else used[0]}")
    print(f"fastclip {__version__}, Python {platform.python_version()}, {platform.platform()}")
    _section("packages", ((package, _version(package)) for package in PACKAGES))
    vectors = torch.backends.cpu.get_cpu_capability()
    listed = [("cpu", f"{counted(torch.get_num_threads(), 'thread')}, {vectors}")]
    for index in gpus:
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        listed.append((f"cuda:{index}", f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}"))
    if reason:
        listed.append(("cuda", f"not used: {reason}"))
    _section("devices", listed)
    library = [("cpu", native.unavailable_reason() or _instructions())]
    library.append(("cuda", native.cuda_unavailable_reason() or "built"))
    _section("native library (FASTCLIP_NATIVE=off leaves it unused)", library)
    for device in devices:
        print(f"\noperators on {device.type} ({ENVIRONMENT_VARIABLE} or backend= chooses another)")
        # several operators have the same implementations for the same reasons
        alike: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
        for operator in IMPLEMENTATIONS:
            alike.setdefault(tuple(explain(operator, device, torch.float32)), []).append(operator)
        for rows, operators in alike.items():
            print(f"  {', '.join(operators)}")
            for name, status, description in rows:
                _entry(f"    {name}", f"{status} ({description})")
    apex_reason = apex.unavailable_reason() or "available"
    _section("fused layer norm and optimizers (--layer-norm, --optimizer)", [("apex", apex_reason)])
    loading = [(f"for {device.type}", _data_backend(device)) for device in devices]
    _section("decoding and augmenting (--data-backend chooses another)", loading)
    return 0


def _section(title: str, entries: Iterable[tuple[str, str]]) -> None:
    print(f"\n{title}")
    for name, text in entries:
        _entry(f"  {name}", text)


def _entry(name: str, text: str) -> None:
    """A name and what is said of it, which begins in the same column everywhere."""
    print(filled(f"{name:{_TEXT_COLUMN}}", text, _TEXT_COLUMN))


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
