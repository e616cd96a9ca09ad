"""torch's distributed checkpoints: read as they were written, and nothing in them runs."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from fastclip.models import checkpoint, distributed_checkpoint, sharded
from tests.models.test_sharded import Malicious

STATE = {
    "model.scale": torch.tensor(2.0),
    "model.weight": torch.arange(12.0).view(4, 3),
    "average.weight": torch.zeros(4, 3),
}
BUFFERS = {"running": torch.ones(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one process, without a manifest."""
    path = tmp_path / "step_00000003"
    path.mkdir()
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(STATE, storage_writer=distributed_checkpoint._Writer(path), no_dist=True)
    own = {"averaged": False, "buffers": BUFFERS}
    torch.save({"step": 3, "fsdp": own}, path / sharded.TRAINING)
    return path


def describe_anew(folder: Path, change: Any) -> None:
    """Change the description, as whoever wants something else to be read would."""
    file = folder / sharded.METADATA
    described = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(described) or described))


def test_weights_are_read_whole_and_without_trust(folder: Path) -> None:
    assert {p.name for p in distributed_checkpoint.files_of(folder, 0)} == {
        "__0_0.distcp",
        ".metadata",
    }
    # neither the folder's path nor a random number
    assert str(folder.parent).encode() not in (folder / sharded.METADATA).read_bytes()
    weights = checkpoint.read_weights(folder)
    assert weights.keys() == {"scale", "weight", "running"}
    assert torch.equal(weights["weight"], STATE["model.weight"])
    into = {"model.weight": torch.zeros(4, 3)}
    # in this process alone, as the whole is
    distributed_checkpoint.load(folder, into)
    assert torch.equal(into["model.weight"], STATE["model.weight"])
    with pytest.raises(ValueError, match="holds no averaged weights"):
        checkpoint.read_weights(folder, average=True)


def test_a_description_runs_nothing(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    describe_anew(folder, lambda described: Malicious(ran))
    with pytest.raises(ValueError, match=r"it asks for pathlib\S*\.Path"):
        checkpoint.read_weights(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (BytesStorageMetadata(), r"it asks for torch\.\S+\.BytesStorageMetadata"),
        (None, "describes other things than tensors"),
    ],
)
def test_what_torch_would_unpickle_is_refused(
    folder: Path, tmp_path: Path, entry: Any, message: str
) -> None:
    def change(described: Any) -> None:
        described.state_dict_metadata["model.weight"] = entry

    ran = tmp_path / "ran"
    torch.save(Malicious(ran), folder / "__0_0.distcp")
    describe_anew(folder, change)
    with pytest.raises(ValueError, match=message):
        checkpoint.read_weights(folder)
    with pytest.raises(ValueError, match=message):
        distributed_checkpoint.load(folder, {"model.weight": torch.zeros(4, 3)})
    # and if it were let through
    with pytest.raises(ValueError, match=r"model\.weight is not a tensor"):
        distributed_checkpoint._TensorsOnly().load_bytes(Item(), None)
    assert not ran.exists()


class Item:
    """Of a plan to read."""

    class dest_index:
        fqn = "model.weight"


def test_files_outside_of_the_folder_are_refused(folder: Path) -> None:
    def change(described: Any) -> None:
        for place in described.storage_data.values():
            place.relative_path = f"../{place.relative_path}"

    describe_anew(folder, change)
    with pytest.raises(ValueError, match="names files outside of its folder"):
        checkpoint.read_weights(folder)


def test_damaged_ones_are_reported(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read: rank 0: .*Missing key.*model\.other"):
        distributed_checkpoint.load(folder, {"model.other": torch.zeros(1)})
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read: rank 0"):
        checkpoint.read_weights(folder)
    (folder / sharded.METADATA).write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        checkpoint.read_weights(folder)


def test_no_folder_is_trusted_by_half(folder: Path) -> None:
    """One that is not DeepSpeed's by its files must not be so by its content."""
    checkpoint.require_trust(folder, trust=False)
    torch.save({"step": 3, "zero": {}}, folder / sharded.TRAINING)
    with pytest.raises(ValueError, match="mixes files of DeepSpeed and of FSDP2"):
        checkpoint.read(folder)
    torch.save({"step": 3, "fsdp": {}}, folder / sharded.TRAINING)
    (folder / sharded.METADATA).unlink()
    with pytest.raises(ValueError, match="mixes files of DeepSpeed and of FSDP2"):
        checkpoint.read(folder)
