"""Weights alone, as safetensors: tensors by name and a few texts, which cannot hold code."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

from torch import Tensor


def write_safetensors(
    file: IO[bytes], weights: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> None:
    """Write weights into an open file.

    Args:
        file: binary, see `fastclip.atomic.writing`.
        weights: a state dictionary, on any device.
        facts: texts that are kept beside them.
    """
    from safetensors.torch import save

    alone: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # the format has no two names for the same memory
        alone[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    file.write(save(alone, {"format": "pt", **(facts or {})}))


def read_facts(path: Path) -> dict[str, str]:
    """The texts that a file of safetensors has beside its weights.

    Raises:
        ValueError: it is damaged, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as content:
            return dict(content.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
