"""Remote shards: fetched whole to a bounded folder that several processes share."""

import fcntl
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastclip.data import http
from fastclip.data.index import index_file
from fastclip.data.options import CACHE_BYTES
from fastclip.data.regular import open_regular
from fastclip.messages import logger

ATTEMPTS = 3
PAUSE_SECONDS = 1.0
# A shard that could not be fetched is not asked for again before this time has passed.
GIVE_UP_SECONDS = 60.0
# Of sizes.json and _stats.json: most bytes, and how many are asked for at a time.
SMALL_BYTES = 16 << 20
SMALL_AT_ONCE = 16
THRASHING_SECONDS = 60.0

_LOCKS = 64
# Where there are no locks: a download that has not grown for so long is given up.
_STALE_SECONDS = 24 * 3600
# Only files of this form are ever deleted, whatever else lies in the folder.
_CACHED = re.compile(r"[0-9a-f]{24}-|\.[0-9a-f]{24}-.*\.part$")


class FetchError(OSError):
    """A remote shard could not be fetched; the message names its URL."""


class ShardCache:
    """Local copies of remote files, the least recently used deleted when room is needed.

    Args:
        folder: made if needed; `shards` in it holds the copies. None for fastclip's folder in
            $XDG_CACHE_HOME or ~/.cache.
        limit: most bytes kept. A file in use is kept even where it is larger, and downloads in
            progress come on top.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = CACHE_BYTES) -> None:
        base = Path(folder).expanduser() if folder else _user_cache()
        self.folder = base / "shards"
        self.limit = limit
        self._in_use: Path | None = None
        self._failures: dict[str, tuple[float, str]] = {}
        self._fetched: dict[str, float] = {}
        self._warned = False

    def open(self, url: str) -> BinaryIO:
        """The file behind `url`, fetched if it is not here; good for as long as it is open.

        Raises:
            FetchError: it could not be fetched in three attempts.
        """
        path = self._path(url)
        self._in_use = path
        return self._opened(path) or self._fetch(url, path)

    def _opened(self, path: Path) -> BinaryIO | None:
        try:
            # a link or a pipe in a shared folder is somebody else's
            file = open_regular(path, follow=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FetchError(f"{path} in the cache cannot be read ({error}); delete it") from error
        # the time of last use; an open file stays readable even if it is deleted now
        with suppress(OSError):
            os.utime(path)
        return file

    def _path(self, url: str) -> Path:
        digest = hashlib.sha256(url.encode()).hexdigest()[:24]
        name = re.sub(r"[^\w.-]", "_", file_name(url), flags=re.ASCII)[-100:]
        return self.folder / f"{digest}-{name}"

    def _fetch(self, url: str, path: Path) -> BinaryIO:
        when, message = self._failures.get(url, (-math.inf, ""))
        if time.monotonic() - when < GIVE_UP_SECONDS:
            raise FetchError(message)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(path):
            # another process may have fetched it while this one waited
            if file := self._opened(path):
                return file
            self._warn_of_thrashing(url)
            try:
                return self._download(url, path)
            except FetchError as failure:
                self._failures[url] = (time.monotonic(), str(failure))
                raise

    def _warn_of_thrashing(self, url: str) -> None:
        now = time.monotonic()
        if now - self._fetched.get(url, -math.inf) < THRASHING_SECONDS and not self._warned:
            self._warned = True
            # on whichever rank: each has a cache and shards of its own
            logger.warning(
                f"note: {url} is fetched again so soon; --cache-bytes {self.limit} does not hold "
                "the shards in use at a time: raise it, or lower --shuffle-window"
            )
        self._fetched[url] = now

    def _download(self, url: str, path: Path) -> BinaryIO:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                with self._partial(path) as partial:
                    self._copy(url, partial)
                    # opened first: under its name, another process may delete it at once
                    file = self._opened(Path(partial))
                    assert file is not None
                    try:
                        _require_tar(file, url)
                        os.replace(partial, path)
                    except BaseException:
                        file.close()
                        raise
                # several processes may have made room for several files at the same time
                self._make_room(0)
                return file
            except FetchError:
                raise
            except FileNotFoundError as error:
                raise FetchError(f"{url} does not exist") from error
            except http.TooLargeError as error:
                raise FetchError(f"{url} {error}; raise --cache-bytes if it is so large") from error
            # what a storage library raises is its own affair: botocore, google.auth
            except Exception as error:
                last = error
        raise FetchError(f"{url} could not be fetched in {ATTEMPTS} attempts: {last}") from last

    @contextmanager
    def _partial(self, path: Path) -> Iterator[str]:
        """A new file for a download, locked until it has its name or is deleted again."""
        while True:
            handle, partial = tempfile.mkstemp(".part", f".{path.name}.", self.folder)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            # before it was locked, another process may have taken it for one that was given up
            if os.path.exists(partial):
                break
            os.close(handle)
        try:
            yield partial
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            os.close(handle)

    def _copy(self, url: str, target: str) -> None:
        if http.is_http(url):
            self._make_room(0)
            with open(target, "wb") as output:
                http.copy(url, output, self.limit)
            return
        files, remote = _filesystem(url)
        size = files.size(remote)
        self._make_room(size or 0)
        files.get_file(remote, target)
        got = os.path.getsize(target)
        if size is not None and got != size:
            raise OSError(f"{got:,} of {size:,} bytes arrived")

    def _make_room(self, incoming: int) -> None:
        """Delete the least recently used copies until `incoming` bytes fit."""
        found = []
        for path in self.folder.iterdir():
            unfinished = path.name.startswith(".")
            if _CACHED.match(path.name) and not (unfinished and _delete_given_up(path)):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found) + incoming
        for _, size, path in sorted(found):
            finished = not path.name.startswith(".")
            if total > self.limit and path != self._in_use and finished:
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= size

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Let one process fetch a file; the others then find it. A few lock files serve all."""
        number = int(path.name[:8], 16) % _LOCKS
        # a link would have a file elsewhere opened, or made
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        handle = os.open(self.folder / f".lock-{number:02d}", flags, 0o600)
        try:
            # where the file system has no locks, a file may be fetched twice
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _delete_given_up(path: Path) -> bool:
    """Delete an unfinished download, if its process was killed; whether it was."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # deleted while it is locked, so that no process begins to write to it
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        given_up = True
    except BlockingIOError:
        given_up = False
    except OSError:
        given_up = time.time() - os.fstat(handle).st_mtime > _STALE_SECONDS
    try:
        if given_up:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
    return given_up


def _require_tar(file: BinaryIO, url: str) -> None:
    """Keep a server's page of an error, or nothing, from being kept for the shard.

    Raises:
        OSError: it is not a tar at all. A damaged or packed one is reported by its reader.
    """
    for fault in index_file(file, url).faults:
        if fault.kind in ("not a tar", "empty file"):
            raise OSError(f"what arrived is {fault.kind} ({fault.detail or 'no bytes'})")


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL: what is fetched before it is read."""
    return "://" in name


def beside(shard: str, name: str) -> str:
    """The path or URL of a file in a shard's folder; the query of an HTTP URL stays."""
    place, query = _without_query(shard)
    folder, slash, _ = place.rpartition("/")
    return folder + slash + name + query


def file_name(shard: str) -> str:
    """The name of a shard in its folder, without the query of an HTTP URL."""
    return _without_query(shard)[0].rpartition("/")[2]


def _without_query(url: str) -> tuple[str, str]:
    """What stands before the query of an HTTP URL, and the query; of others all, and nothing."""
    # elsewhere a question mark may be part of a name
    place, mark, query = url.partition("?") if http.is_http(url) else (url, "", "")
    return place, mark + query


def read_small(urls: Iterable[str]) -> dict[str, bytes]:
    """The contents of those of the given files that exist, all asked for at once.

    Raises:
        FetchError: one of them could not be read for another reason than that it is not there.
    """
    found: dict[str, bytes] = {}
    groups: dict[str, list[str]] = {}
    asked: list[str] = []
    for url in urls:
        if http.is_http(url):
            asked.append(url)
            continue
        # a file system is of one scheme and host
        groups.setdefault("/".join(url.split("/", 3)[:3]), []).append(url)
    for group in groups.values():
        files, _ = _filesystem(group[0])
        paths = {_filesystem(url)[1]: url for url in group}
        for path, content in files.cat(list(paths), on_error="return").items():
            if isinstance(content, bytes):
                found[paths[path]] = content
            # object stores that may not be listed answer "forbidden" for what is not there
            elif not isinstance(content, FileNotFoundError | PermissionError):
                raise FetchError(f"{paths[path]} could not be read: {content}") from content
    with ThreadPoolExecutor(SMALL_AT_ONCE) as pool:
        for url, content in zip(asked, pool.map(_small, asked), strict=True):
            if content is not None:
                found[url] = content
    return found


def _small(url: str) -> bytes | None:
    """A small file from a server, None where it is not there, in so many attempts."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return http.read(url, SMALL_BYTES)
        except (FileNotFoundError, PermissionError):
            return None
        except http.TooLargeError as error:
            last: OSError = error
            break
        except OSError as error:
            last = error
    raise FetchError(f"{url} could not be read: {last}") from last


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL and the path in it; never kept, for the sake of forks."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    # a library is missing, or what an implementation makes of a URL that it cannot take
    except Exception as error:
        raise ValueError(f"{url} cannot be read: {error}") from error


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastclip"
