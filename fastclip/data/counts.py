"""How many samples shards hold, as files beside them declare it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastclip.bounded import parse_json, read_text
from fastclip.data.remote import beside, file_name, is_remote, read_small
from fastclip.messages import note

# of a shard; orders are made of counts, and of larger ones would not be in memory
_MOST_SAMPLES = 1 << 32


def declared_counts(names: Sequence[str]) -> dict[str, int]:
    """What sizes.json or img2dataset's _stats.json say of shards, where they say anything.

    Each file is read once, whatever the number of shards beside it.

    Args:
        names: paths and URLs.

    Raises:
        ValueError: one of these files is damaged. FetchError: a remote one could not be read.
    """
    counts: dict[str, int] = {}
    sizes = {name: beside(name, "sizes.json") for name in names}
    declared = {place: _parsed(place, text) for place, text in _read(set(sizes.values()))}
    for name, place in sizes.items():
        count = declared.get(place, {}).get(file_name(name))
        if count is not None:
            counts[name] = _whole(place, count)
    stats = {
        beside(name, f"{file_name(name).removesuffix('.tar')}_stats.json"): name
        for name in names
        if name not in counts and file_name(name).endswith(".tar")
    }
    for place, text in _read(stats):
        count = _parsed(place, text).get("successes")
        if count is not None:
            counts[stats[place]] = _whole(place, count)
    remote = [name for name in names if is_remote(name)]
    if uncounted := sum(name not in counts for name in remote):
        note(
            f"{uncounted} of {len(remote)} remote shards have no count in "
            "sizes.json or _stats.json; fetching them once to count their samples"
        )
    return counts


def _read(places: Iterable[str]) -> Iterator[tuple[str, str | bytes]]:
    """The contents of those of the files that exist."""
    remote = []
    for place in places:
        if is_remote(place):
            remote.append(place)
        elif os.path.isfile(place):
            yield place, read_text(Path(place))
    yield from read_small(remote).items()


def _parsed(where: str, text: str | bytes) -> dict[str, Any]:
    """A file of counts.

    Raises:
        ValueError: it is not a dictionary in JSON.
    """
    try:
        content = parse_json(text, where)
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error}); repair or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is damaged (no dictionary); repair or delete it")
    return content


def _whole(where: str, count: Any) -> int:
    """One of its counts.

    Raises:
        ValueError: it is not a number, negative, or more than any shard holds.
    """
    try:
        number = int(count)
    except (ValueError, TypeError, OverflowError):
        number = -1
    if not 0 <= number <= _MOST_SAMPLES:
        raise ValueError(f"{where} is damaged (a count is {count!r}); repair or delete it")
    return number
