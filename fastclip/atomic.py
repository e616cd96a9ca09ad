"""Files that are written whole or not at all, and what vouches for them."""

import hashlib
import os
from pathlib import Path
from typing import IO, Any

PARTIAL_SUFFIX = ".partial"


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically."""
    prepare_text(path, text)
    publish(path)


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
