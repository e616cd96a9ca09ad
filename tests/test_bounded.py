"""Files of unknown origin are read within bounds, and every refusal names the file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclip.bounded import read_json, read_json_lines, read_object, read_yaml
from fastclip.data.counts import declared_counts
from fastclip.data.editing import Journal, claim_folder
from fastclip.data.imagenet_captions import convert_imagenet_captions
from fastclip.data.options import DataOptions
from fastclip.data.order_perturbations import write_order_cases
from fastclip.data.tables import open_coco
from fastclip.evaluate.aro import _size_of
from fastclip.evaluate.entries import read_entries
from fastclip.evaluate.features import ImageFile, _Files
from fastclip.evaluate.imagenet import _read_json
from fastclip.evaluate.results import read_result
from fastclip.study.runs import OUTCOME, run
from fastclip.train.config import parse
from fastclip.train.log import METRICS_FILE, read_metrics


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 9223372036854775808}', "beyond 64 bits"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "beyond 64 bits"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"{", "not valid JSON"),
        (b" " * 101 * 1000, "larger than"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    limit = 100_000 if message == "larger than" else 1 << 20
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        read_json(path, limit)


def test_json_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [-9223372036854775808, 9223372036854775807, 1.5, "\u00e9"]}', "utf-8")
    assert read_object(path) == {"a": [-(2**63), 2**63 - 1, 1.5, "\u00e9"]}
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json must hold a JSON object"):
        read_object(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: &a [x]\nb: *a\n", "aliases"),
        (b"seed: " + b"[" * 1500 + b"]" * 1500, "nested too deeply"),
        (b"seed: 9223372036854775808\n", "beyond 64 bits"),
        (b"name: \xff\n", "not UTF-8"),
        (b"a: [", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    for reader in (lambda: read_yaml(path), lambda: parse(["--config", str(path)])):
        with pytest.raises(ValueError, match=rf"a\.yaml.*{message}"):
            reader()


@pytest.mark.parametrize("count", ["1e308", "9223372036854775807", "-1", '"x"', "null", "[]"])
def test_counts_that_no_shard_has(tmp_path: Path, count: str) -> None:
    (tmp_path / "sizes.json").write_text(f'{{"a.tar": {count}}}')
    if count == "null":
        assert declared_counts([f"{tmp_path}/a.tar"]) == {}
        return
    with pytest.raises(ValueError, match=r"sizes\.json is damaged \(a count is"):
        declared_counts([f"{tmp_path}/a.tar"])


# every other reader of a file in JSON from elsewhere, by the file's name
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "captions": ("a.json", lambda path: convert_imagenet_captions(path, path.parent, path.parent)),
    "orders": ("a.json", lambda path: write_order_cases(path, path.parent / "b", lambda text: [])),
    "COCO": ("a.json", lambda path: open_coco(path, DataOptions())),
    "entries": ("a.json", lambda path: read_entries(path, {})),
    "lines of entries": ("a.jsonl", lambda path: read_entries(path, {})),
    "mappings": ("a.json", _read_json),
    "result": ("a.json", read_result),
    "sizes": ("sizes.json", lambda path: declared_counts([str(path.with_name("a.tar"))])),
    "folder": ("a.json", lambda path: claim_folder(path.parent, path.name, {}, [])),
    "study": (OUTCOME, lambda path: run(path.parent.name, (), path.parent.parent)),
}


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a": 9223372036854775808}', b'{"\xff": 1}'])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    file, read = READERS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        read(tmp_path / file)


@pytest.mark.parametrize("name", sorted(set(READERS) - {"sizes", "study", "folder"}))
def test_no_reader_waits_for_a_pipe(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    os.mkfifo(tmp_path / file)
    with pytest.raises((ValueError, OSError), match=file.replace(".", r"\.")):
        read(tmp_path / file)


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_an_image_is_a_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (fault,) = _Files([ImageFile(tmp_path / "a.jpg")], None)[0]["faults"]
    assert fault.kind == "image path is not a file"
    assert _size_of(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("rest", [b"[" * 200_000, b'{"step": ', b"[1]", b"\xff", b'{"step": "x"}'])
def test_lines_end_where_they_are_damaged(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1}\n' + rest + b"\n")
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert next(read_json_lines(path)) == {"step": 1}
    journal = tmp_path / "b.journal"
    journal.write_bytes(b'{"a": 1}\n' + rest[: len(rest) // 2] + b"\n")
    Journal(tmp_path / "b").begin({"a": 1})
    assert journal.read_bytes() == b'{"a": 1}\n'
