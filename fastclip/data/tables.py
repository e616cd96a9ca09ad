"""Image paths with captions from CSV and COCO files."""

import codecs
import csv
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastclip.bounded import ANNOTATIONS, read_object
from fastclip.data.files import ImageFiles
from fastclip.data.options import DataOptions
from fastclip.data.samples import MAX_TEXT_BYTES
from fastclip.data.strings import Strings
from fastclip.messages import note

COCO_FOLDERS = ("train2017", "val2017", "test2017", "train2014", "val2014")

# Longest field and line that are looked at, in characters: a caption over MAX_TEXT_BYTES is left
# out, while what is longer than this comes of an open quotation mark, or is not a table.
MAX_FIELD = 16 * MAX_TEXT_BYTES


class TableSource(ImageFiles):
    """Rows of (image path, caption); rows with one path are one sample with several captions.

    Samples come in the order in which their paths first appear, captions in the order of rows.

    Args:
        name: of the table, for messages.
        rows: (path, caption) of each row, both not empty.
        roots: folders that relative paths are tried in.

    Raises:
        ValueError: there is no row. FileNotFoundError: the images are not there.
    """

    def __init__(self, name: str, rows: Iterator[tuple[str, str]], roots: tuple[Path, ...]) -> None:
        self._paths = Strings()
        self._texts = Strings()
        hashes = array("q")
        for path, text in rows:
            self._paths.append(path)
            self._texts.append(text)
            hashes.append(hash(path))
        # 64 bits separate the paths: among ten million, two fall together in one table of 300,000
        keys = np.frombuffer(hashes, dtype=np.int64)
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.empty(len(first), dtype=np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        group = rank[group.reshape(-1)]
        self._rows = np.argsort(group, kind="stable")
        self._starts = np.searchsorted(group[self._rows], np.arange(len(first) + 1))
        super().__init__(name, len(first), roots)
        self.check_paths()

    def path_of(self, index: int) -> str:
        """The image's path as it was written."""
        return self._paths[int(self._rows[self._starts[index]])]

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The captions of all rows with this image."""
        rows = self._rows[self._starts[index] : self._starts[index + 1]]
        return tuple(self._texts[int(row)] for row in rows)


def open_csv(path: Path, options: DataOptions) -> TableSource:
    """A table with a header line, UTF-8, separated by `options.csv_separator`.

    Relative image paths begin at --image-root; without it they are tried in the table's folder,
    then in the working directory. Rows without a path or caption are left out with a note.

    Raises:
        ValueError: a column is missing, a row has more fields than the header or a quotation mark
            that is not closed, or the file is no such table.
        FileNotFoundError: there is no such file, or its images are not there.
    """
    _require_file(path)
    separator = _separator_of(path, options)
    roots = _given_root(options) or (path.parent, Path())
    return TableSource(str(path), _csv_rows(path, separator, options), roots)


def open_coco(path: Path, options: DataOptions) -> TableSource:
    """The captions of a COCO annotation file, e.g. captions_train2017.json.

    Images lie in --image-root; without it in ../train2017 or the like, if the file's name ends in
    it, or in the file's own folder. Images without captions are left out with a note.

    Raises:
        ValueError: the file is not of this format.
        FileNotFoundError: there is no such file, or its images are not there.
    """
    _require_file(path)
    named = [folder for folder in COCO_FOLDERS if path.stem.endswith(folder)]
    beside = (*(path.parent.parent / folder for folder in named), path.parent)
    return TableSource(str(path), _coco_rows(path), _given_root(options) or beside)


def _given_root(options: DataOptions) -> tuple[Path, ...]:
    return (Path(options.image_root).expanduser(),) if options.image_root else ()


def _require_file(path: Path) -> None:
    if not os.path.isfile(path):
        # Path makes one slash of two
        if ":/" in str(path):
            raise ValueError(f"{path} is a URL; tables are read from local files: copy it")
        raise FileNotFoundError(f"{path} does not exist or is not a file")


def _header(path: Path, separator: str) -> list[str]:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path} is UTF-16, not UTF-8; save it as UTF-8")
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file, _long_fields():
        try:
            return next(csv.reader(_lines(file), delimiter=separator), [])
        except csv.Error as error:
            raise ValueError(f"{path} is not a table in UTF-8: {error}") from error


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; of a file that has none, no more than is needed to know so."""
    while line := file.readline(MAX_FIELD + 1):
        if len(line) > MAX_FIELD:
            raise csv.Error(f"a line of over {MAX_FIELD:,} characters")
        yield line


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module's limit is one for all, and less than a caption may have."""
    before = csv.field_size_limit(MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _separator_of(path: Path, options: DataOptions) -> str:
    """The separator that gives both columns: the one asked for, or the other of tab and comma."""
    wanted = (options.csv_img_key, options.csv_caption_key)
    given = options.csv_separator
    columns = _header(path, given)
    if len(columns) == 1:
        for other in {",", "\t"} - {given}:
            found = _header(path, other)
            if set(wanted) <= set(found):
                _require_once(path, found, wanted)
                # commas in a .csv are no news; the default is open_clip's, a tab
                if (path.suffix.lower(), given, other) != (".csv", "\t", ","):
                    note(f"{path} is separated by {other!r}, not {given!r}")
                return other
            if len(found) > 1:
                # what is missing is reported of the columns as they are meant
                given, columns = other, found
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]!r}; with the separator {given!r} it has "
            f"{[name[:80] for name in columns[:20]]}: "
            "give --csv-img-key, --csv-caption-key or --csv-separator"
        )
    _require_once(path, columns, wanted)
    return given


def _require_once(path: Path, columns: list[str], wanted: tuple[str, str]) -> None:
    """Readers differ over which of two columns of one name is meant."""
    for name in wanted:
        if columns.count(name) > 1:
            raise ValueError(f"{path} has the column {name!r} twice; rename one of them")


def _csv_rows(path: Path, separator: str, options: DataOptions) -> Iterator[tuple[str, str]]:
    """The rows, each as wide as the header.

    Where pandas and the csv module read a table differently, neither is guessed at: a longer row,
    text after a closed quotation mark and a mark that is never closed are errors.
    """
    counts: Counter[str] = Counter()
    spanning = 0
    with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
        reader = csv.reader(_lines(file), delimiter=separator, strict=True)
        begin = 1
        try:
            columns = next(reader)
            image, text = map(columns.index, (options.csv_img_key, options.csv_caption_key))
            begin = reader.line_num + 1
            for row in reader:
                if len(row) > len(columns):
                    raise ValueError(
                        f"{path}, line {begin}: {len(row)} fields where the header has "
                        f"{len(columns)}; put fields that hold {separator!r} in quotation marks"
                    )
                if row and any("\n" in field and separator in field for field in row):
                    spanning = spanning or begin
                    counts["spanning"] += 1
                begin = reader.line_num + 1
                fault = _row_fault(row, len(columns), image, text)
                if fault:
                    counts[fault] += 1
                elif row:
                    yield row[image], row[text].strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {begin}: {error}; look for a quotation mark that is never closed: a "
                "field that begins with one ends with one, and those within are doubled"
            ) from error
    if spanning:
        note(
            f"{path}: {counts.pop('spanning')} rows have a field over several lines with "
            f"{separator!r} in it, the first at line {spanning}: if these are several rows, a "
            "quotation mark is not closed"
        )
    for fault, count in counts.items():
        note(f"{path}: {count} {fault}")


def _row_fault(row: list[str], width: int, image: int, text: int) -> str:
    """Why a row is left out; a blank line is not a row."""
    if not row:
        return ""
    if len(row) <= max(image, text) or not (row[image] and row[text].strip()):
        return "rows without path or caption left out"
    if len(row) < width:
        return "rows with fewer fields than the header left out"
    if len(row[text].encode()) > MAX_TEXT_BYTES:
        return f"rows with a caption over {MAX_TEXT_BYTES:,} bytes left out"
    if "\0" in row[text]:
        return "rows with zero bytes in the caption left out"
    return ""


def _coco_rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = read_object(path, ANNOTATIONS)
        names: dict[Any, Any] = {}
        for image in content["images"]:
            number, name = image["id"], image["file_name"]
            if names.setdefault(number, name) != name:
                raise ValueError(f"the id {number!r} is that of {names[number]!r} and of {name!r}")
            # half a surrogate pair, which JSON may spell, is in no path
            str(name).encode("utf-8", "surrogateescape")
        captions: dict[Any, list[str]] = {number: [] for number in names}
        unusable = 0
        for annotation in content["annotations"]:
            text = _usable(annotation["caption"])
            if text is None or annotation["image_id"] not in captions:
                unusable += 1
            else:
                captions[annotation["image_id"]].append(text)
    except (ValueError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} holds no COCO captions ({what}); give a file like captions_train2017.json, "
            "with images: [{id, file_name}] and annotations: [{image_id, caption}]"
        ) from error
    bare = sum(not texts for texts in captions.values())
    if bare:
        note(f"{path}: {bare} images without captions left out")
    if unusable:
        detail = "without text or of unknown images"
        note(f"{path}: {unusable} captions {detail} left out")
    for number, texts in captions.items():
        for text in texts:
            yield str(names[number]), text


def _usable(caption: object) -> str | None:
    """A caption stripped; None if it is not a text, or blank, or cannot be written as UTF-8, or
    holds zero bytes."""
    if not isinstance(caption, str) or "\0" in caption:
        return None
    # JSON may spell half a surrogate pair, which no tokenizer takes
    return None if any("\ud800" <= c <= "\udfff" for c in caption) else caption.strip() or None
