"""Opening what somebody else may have put in a file's place, and seeing that files changed."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path, *, follow: bool = True) -> BinaryIO:
    """Open a file to read; a named pipe, which would be waited for, or a device is an error.

    Args:
        follow: whether the path may be a link.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def state_of(path: str | Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns; None where no file is."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def digest_of(values: Iterable[object]) -> str:
    """The SHA-256 of the values' representations, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{value!r}\n".encode())
    return digest.hexdigest()[:16]
