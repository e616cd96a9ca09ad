"""Many strings in two flat buffers."""

from array import array


class Strings:
    """An append-only list of strings that holds no Python object for any of them.

    Loader processes are forked. Reading a list of `str` writes to every string's reference count,
    which copies its page: memory then grows by the whole list in each process.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        """Add one string; file names that are not UTF-8 keep their bytes (surrogateescape)."""
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        encoded = self._bytes[self._ends[index] : self._ends[index + 1]]
        return encoded.decode("utf-8", "surrogateescape")
