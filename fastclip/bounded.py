"""JSON and YAML files of unknown origin, read within bounds; every error names the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 16 << 20
"""Bytes of a description, configuration or manifest."""
ANNOTATIONS = 1 << 30
"""Bytes of the texts of a whole data set."""
LINE = 1 << 26
"""Bytes of a line in a file that grows, such as a log."""
_LARGEST = 2**63


def read_text(path: Path, limit: int = LIMIT) -> str:
    """A UTF-8 text file of at most `limit` bytes.

    Raises:
        ValueError: it is larger, no regular file, or not UTF-8.
        FileNotFoundError: there is no such file.
    """
    return _decoded(_read(path, limit), "utf-8", path)


def _read(path: Path, limit: int) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is larger than {limit} bytes, the limit of such files")
    return content


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is not JSON, too large or too deep, or has an integer beyond 64 bits.
        FileNotFoundError: there is no such file.
    """
    content = _read(path, limit)
    # with a byte-order mark, or in UTF-16, as JSON once allowed
    return parse_json(_decoded(content, json.detect_encoding(content), path), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """What a text in JSON holds.

    Args:
        where: it is from, for messages.

    Raises:
        ValueError: see `read_json`.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, up to the first line that is cut short or damaged.

    Raises:
        ValueError: it is not a regular file. FileNotFoundError: there is no such file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        while line := file.readline(LINE):
            try:
                value = parse_json(line, str(path))
            except ValueError:
                return
            if not isinstance(value, dict):
                return
            yield value


def read_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """What a JSON file with an object at its top holds.

    Raises:
        ValueError: it holds something else, or see `read_json`.
        FileNotFoundError: there is no such file.
    """
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_yaml(path: Path, limit: int = LIMIT) -> Any:
    """What a YAML file without aliases holds.

    Raises:
        ValueError: it is not YAML, too large or too deep, or has aliases or an integer beyond
            64 bits.
        FileNotFoundError: there is no such file.
    """
    import yaml

    text = read_text(path, limit)
    try:
        # a few lines of aliases can stand for more text than memory holds
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError(f"{path} has YAML aliases (*name); write the values out")
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    _check_integers(content, path)
    return content


def _integer(digits: str) -> int:
    # the length first: int() of many digits takes long
    if len(digits) > len(str(_LARGEST)) + 1 or not -_LARGEST <= int(digits) < _LARGEST:
        raise ValueError(f"the integer {digits[:24]} is beyond 64 bits")
    return int(digits)


def _check_integers(value: Any, path: Path) -> None:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        for item in value:
            _check_integers(item, path)
    elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise ValueError(f"{path} has an integer beyond 64 bits")
