"""The files of published benchmarks, read entry by entry."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastclip.bounded import ANNOTATIONS, parse_json, read_json, read_text
from fastclip.evaluate.registry import BENCHMARKS


def find_parts(
    name: str, root: Path, files: Mapping[str, str], wanted: Sequence[str] = ()
) -> dict[str, Path]:
    """The parts of a benchmark that are there, in the order of `files`.

    Args:
        name: of the benchmark in `fastclip.evaluate.registry.BENCHMARKS`.
        files: of all parts, below the root.
        wanted: parts that must be there; without them those that are there are enough.

    Raises:
        ValueError: a part has no such name.
        FileNotFoundError: a wanted part is missing, or all are; the message says where to get them.
    """
    if unknown := [part for part in wanted if part not in files]:
        raise ValueError(f"{name} has no part {unknown[0]!r}; choose from {', '.join(files)}")
    paths = {part: root / file for part, file in files.items() if part in (wanted or files)}
    missing = [files[part] for part, path in paths.items() if not path.is_file()]
    if missing and (wanted or len(missing) == len(files)):
        raise FileNotFoundError(
            f"{name}: {root} lacks {', '.join(missing)}; get the files from "
            f"{BENCHMARKS[name].source}"
        )
    return {part: path for part, path in paths.items() if path.is_file()}


def read_entries(path: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a JSON list, of a JSON object of them, or of a file of JSON lines.

    Args:
        path: ending in .json, or else in .jsonl or .jsonlines.
        fields: what every entry has, with its type, or several of them as `isinstance` takes.

    Raises:
        ValueError: the file is no such JSON, holds nothing, or an entry lacks a field.
    """
    try:
        if path.suffix == ".json":
            content = read_json(path, ANNOTATIONS)
        else:
            lines = enumerate(read_text(path, ANNOTATIONS).removeprefix("\ufeff").split("\n"), 1)
            content = [parse_json(line, f"{path}:{n}") for n, line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"{error}; download the file again") from error
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of entries; download the file again")
    for number, entry in enumerate(entries):
        for field, kind in fields.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                raise ValueError(
                    f"{path}, entry {number}: {field} is missing or of another type; an entry has "
                    f"{', '.join(fields)}"
                )
    return entries
