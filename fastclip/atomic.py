"""Files that are written whole or not at all, and what vouches for them."""

import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL_SUFFIX = ".partial"


def write_text(path: Path, text: str, *, named: bool = False) -> None:
    """Replace a small text file atomically; see `writing`."""
    with writing(path, named=named) as file:
        file.write(text.encode())


@contextmanager
def writing(path: Path, *, named: bool = False) -> Iterator[IO[bytes]]:
    """A new binary file that is named `path` once all is written; before, `path` is as it was.

    A link of this name is replaced, never written through: a folder from elsewhere may hold one.

    Args:
        named: the user named this very file, so that a link is theirs and is followed, as to
            `/dev/stdout`; devices and pipes are written to.
    """
    if named and (path.is_symlink() or (path.exists() and not path.is_file())):
        with path.open("wb") as file:
            yield file
        return
    partial = partial_of(path)
    try:
        with create(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    publish(path)


def append(path: Path) -> IO[bytes]:
    """Open a file to read and to append to, made where there is none.

    Raises:
        ValueError: it is a link, or no regular file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is not a regular file, so nothing is added to it; delete it")
    # between the two somebody may have made it a link
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "a+b")


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` put files into an empty folder, and move each to `folder`.

    For libraries that write under names of their own, through links where such lie there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(PARTIAL_SUFFIX, dir=folder) as made:
        write(Path(made))
        for file in [path for path in Path(made).rglob("*") if path.is_file()]:
            target = folder / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which is named `folder` once all is on the disk; before, nothing is.

    Raises:
        FileExistsError: something is there, other than an empty folder.
    """
    # "." has no name to write beside
    folder = folder.absolute()
    taken = f"{folder} exists and is not an empty folder; choose another"
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise FileExistsError(taken)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # by process: of two that write the same, one gets the name
    partial = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        try:
            os.replace(partial, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise FileExistsError(taken) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush(folder.parent)


def prepare_text(path: Path, text: str) -> None:
    """Have a text on the disk under another name, to be published."""
    with create(partial_of(path), text=True) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path, *, text: bool = False) -> IO[Any]:
    """Open a new file to write; one of this name goes first, and a link is never followed.

    A folder of data from elsewhere may hold a link to any file under the name that is written.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o666)
    return os.fdopen(handle, "w", encoding="utf-8") if text else os.fdopen(handle, "wb")


def publish(path: Path) -> None:
    """Give what was prepared its name."""
    os.replace(partial_of(path), path)
    flush(path.parent)


def partial_of(path: Path) -> Path:
    """The name under which a file or folder is written."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def flush(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(file: Path) -> dict[str, Any]:
    """A file's size and SHA-256, as manifests hold them; reads every byte."""
    digest = hashlib.sha256()
    size = 0
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def require_sums(path: Path) -> None:
    """Refuse a file of torch's, which is a zip, whose members differ from their CRC-32; reads it.

    Torch writes these sums and never looks at them. Files of other kinds have none, nor have those
    written after `torch.serialization.set_crc32_options(False)`.

    Raises:
        ValueError: a member differs, or is compressed, which torch writes none.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as content:
            members = content.infolist()
            # a small file could grow without end
            if packed := [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"its part {packed[0]} is compressed; save it with torch.save")
            damaged = content.testzip() if any(member.CRC for member in members) else None
    # what zipfile raises of damaged ones is of many kinds: of encryption, of versions, of sizes
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if damaged is not None:
        raise ValueError(
            f"{path} is damaged: its part {damaged} differs from its checksum; copy the file again"
        )
