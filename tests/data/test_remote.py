"""Remote shards: fetched once, shared, bounded, and what is done when fetching fails."""

import ast
import errno
import fcntl
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from fastclip.data import remote
from fastclip.data.options import DataOptions, DatasetType
from fastclip.data.remote import FetchError, ShardCache
from fastclip.data.samples import UnreadableSample
from fastclip.data.shards import ShardSource, expand_shards
from fastclip.data.sources import open_source
from fastclip.data.templates import DEFAULT_TEMPLATES
from fastclip.evaluate.zeroshot import classes_of
from tests.test_repo_shape import tracked

MakeShard = Callable[..., Path]


@pytest.fixture
def bucket(tmp_path: Path, make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three shards of four samples in fsspec's memory; returns their URL's beginning."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0)
    for i in range(3):
        shard = make_shard(f"{i}.tar", samples=4, first=4 * i)
        put(f"memory://bucket/{i}.tar", shard.read_bytes())
    return "memory://bucket/"


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


def cached(folder: Path) -> list[str]:
    return sorted(path.name[25:] for path in folder.glob("shards/*.tar"))


def left_in(folder: Path) -> list[str]:
    """The endings of all files in the cache but the locks."""
    return [p.suffix for p in folder.glob("shards/*") if not p.name.startswith(".lock")]


def test_remote_samples_are_the_local_ones(bucket: str, tmp_path: Path) -> None:
    put(bucket + "sizes.json", json.dumps({f"{i}.tar": 4 for i in range(3)}).encode())
    options = DataOptions(cache_dir=tmp_path / "cache")
    source = open_source(bucket + "{0..2}.tar", options, split="train")
    assert source.counts == (4, 4, 4)
    # counts were declared, so nothing is fetched before it is needed
    assert cached(tmp_path / "cache") == []
    local = ShardSource(f"{tmp_path}/{{0..2}}.tar")
    for shard in (2, 0):
        for i in range(4):
            a, b = source.read(shard, i), local.read(shard, i)
            assert (a.key, a.texts, a.image.tobytes()) == (b.key, b.texts, b.image.tobytes())
    assert cached(tmp_path / "cache") == ["0.tar", "2.tar"]
    # what was fetched is used again, by this run and the next
    MemoryFileSystem.store.pop("/bucket/0.tar")
    assert source.read(0, 1).key == "00001"
    again = ShardSource(bucket + "{0..2}.tar", cache=ShardCache(tmp_path / "cache"))
    assert again.read(0, 3).key == "00003"


def test_counts_come_from_either_file_or_one_scan(
    bucket: str, tmp_path: Path, logged: Callable[[], str]
) -> None:
    put(bucket + "sizes.json", b'{"0.tar": 3}')
    put(bucket + "1_stats.json", b'{"successes": 2}')
    pattern = f"{bucket}{{0..2}}.tar::{tmp_path}/1.tar"
    source = ShardSource(pattern, cache=ShardCache(tmp_path / "cache"))
    assert source.counts == (3, 2, 4, 4)
    assert cached(tmp_path / "cache") == ["2.tar"]
    assert "1 of 3 remote shards have no count" in logged()
    for damage in (b"{", b"[]", b'{"0.tar": "x"}', b"\xff"):
        put(bucket + "sizes.json", damage)
        with pytest.raises(ValueError, match=r"memory://bucket/sizes.json is damaged"):
            ShardSource(pattern, cache=ShardCache(tmp_path / "cache"))


def test_the_least_recently_used_makes_room(
    bucket: str, tmp_path: Path, logged: Callable[[], str]
) -> None:
    size = (tmp_path / "0.tar").stat().st_size
    folder = tmp_path / "cache"
    cache = ShardCache(folder, limit=2 * size)
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "mine.tar").write_bytes(b"x" * size)
    for used, i in enumerate((0, 1, 0, 2)):
        cache.open(f"{bucket}{i}.tar").close()
        # the clock of the file system may be coarser than this loop
        (path,) = folder.glob(f"shards/*-{i}.tar")
        os.utime(path, (used, used))
    assert path.stat().st_mtime == 3
    cache.open(bucket + "2.tar").close()
    assert path.stat().st_mtime > 3
    (folder / "shards" / "mine.tar").unlink()
    assert cached(folder) == ["0.tar", "2.tar"]
    # one that is larger than the limit is kept while it is in use
    tight = ShardCache(folder, limit=1)
    assert tight.open(bucket + "1.tar").read(1)
    assert cached(folder) == ["1.tar"]
    assert logged() == ""
    for i in (0, 1, 0):
        tight.open(f"{bucket}{i}.tar").close()
        assert cached(folder) == [f"{i}.tar"]
    assert logged().count("--cache-bytes 1 does not hold the shards in use") == 1


def test_other_files_are_never_deleted(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    mine = tmp_path / "cache" / "shards" / "mine.tar"
    mine.write_bytes(b"x" * 10_000)
    ShardCache(tmp_path / "cache", limit=1).open(bucket + "0.tar").close()
    assert mine.exists()


def test_a_download_that_was_killed_is_cleared_away(bucket: str, tmp_path: Path) -> None:
    """At once, and before any shard has to go; one in progress stays, whatever its age."""
    size = (tmp_path / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", limit=2 * size)
    cache.open(bucket + "0.tar").close()
    killed, going_on = (cache.folder / f".{'0' * 24}-a.tar.{name}.part" for name in "ab")
    killed.write_bytes(b"x" * size)
    going_on.touch()
    os.utime(going_on, (time.time() - 2 * 24 * 3600,) * 2)
    with going_on.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.open(bucket + "1.tar").close()
        assert not killed.exists() and going_on.exists()
    assert cached(tmp_path / "cache") == ["0.tar", "1.tar"]


def test_without_locks_an_old_download_is_one_that_was_killed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    old, new = (folder / f".{'0' * 24}-a.tar.{name}.part" for name in ("old", "new"))
    for path, age in ((old, 2 * 24 * 3600), (new, 60)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    ShardCache(tmp_path / "cache", limit=1).open(bucket + "0.tar").close()
    assert not old.exists() and new.exists()


def _fetch_slowly(url: str, folder: Path) -> None:
    def get_file(*arguments: object, **options: object) -> None:
        Path(str(arguments[2])).write_bytes(b"x" * 100)
        time.sleep(60)

    LocalFileSystem.get_file = get_file  # type: ignore[method-assign]
    _open_once(url, folder)


def test_a_download_in_another_process_stays_until_that_is_killed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # two shards may else have one lock
    monkeypatch.setattr(remote, "_LOCKS", 1 << 32)
    cache = ShardCache(tmp_path / "cache", limit=1)
    context = multiprocessing.get_context("fork")
    arguments = (f"file://{tmp_path}/0.tar", tmp_path / "cache")
    process = context.Process(target=_fetch_slowly, args=arguments)
    process.start()
    try:
        until = time.monotonic() + 30
        while not [p for p in tmp_path.glob("cache/shards/.*.part") if p.stat().st_size]:
            assert process.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        cache.open(bucket + "1.tar").close()
        assert sorted(left_in(tmp_path / "cache")) == [".part", ".tar"]
    finally:
        process.kill()
        process.join(30)
    cache.open(bucket + "2.tar").close()
    assert left_in(tmp_path / "cache") == [".tar"]


def test_a_shard_deleted_by_another_process_is_fetched_again(bucket: str, tmp_path: Path) -> None:
    source = ShardSource(bucket + "0.tar", cache=ShardCache(tmp_path / "cache"))
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    assert source.read(0, 2).key == "00002"


def failing(times: int, cut: bool = False) -> Callable[..., None]:
    """A get_file that fails so many times, or leaves half of the file."""
    working = MemoryFileSystem.get_file
    calls = [0]

    def get_file(self: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        calls[0] += 1
        if calls[0] > times:
            working(self, source, target, **options)
        elif cut:
            content = self.cat_file(source)
            Path(target).write_bytes(content[: len(content) // 2])
        else:
            raise RuntimeError("connection lost")

    get_file.calls = calls  # type: ignore[attr-defined]
    return get_file


@pytest.mark.parametrize("cut", [False, True])
def test_two_failures_are_overcome(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "get_file", failing(2, cut))
    source = ShardSource(bucket + "0.tar", cache=ShardCache(tmp_path / "cache"))
    assert source.counts == (4,)
    assert left_in(tmp_path / "cache") == [".tar"]


@pytest.mark.parametrize("cut, reason", [(False, "connection lost"), (True, "bytes arrived")])
def test_three_failures_are_not(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool, reason: str
) -> None:
    get_file = failing(1000, cut)
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    cache = ShardCache(tmp_path / "cache")
    with pytest.raises(
        FetchError, match=f"memory://bucket/0.tar could not .* 3 attempts: .*{reason}"
    ):
        ShardSource(bucket + "0.tar", cache=cache)
    # a shard that is lost during training is a fault of its samples, and is not asked for anew
    put(bucket + "sizes.json", b'{"1.tar": 4}')
    source = ShardSource(bucket + "1.tar", cache=cache)
    for i in range(4):
        with pytest.raises(UnreadableSample, match=r"shard not fetched: memory://bucket/1.tar"):
            source.read(0, i)
    assert get_file.calls == [6]  # type: ignore[attr-defined]
    assert left_in(tmp_path / "cache") == []


def test_what_is_not_there_or_cannot_be_reached(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"memory://bucket/7.tar does not exist"):
        ShardSource(bucket + "7.tar", cache=ShardCache(tmp_path / "cache"))
    for scheme in ("nosuch", "zip", "generic", "dir", "cached"):
        with pytest.raises(ValueError, match=f"{scheme}://b/(0.tar|sizes.json) cannot be read"):
            ShardSource(f"{scheme}://b/0.tar", cache=ShardCache(tmp_path / "cache"))


def _open_once(url: str, folder: Path) -> None:
    ShardCache(folder).open(url).close()


def test_processes_share_one_download(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    working = LocalFileSystem.get_file

    def get_file(self: LocalFileSystem, *arguments: str, **options: object) -> None:
        with log.open("a") as file:
            file.write("fetched\n")
        time.sleep(0.3)
        working(self, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "get_file", get_file)
    context = multiprocessing.get_context("fork")
    arguments = (f"file://{tmp_path}/0.tar", tmp_path / "cache")
    processes = [context.Process(target=_open_once, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "fetched\n"
    assert cached(tmp_path / "cache") == ["0.tar"]


def test_the_users_cache_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / "fastclip" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ShardCache().folder == Path.home() / ".cache" / "fastclip" / "shards"
    with pytest.raises(ValueError, match="--cache-bytes is 0"):
        DataOptions(cache_bytes=0)


def test_faults_name_the_url(bucket: str, tmp_path: Path) -> None:
    put(bucket + "x.tar", b"<html>" * 200)
    with pytest.raises(FetchError, match=r"memory://bucket/x.tar could .*: .* not a tar .*<html>"):
        ShardSource(bucket + "x.tar", cache=ShardCache(tmp_path / "cache"))
    # what is not a tar is not kept: the next run asks anew
    assert left_in(tmp_path / "cache") == []
    put(bucket + "x.tar", b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match=r"compressed shard: memory://bucket/x.tar"):
        ShardSource(bucket + "x.tar", cache=ShardCache(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_somebody_put_into_the_cache_is_not_read(
    bucket: str, tmp_path: Path, kind: str
) -> None:
    cache = ShardCache(tmp_path / "cache")
    cache.open(bucket + "0.tar").close()
    (path,) = (tmp_path / "cache" / "shards").glob("*.tar")
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "1.tar")
    else:
        path.mkdir()
    with pytest.raises(FetchError, match=r"0\.tar in the cache cannot be read .*; delete it"):
        ShardSource(bucket + "0.tar", cache=cache)


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch ran",
        "pipe:touch ran; cat {0..2}.tar",
        "pipe:cat a.csv",
        "0.tar::pipe:touch ran",
        "PIPE:touch ran",
        " pipe:touch ran",
        "exec:touch ran",
        "sh://touch ran",
        "|touch ran",
        "reference://ran",
    ],
)
@pytest.mark.parametrize("kind", ["auto", "webdataset", "csv"])
def test_commands_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DatasetType, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = DataOptions(kind, cache_dir=str(tmp_path))
    message = "runs none; name shards by URLs that fsspec reads.* or mount the storage"
    with pytest.raises(ValueError, match=message) as error:
        open_source(pattern, options, split="train")
    assert repr(pattern.rpartition("::")[2]) in str(error.value)
    with pytest.raises(ValueError, match=message):
        expand_shards(pattern)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_data_starts_a_program() -> None:
    for path in tracked("fastclip/data/*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
        }
        assert not imported & {"subprocess", "pty"}, path


def test_names_in_any_script_become_files(bucket: str, tmp_path: Path) -> None:
    url = "memory://bucket/" + "\u5199" * 120 + ".tar"
    put(url, (tmp_path / "0.tar").read_bytes())
    assert ShardSource(url, cache=ShardCache(tmp_path / "cache")).counts == (4,)


def test_class_names_are_read_beside_remote_shards(bucket: str) -> None:
    assert classes_of(bucket + "{0..2}.tar") is None
    put(bucket + "classes.txt", "\ufeffcat\r\n\nd\u00f6g\n".encode())
    assert classes_of(bucket + "{0..2}.tar") == (["cat", "d\u00f6g"], list(DEFAULT_TEMPLATES))
    put(bucket + "templates.txt", b"a {}\nthe {}")
    put(bucket + "classnames.txt", b"cup\nsofa\n")
    assert classes_of(bucket + "1.tar") == (["cup", "sofa"], ["a {}", "the {}"])
    put(bucket + "classnames.txt", b"cup\xff")
    with pytest.raises(ValueError, match=r"memory://bucket/classnames.txt is not UTF-8"):
        classes_of(bucket + "1.tar")


def test_small_files_are_asked_of_their_own_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Files:
        def cat(self, paths: list[str], on_error: str) -> dict[str, bytes]:
            return dict.fromkeys(paths, b"x")

    def filesystem(url: str) -> tuple[Files, str]:
        return Files(), "/" + url.split("/", 3)[3]

    monkeypatch.setattr(remote, "_filesystem", filesystem)
    urls = ["sftp://one/a/sizes.json", "sftp://two/a/sizes.json", "sftp://one/b/sizes.json"]
    # on two hosts the files have one path
    assert remote.read_small(urls) == dict.fromkeys(urls, b"x")
