"""Image paths with captions from CSV and COCO files."""

import csv
import json
import os
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastclip.data.files import ImageFiles
from fastclip.data.options import DataOptions
from fastclip.data.strings import Strings

COCO_FOLDERS = ("train2017", "val2017", "test2017", "train2014", "val2014")


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
        # 64 bits tell the paths apart: among ten million, two fall together in one table of 300,000
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
        ValueError: a column is missing, or the file is no such table.
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
        raise FileNotFoundError(f"{path} does not exist or is no file")


def _header(path: Path, separator: str) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        try:
            return next(csv.reader(file, delimiter=separator), [])
        except csv.Error as error:
            raise ValueError(f"{path} is no table in UTF-8: {error}") from error


def _separator_of(path: Path, options: DataOptions) -> str:
    """The separator that gives both columns: the one asked for, or the other of tab and comma."""
    wanted = (options.csv_img_key, options.csv_caption_key)
    given = options.csv_separator
    columns = _header(path, given)
    if len(columns) == 1:
        for other in {",", "\t"} - {given}:
            found = _header(path, other)
            if set(wanted) <= set(found):
                print(f"note: {path} is separated by {other!r}, not {given!r}", file=sys.stderr)
                return other
            if len(found) > 1:
                # what is missing is told of the columns as they are meant
                given, columns = other, found
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]!r}; with the separator {given!r} it has "
            f"{columns[:20]}: give --csv-img-key, --csv-caption-key or --csv-separator"
        )
    return given


def _csv_rows(path: Path, separator: str, options: DataOptions) -> Iterator[tuple[str, str]]:
    left_out = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator)
        try:
            columns = next(reader)
            image, text = map(columns.index, (options.csv_img_key, options.csv_caption_key))
            for row in reader:
                if len(row) <= max(image, text) or not (row[image] and row[text].strip()):
                    # a blank line is no row
                    left_out += bool(row)
                else:
                    yield row[image], row[text].strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}; look for a quotation mark "
                "that is never closed"
            ) from error
    if left_out:
        print(f"note: {path}: {left_out} rows without path or caption left out", file=sys.stderr)


def _coco_rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        content = json.loads(path.read_bytes())
        names = {image["id"]: image["file_name"] for image in content["images"]}
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
        print(f"note: {path}: {bare} images without captions left out", file=sys.stderr)
    if unusable:
        detail = "without text or of unknown images"
        print(f"note: {path}: {unusable} captions {detail} left out", file=sys.stderr)
    for number, texts in captions.items():
        for text in texts:
            yield str(names[number]), text


def _usable(caption: object) -> str | None:
    """A caption stripped; None if it is no text, or blank, or cannot be written as UTF-8."""
    if not isinstance(caption, str):
        return None
    # JSON may spell half a surrogate pair, which no tokenizer takes
    return None if any("\ud800" <= c <= "\udfff" for c in caption) else caption.strip() or None
