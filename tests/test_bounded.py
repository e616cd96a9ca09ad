"""Files of unknown origin are read within bounds, and every refusal names the file."""

from pathlib import Path

import pytest

from fastclip.bounded import read_json, read_object, read_yaml
from fastclip.train.config import parse


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 9223372036854775808}', "beyond 64 bits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "beyond 64 bits"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"{", "no valid JSON"),
        (b" " * 101 * 1000, "larger than"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = 100_000 if told == "larger than" else 1 << 20
    with pytest.raises(ValueError, match=rf"a\.json.*{told}"):
        read_json(path, limit)


def test_json_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [-9223372036854775808, 9223372036854775807, 1.5, "\u00e9"]}', "utf-8")
    assert read_object(path) == {"a": [-(2**63), 2**63 - 1, 1.5, "\u00e9"]}
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json must hold a JSON object"):
        read_object(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: &a [x]\nb: *a\n", "aliases"),
        (b"seed: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"seed: 9223372036854775808\n", "beyond 64 bits"),
        (b"name: \xff\n", "not UTF-8"),
        (b"a: [", "no valid YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    for reader in (lambda: read_yaml(path), lambda: parse(["--config", str(path)])):
        with pytest.raises(ValueError, match=rf"a\.yaml.*{told}"):
            reader()
