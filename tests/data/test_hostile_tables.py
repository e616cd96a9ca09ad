"""Tables and annotations of every kind of damage: rows as they were, or a note, or an error."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastclip.data.options import DataOptions
from fastclip.data.sources import open_source
from fastclip.data.tables import TableSource, open_coco, open_csv
from tests.conftest import jpeg

SECONDS = 20.0
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """A table, and its rows, or what an error or note says of it."""

    content: bytes
    rows: Rows | None = None
    message: str = ""


def tsv(*lines: str, header: str = "filepath\ttitle") -> bytes:
    return "\n".join([header, *lines, ""]).encode("utf-8", "surrogatepass")


A, B = ("0.jpg", "a"), ("1.jpg", "b")
OPEN = r"line \d+: .*never closed"
WIDE = r"line \d+: \d+ fields where the header has 2"
TABLES = {
    "plain": Case(tsv("0.jpg\ta", "1.jpg\tb"), [A, B]),
    "no line feed at the end": Case(tsv("0.jpg\ta", "1.jpg\tb")[:-1], [A, B]),
    "CR LF": Case(tsv("0.jpg\ta", "1.jpg\tb").replace(b"\n", b"\r\n"), [A, B]),
    "CR": Case(tsv("0.jpg\ta", "1.jpg\tb").replace(b"\n", b"\r"), [A, B]),
    "byte-order mark": Case(b"\xef\xbb\xbf" + tsv("0.jpg\ta", "1.jpg\tb"), [A, B]),
    "blank lines": Case(tsv("", "0.jpg\ta", "", "", "1.jpg\tb", ""), [A, B]),
    "quoted": Case(tsv('"0.jpg"\t"a"', '1.jpg\t"b"'), [A, B]),
    "doubled marks": Case(tsv('0.jpg\t"say ""hi"""'), [("0.jpg", 'say "hi"')]),
    "marks within": Case(tsv('0.jpg\tsay "hi"'), [("0.jpg", 'say "hi"')]),
    "columns turned": Case(tsv("a\t0.jpg", header="title\tfilepath"), [A]),
    "a third column": Case(tsv("0.jpg\tu\ta", header="filepath\turl\ttitle"), [A]),
    "zero byte": Case(
        tsv("0.jpg\ta", "1.jpg\ta\0b"), [A], "1 rows with zero bytes in the caption left out"
    ),
    "commas": Case(tsv('0.jpg,"a, b"', header="filepath,title"), [("0.jpg", "a, b")]),
    "mark at the start": Case(tsv('0.jpg\t"a', "1.jpg\tb"), message=OPEN),
    "mark at the start, twice": Case(tsv('0.jpg\t"a', '1.jpg\t"b'), message=OPEN),
    "mark before a path": Case(tsv('"0.jpg\ta', "1.jpg\tb"), message=OPEN),
    "mark in the header": Case(
        tsv("0.jpg\ta", header='"filepath\ttitle'), message="UTF-8|no column"
    ),
    "text behind a mark": Case(tsv('0.jpg\t"a" dog'), message=OPEN),
    "single mark": Case(tsv('0.jpg\t"'), message=OPEN),
    "two lines": Case(tsv('0.jpg\t"a\nb"'), [("0.jpg", "a\nb")]),
    "two lines with the separator": Case(
        tsv('0.jpg\t"a\n1.jpg\tb"'), [("0.jpg", "a\n1.jpg\tb")], "1 rows have a field over several"
    ),
    "comma in a caption": Case(tsv("0.jpg,a, b", header="filepath,title"), message=WIDE),
    "tab in a caption": Case(tsv("0.jpg\ta\tb"), message=WIDE),
    "two rows on a line": Case(tsv("0.jpg\ta1.jpg\tb"), message=WIDE),
    "a million columns": Case(tsv("\t" * 1_000_000), message=WIDE),
    "narrow row": Case(tsv("0.jpg\ta", "1.jpg"), [A], "1 rows without path or caption"),
    "no path": Case(tsv("0.jpg\ta", "\tb"), [A], "1 rows without path or caption"),
    "blank caption": Case(tsv("0.jpg\ta", "1.jpg\t  "), [A], "1 rows without path or caption"),
    "row cut before a column": Case(
        tsv("0.jpg\ta\tu", "1.jpg\tb", header="filepath\ttitle\turl"), [A], "1 rows with fewer"
    ),
    "2 MiB of caption": Case(
        tsv("0.jpg\ta", "1.jpg\t" + "b" * (2 << 20)), [A], "1 rows with a caption over 1,048,576"
    ),
    "17 MiB of caption": Case(tsv("0.jpg\t" + "b" * (17 << 20)), message=r"line 2: a line of over"),
    "17 MiB over many lines": Case(
        tsv('0.jpg\t"' + "b\n" * (9 << 20)), message=r"line 2: field larger"
    ),
    "UTF-16": Case(tsv("0.jpg\ta").decode().encode("utf-16"), message="is UTF-16"),
    "Latin-1": Case(tsv("0.jpg\ta") + b"1.jpg\tcaf\xe9\n", message="not UTF-8"),
    "half a surrogate pair": Case(tsv("0.jpg\t\ud800"), message="not UTF-8"),
    "empty": Case(b"", message="no column 'filepath'"),
    "header alone": Case(tsv(), message="holds no sample"),
    "zero bytes": Case(bytes(1000), message="no column"),
    "a JPEG": Case(jpeg(), message="no column|UTF-8"),
    "column twice": Case(tsv("0.jpg\ta\tx", header="filepath\ttitle\ttitle"), message="twice"),
}


def coco(images: object, annotations: object) -> bytes:
    return json.dumps({"images": images, "annotations": annotations}).encode()


IMAGE = {"id": 1, "file_name": "0.jpg"}
TEXT = {"image_id": 1, "caption": "a"}
NONE = r"c\.json holds no COCO captions"
ANNOTATIONS = {
    "plain": Case(coco([IMAGE], [TEXT]), [A]),
    "byte-order mark": Case(b"\xef\xbb\xbf" + coco([IMAGE], [TEXT]), [A]),
    "UTF-16": Case(coco([IMAGE], [TEXT]).decode().encode("utf-16"), [A]),
    "caption of another image": Case(
        coco([IMAGE], [TEXT, TEXT | {"image_id": 2}]), [A], "1 captions without text or of unknown"
    ),
    "caption that is none": Case(
        coco([IMAGE], [TEXT, TEXT | {"caption": 5}]), [A], "1 captions without text"
    ),
    "half a surrogate pair": Case(
        coco([IMAGE], [TEXT, TEXT | {"caption": "\ud800"}]), [A], "1 captions without text"
    ),
    "zero byte": Case(
        coco([IMAGE], [TEXT, TEXT | {"caption": "a\0b"}]), [A], "1 captions without text"
    ),
    "image twice": Case(coco([IMAGE, IMAGE], [TEXT]), [A]),
    "two images of one number": Case(
        coco([IMAGE, IMAGE | {"file_name": "1.jpg"}], [TEXT]),
        message=r"c\.json holds no .*the id 1 is that of '0\.jpg' and of '1\.jpg'",
    ),
    "image without caption": Case(
        coco([IMAGE, {"id": 2, "file_name": "1.jpg"}], [TEXT]), [A], "1 images without captions"
    ),
    "deep": Case(b"[" * 300_000, message=NONE),
    "cut": Case(coco([IMAGE], [TEXT])[:-9], message=NONE),
    "number of 10,000 digits": Case(b'{"images": ' + b"9" * 10_000 + b"}", message=NONE),
    "images that are numbers": Case(coco([1], []), message=NONE),
    "annotations that are none": Case(coco([IMAGE], None), message=NONE),
    "number that is a list": Case(coco([{"id": [], "file_name": "0.jpg"}], []), message=NONE),
    "name of half a pair": Case(coco([{"id": 1, "file_name": "\ud800"}], [TEXT]), message=NONE),
    "zero bytes": Case(bytes(100), message=NONE),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(size=8))
    return tmp_path


def rows_of(source: TableSource) -> Rows:
    pairs = ((source.path_of(i), source.texts_of(i)) for i in range(source.count))
    return [(path, text) for path, texts in pairs for text in texts]


@pytest.mark.parametrize(
    ("form", "name"), [("csv", n) for n in TABLES] + [("json", n) for n in ANNOTATIONS]
)
def test_tables(form: str, name: str, folder: Path, logged: Callable[[], str]) -> None:
    case = (TABLES if form == "csv" else ANNOTATIONS)[name]
    path = folder / f"c.{form}"
    path.write_bytes(case.content)
    start = time.monotonic()
    read = open_csv if form == "csv" else open_coco
    if case.rows is None:
        with pytest.raises(ValueError, match=case.message):
            read(path, DataOptions())
    else:
        assert rows_of(read(path, DataOptions())) == case.rows
        noted = logged()
        assert case.message in noted and bool(case.message) == bool(noted)
    assert time.monotonic() - start < SECONDS


def whole_table(rng: random.Random) -> tuple[bytes, Rows]:
    """A table of 20 rows, some quoted, with commas or tabs between."""
    separator = rng.choice(",\t")
    lines, rows = [separator.join(("filepath", "title"))], []
    for number in range(20):
        words = rng.choices(("dog", "cat", "café", "狗", "red", 'the "big" one'), k=4)
        text = rng.choice((" ", ", " if separator == "\t" else " ")).join(words)
        rows.append((f"{number}.jpg", text))
        if rng.random() < 0.4 or text.startswith('"'):
            text = '"' + text.replace('"', '""') + '"'
        lines.append(f"{number}.jpg{separator}{text}")
    return ("\n".join(lines) + "\n").encode(), rows


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, int]:
    """The table with a bit flipped, or cut, or both; and how many of its lines are touched."""
    data = bytearray(content)
    touched = set()
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        place = rng.randrange(len(data))
        touched.add(content.count(b"\n", 0, place))
        data[place] ^= 1 << rng.randrange(8)
    if rng.random() < 0.3 or not touched:
        place = rng.randrange(len(data))
        touched |= set(range(content.count(b"\n", 0, place), content.count(b"\n")))
        del data[place:]
    return bytes(data), len(touched)


@pytest.mark.parametrize("cases", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_to_a_row_is_reported_or_stays_in_it(
    cases: int, folder: Path, logged: Callable[[], str]
) -> None:
    """What no error or note reports is a change within the row whose bytes were changed.

    A table has no checksum: another letter in a caption is another caption. But no other row may
    be lost by it or changed. Of a table that is cut, the rows before the cut are whole.
    """
    path = folder / "t.csv"
    seen: Counter[str] = Counter()
    for number in range(cases):
        rng = random.Random(number)
        content, rows = whole_table(rng)
        content, touched = damaged(content, rng)
        path.write_bytes(content)
        logged()
        try:
            source = open_source(str(path), DataOptions(), split="train")
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error), number
            seen["error"] += 1
            continue
        assert isinstance(source, TableSource)
        noted = logged()
        loaded, original = Counter(rows_of(source)), Counter(rows)
        lost, foreign = (original - loaded).total(), (loaded - original).total()
        seen[
            "noted" if noted.strip() else "changed" if foreign else "lost" if lost else "whole"
        ] += 1
        if not noted.strip():
            assert lost <= touched and foreign <= touched, (number, content)
    print(dict(seen))
    assert seen["error"] and seen["noted"] and seen["changed"]
