"""Writing never goes through a link that lay there before."""

from pathlib import Path

import pytest

from fastclip.atomic import partial_of, write_text
from fastclip.data.remote import ShardCache
from fastclip.evaluate.embed import Embedding
from fastclip.models import checkpoint
from tests.conftest import jpeg, write_tar


def test_texts_and_checkpoints(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("a.txt", "b.pt", "b.json"):
        partial_of(tmp_path / name).symlink_to(precious)
    write_text(tmp_path / "a.txt", "new")
    checkpoint.write(tmp_path / "b.pt", {"step": 1, "state_dict": {}})
    assert precious.read_text() == "kept"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not any((tmp_path / name).is_symlink() for name in ("a.txt", "b.pt", "b.json"))
    assert checkpoint.find_latest(tmp_path) == tmp_path / "b.pt"


def test_features(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    work = Embedding(tmp_path / "a.npy", 1, {})
    work.partial.symlink_to(precious)
    with pytest.raises(ValueError, match="is a link"):
        work.run(lambda start: iter(()), progress=False)
    assert precious.read_text() == "kept"


def test_locks_and_the_cache_folder(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg())])
    precious = tmp_path / "precious"
    precious.write_text("kept")
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    cache.open(f"file://{source}").close()
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for file in list(cache.folder.iterdir()):
        file.unlink()
        if file.name.startswith(".lock"):
            file.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        cache.open(f"file://{source}")
    assert precious.read_text() == "kept"
