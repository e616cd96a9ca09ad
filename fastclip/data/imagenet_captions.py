"""ImageNet-Captions: the Flickr texts of ImageNet's training photographs.

The data set of "Data Determines Distributional Robustness in Contrastive Language Image
Pre-training": title, description and tags of 463,622 photographs of ILSVRC2012, without these.
"""

import html
import re
from pathlib import Path
from typing import Any

from fastclip.atomic import write_text
from fastclip.bounded import ANNOTATIONS, read_json
from fastclip.data.convert import convert_table
from fastclip.data.faults import FaultLog
from fastclip.data.files import ImageFiles
from fastclip.data.folders import class_names
from fastclip.data.index import Fault

CAPTION_PARTS = ("title", "description", "tags")

_WNID = re.compile(r"n\d{8}")
# "<3" and "a < b" are text
_MARKUP = re.compile(r"<(?:!--.*?--|/?[a-zA-Z][^<>]*)>", re.DOTALL)


class ImageNetCaptions(ImageFiles):
    """The entries of `imagenet_captions.json` that have a caption.

    Args:
        path: a JSON list of {filename, wnid, title, description, tags}.
        image_root: images lie at WNID/FILENAME in it, or at FILENAME.
        parts: what a caption is made of, joined by spaces in this order.

    Attributes:
        classes: the WordNet ids that are folders of image_root or named in the file, sorted; an
            image's label is its place there, ImageNet's own index where all folders are there.

    Raises:
        ValueError: the file holds no such list, no entry has a caption, or a part is unknown.
        FileNotFoundError: the file, the folder or all of the images are missing.
    """

    def __init__(self, path: Path, image_root: Path, parts: tuple[str, ...]) -> None:
        if not parts or len(set(parts) & set(CAPTION_PARTS)) < len(parts):
            known = ",".join(CAPTION_PARTS)
            raise ValueError(f"--caption-parts {','.join(parts)}: give some of {known}, each once")
        wnids = {name for name in class_names(image_root) if _WNID.fullmatch(name)}
        self._faults: list[Fault] = []
        self._rows: list[dict[str, Any]] = []
        self._texts: list[str] = []
        for number, entry in enumerate(_read_list(path)):
            row = _clean_entry(entry)
            if row is None:
                self._faults.append(Fault("entry without image", f"{path}, number {number}"))
                continue
            wnids.add(row["wnid"])
            texts = [" ".join(row[part]) if part == "tags" else row[part] for part in parts]
            if any(texts):
                self._rows.append(row)
                self._texts.append(" ".join(filter(None, texts)))
            else:
                self._faults.append(Fault("empty caption", f"{path}:{row['filename']}"))
        self.classes = sorted(wnids)
        self._labels = {wnid: label for label, wnid in enumerate(self.classes)}
        super().__init__(str(path), len(self._rows), (image_root,))
        self.check_paths()

    def path_of(self, index: int) -> str:
        """WNID/FILENAME."""
        return "{wnid}/{filename}".format(**self._rows[index])

    def texts_of(self, index: int) -> tuple[str, ...]:
        """The caption."""
        return (self._texts[index],)

    def label_of(self, index: int) -> int:
        """The class's index."""
        return self._labels[self._rows[index]["wnid"]]

    def details_of(self, index: int) -> dict[str, Any]:
        """The whole entry, its texts cleaned."""
        return self._rows[index]

    def drain_faults(self) -> list[Fault]:
        """The entries that were left out, once."""
        faults, self._faults = self._faults, []
        return faults

    def _find(self, path: str) -> Path | None:
        return super()._find(path) or super()._find(path.partition("/")[2])


def convert_imagenet_captions(
    source: Path,
    target: Path,
    image_root: Path,
    *,
    parts: tuple[str, ...] = CAPTION_PARTS,
    per_shard: int = 1000,
) -> tuple[list[int], FaultLog]:
    """Write the entries as shards, KEY.json the whole of each, and the classes as classes.txt.

    For what is returned and raised see `convert_table`.
    """
    data = ImageNetCaptions(source, image_root, parts)
    details = data.details_of
    written = convert_table(data, target, source.stem, per_shard=per_shard, details_of=details)
    write_text(target / "classes.txt", "\n".join(data.classes) + "\n")
    return written


def clean_text(text: object) -> str:
    """A text of a web page on one line, without entities and mark-up; empty if it is not a text."""
    if not isinstance(text, str):
        return ""
    # JSON may spell half a surrogate pair, which cannot be written as UTF-8
    text = html.unescape(text).encode("utf-8", "ignore").decode()
    return " ".join(_MARKUP.sub(" ", text).split())


def _read_list(path: Path) -> list[Any]:
    try:
        content = read_json(path, ANNOTATIONS)
        if isinstance(content, list):
            return content
        problem = "no list"
    except ValueError as error:
        problem = str(error)
    wanted = "a list of {filename, wnid, title, description, tags}"
    raise ValueError(f"{path} ({problem}): give imagenet_captions.json, {wanted}")


def _clean_entry(entry: object) -> dict[str, Any] | None:
    """An entry with its texts cleaned; None where it does not say which image it is of."""
    if not isinstance(entry, dict):
        return None
    name, wnid, tags = (entry.get(key) for key in ("filename", "wnid", "tags"))
    # a plain name: the file cannot send the reader out of the folder
    if not isinstance(name, str) or not name.strip(".") or "/" in name:
        return None
    if not isinstance(wnid, str) or not _WNID.fullmatch(wnid):
        return None
    cleaned = [clean_text(tag) for tag in tags] if isinstance(tags, list) else []
    return {
        "title": clean_text(entry.get("title")),
        "description": clean_text(entry.get("description")),
        "tags": [tag for tag in cleaned if tag],
        "wnid": wnid,
        "filename": name,
    }
