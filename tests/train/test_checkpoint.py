"""Checkpoints: atomic, verified, and never a way to run code."""

import errno
import os
import pickle
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.models import checkpoint


def content(step: int) -> dict[str, Any]:
    return {"step": step, "state_dict": {"w": torch.full((100,), float(step))}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "a.pt", content(3))
    assert torch.equal(
        checkpoint.read(tmp_path / "a.pt")["state_dict"]["w"], torch.full((100,), 3.0)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pt"]


def test_the_highest_whole_step_is_latest(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) is None
    for step in (9, 10, 2):
        checkpoint.write(tmp_path / f"c{step}.pt", content(step))
    assert checkpoint.find_latest(tmp_path) == tmp_path / "c10.pt"


@pytest.mark.parametrize("damage", ["cut", "changed", "no manifest", "cut manifest"])
def test_torn_checkpoints_are_passed_over(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        checkpoint.write(tmp_path / f"c{step}.pt", content(step))
    path, manifest = tmp_path / "c2.pt", tmp_path / "c2.json"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    with pytest.warns(UserWarning, match=r"c2\.pt"):
        assert checkpoint.find_latest(tmp_path) == tmp_path / "c1.pt"


def test_a_full_disk_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    checkpoint.write(path, content(1))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(path, content(2))
    monkeypatch.undo()
    assert checkpoint.read(path)["step"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.find_latest(tmp_path) == path


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave the name with nothing behind it."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        done.append(("synced", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def named(source: Path, target: Path) -> None:
        done.append(("named", Path(source).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    checkpoint.write(tmp_path / "a.pt", content(1))
    partial = checkpoint.partial_of(tmp_path / "a.pt").name
    assert done.index(("synced", partial)) < done.index(("named", partial))


def test_another_size_is_reported_without_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path / "a.pt", content(1))
    with (tmp_path / "a.pt").open("ab") as file:
        file.write(b"x")

    def read(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(checkpoint, "describe", read)
    with pytest.raises(ValueError, match="does not match its manifest"):
        checkpoint.require_whole(tmp_path / "a.pt")


def test_a_write_that_the_system_refuses_keeps_the_previous_file(tmp_path: Path) -> None:
    """Through torch's own writer, which reports it in its own way."""
    path = tmp_path / "a.pt"
    checkpoint.write(path, content(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {**content(2), "state_dict": {"w": torch.zeros(100_000)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.write(path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read(path)["step"] == 1
    assert checkpoint.find_latest(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.pt"]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_a_malicious_file_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"state_dict": Malicious(target)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Malicious(target)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            checkpoint.read(tmp_path / name)
    assert not target.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pt does not exist"):
        checkpoint.read(tmp_path / "missing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "bare.pt")
    for name in ("list.pt", "bare.pt"):
        with pytest.raises(ValueError, match="no 'state_dict'"):
            checkpoint.read(tmp_path / name)


def test_forms_of_weights(tmp_path: Path) -> None:
    """Under state_dict or bare, with the prefix of data-parallel training; averaged on request."""
    path, ones = tmp_path / "c.pt", torch.ones(1)
    for content in ({"state_dict": {"module.a.module.b": ones}}, {"module.a.module.b": ones}):
        torch.save(content, path)
        assert list(checkpoint.read_weights(path)) == ["a.module.b"]
    for content in ([ones], {"a": ones, "b": 1}, {"state_dict": {"a": ones, "b": "text"}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="holds no state dictionary"):
            checkpoint.read_weights(path)
    torch.save({"state_dict": {"a": ones}}, path)
    with pytest.raises(ValueError, match="its run had no --ema"):
        checkpoint.read_weights(path, average=True)
    torch.save({"state_dict": {"a": ones}, checkpoint.AVERAGE: {"a": 2 * ones}}, path)
    assert [checkpoint.read_weights(path, average=a)["a"].item() for a in (False, True)] == [1, 2]
    assert checkpoint.AVERAGE == "state_dict_ema"


@pytest.mark.parametrize("damage", ["weights", "manifest", "length"])
def test_what_differs_from_its_manifest_is_refused_by_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    checkpoint.write(path, content(1))
    if damage == "manifest":
        manifest = tmp_path / "c.json"
        manifest.write_text(manifest.read_text().replace('"sha256"', '"shb256"'))
    else:
        data = bytearray(path.read_bytes())
        place = data.index(torch.ones(1).numpy().tobytes() * 4)
        data[place + 3] ^= 0x40
        path.write_bytes(data + (b"x" if damage == "length" else b""))
    for reader in (checkpoint.read, checkpoint.read_weights):
        with pytest.raises(ValueError, match=r"c\.pt does not match its manifest"):
            reader(path)


def test_a_models_config_beside_weights_vouches_for_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "c.pt")
    (tmp_path / "c.json").write_text('{"embed_dim": 8}')
    assert checkpoint.read_weights(tmp_path / "c.pt")["w"] == 1


def test_a_file_names_no_folder_to_unpickle(tmp_path: Path) -> None:
    torch.save({**content(1), "zero": {}, "folder": str(tmp_path)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="give the folder itself"):
        checkpoint.read(tmp_path / "c.pt")
