"""torch's distributed checkpoints, of training with FSDP2: read without running code.

The format is that of `torch.distributed.checkpoint`: each rank's file has its rows of the tensors,
and `.metadata`, a pickle, says which rows are where. torch unpickles whatever stands there; here it
may name the classes of the format alone, and tensors alone are read.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from fastclip.models.sharded import METADATA

MODEL, AVERAGE, OPTIMIZER = "model.", "average.", "optimizer."
"""Before the names of parameters."""

_FORMAT = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_FORMAT, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_FORMAT, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
    *((_FORMAT, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64")),
}


def save(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors, sharded or whole, into a folder; called on all ranks.

    Raises:
        OSError: some rank could not write; raised on all.
    """
    try:
        dcp.save(state, storage_writer=_Writer(path))
    except CheckpointException as error:
        raise OSError(failures(error)) from error


def files_of(path: Path, rank: int) -> list[Path]:
    """The files that `save` wrote on this rank."""
    own = sorted(path.glob(f"__{rank}_*"))
    return [*own, path / METADATA] if rank == 0 else own


def load(path: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors, sharded or whole, by their names; called on all ranks where there are several.

    Args:
        path: the folder.
        into: by the names that the checkpoint has, in its shapes.

    Raises:
        ValueError: the folder is damaged, holds other things than tensors, or lacks some of them.
    """
    _read(path, into)


def export(path: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin so, on the CPU, under what follows in their names.

    Raises:
        ValueError: the folder is damaged, or holds other things than tensors.
    """
    described = _Reader(path).read_metadata().state_dict_metadata
    found: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    _read(path, found, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def failures(error: CheckpointException) -> str:
    """What went wrong, by rank."""
    return "; ".join(
        f"rank {rank}: {type(problem).__name__}: {problem}"
        for rank, (problem, _) in sorted(error.failures.items())
    )


def _read(path: Path, into: dict[str, Tensor], **how: bool) -> None:
    try:
        with warnings.catch_warnings():
            # that one process is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(into, storage_reader=_Reader(path), planner=_TensorsOnly(), **how)
    except CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {failures(error)}") from error


class _Writer(dcp.FileSystemWriter):
    """torch's, with a description that repeats: without the folder's path and a random number."""

    def storage_meta(self) -> None:
        return None


class _Reader(dcp.FileSystemReader):
    """torch's, with a description that may hold nothing but the format's own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / METADATA
        try:
            with file.open("rb") as stream:
                found = _Unpickler(stream).load()
            entries = found.state_dict_metadata.values()
            places = [place.relative_path for place in found.storage_data.values()]
        except FileNotFoundError:
            raise
        # pickle raises many kinds of errors on damaged input
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise ValueError(f"{file} describes other things than tensors; it is not of fastclip")
        if any(Path(place).name != place for place in places):
            raise ValueError(f"{file} names files outside of its folder; it is not of fastclip")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise ValueError(f"it asks for {module}.{name}, which no checkpoint of fastclip does")
        return super().find_class(module, name)


class _TensorsOnly(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        # torch unpickles these
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")
