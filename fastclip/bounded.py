"""JSON and YAML files of unknown origin, read within bounds; every error names the file."""

import json
from pathlib import Path
from typing import Any

LIMIT = 16 << 20
"""Bytes of a description, configuration or manifest."""
_LARGEST = 2**63


def read_text(path: Path, limit: int = LIMIT) -> str:
    """A UTF-8 text file of at most `limit` bytes.

    Raises:
        ValueError: it is larger, no regular file, or not UTF-8.
        FileNotFoundError: there is no such file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is larger than {limit} bytes, the limit of such files")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON, too large or too deep, or has an integer beyond 64 bits.
        FileNotFoundError: there is no such file.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


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
        ValueError: it is no YAML, too large or too deep, or has aliases or an integer beyond
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
        raise ValueError(f"{path} is no valid YAML: {error}") from error
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
