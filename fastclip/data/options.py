"""What the flags say of data, apart from its name."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastclip.data.variants import without_photographs
from fastclip.flags import flag
from fastclip.messages import note

DatasetType = Literal[
    "auto", "webdataset", "csv", "coco", "imagefolder", "synthetic", "scenes", "collages"
]
CACHE_BYTES = 50 << 30


@dataclass(frozen=True)
class DataOptions:
    """How data is read; the fields are the flags of the same names.

    Args:
        dataset_type: what the data are: "auto" decides by their name; "webdataset", "csv", "coco",
            "imagefolder", "synthetic", "scenes" or "collages".
        csv_img_key: column of a table that holds the paths of images.
        csv_caption_key: column of a table that holds captions.
        csv_separator: one character between the columns of a table.
        image_root: folder of a table's images; None: beside the table.
        templates: file of prompt templates, one a line, for the captions of an image folder.
        captions: those of shards, scenes and collages by name, with weights, as
            "txt=1,recaption=3".
        cache_dir: folder that remote shards are fetched to; None: in the user's cache.
        cache_bytes: most bytes kept there.

    Raises:
        ValueError: the separator is not a single character, the sources of captions cannot be
            read, or the cache has no room at all.

    Examples:
        >>> from fastclip.data.options import DataOptions
        >>> DataOptions(csv_separator=",", captions="txt=1,recaption=3").caption_weights
        {'txt': 1.0, 'recaption': 3.0}
    """

    dataset_type: DatasetType = flag("auto", defines_run=True)
    """Type of the data; auto decides by its name. For --val-data in training it is used only if the
    name does not decide."""
    csv_img_key: str = flag("filepath", defines_run=True)
    """Column of a table with the paths of images."""
    csv_caption_key: str = flag("title", defines_run=True)
    """Column of a table with captions; rows with the same path are captions of one image."""
    csv_separator: str = flag("\\t", defines_run=True)
    """Character between the columns of a table; \\t is a tab."""
    image_root: str | None = flag(None, defines_run=True)
    """Folder that a table's paths are relative to; by default the table's folder."""
    templates: str | None = flag(None, defines_run=True)
    """File of prompt templates, one per line with {} or {c} for the class name: the captions of a
    folder of classes (by default 'a photo of a {}.') and the prompts of zero-shot evaluation."""
    captions: str | None = flag(None, defines_run=True)
    """Captions of shards, scenes and collages to sample from, with weights, as in
    'txt=1,recaption=3': txt is KEY.txt, other names are keys of KEY.json with a text or a list of
    texts; scenes and collages have alt, short and dense."""
    cache_dir: str | None = flag(None, defines_run=False)
    """Cache folder of remote shards; by default fastclip in the user's cache."""
    cache_bytes: int = flag(CACHE_BYTES, defines_run=False)
    """Maximum size of --cache-dir in bytes; the least recently used shards are deleted."""

    def __post_init__(self) -> None:
        # reported now, not when the first sample is read
        _ = self.caption_weights
        # a shell passes '\t' on as two characters, and help shows these
        if self.csv_separator == "\\t":
            object.__setattr__(self, "csv_separator", "\t")
        if len(self.csv_separator) != 1 or self.csv_separator in '"\r\n':
            raise ValueError(
                f"--csv-separator is {self.csv_separator!r}; give one character, e.g. ',' or '\\t'"
            )
        if self.cache_bytes <= 0:
            raise ValueError(f"--cache-bytes is {self.cache_bytes}; give a positive number")

    @property
    def caption_weights(self) -> dict[str, float]:
        """The sources of captions with their weights; empty where none are named."""
        return parse_weights(self.captions) if self.captions else {}

    @classmethod
    def of(cls, flags: Any) -> "DataOptions":
        """The options among a configuration's fields.

        Args:
            flags: any object; fields that it lacks keep their defaults.
        """
        names = [field.name for field in fields(cls) if hasattr(flags, field.name)]
        return cls(**{name: getattr(flags, name) for name in names})


def parse_weights(text: str) -> dict[str, float]:
    """Names with positive weights from e.g. 'txt=1,recaption=3'; without '=', the weight is 1.

    Raises:
        ValueError: a name is empty or comes twice, or a weight is not a positive number.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        try:
            weight = float(value) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not name or name in weights or not 0 < weight < math.inf:
            raise ValueError(
                f"--captions {text!r}: give each source once with a positive weight, "
                "e.g. 'txt=1,recaption=3'"
            )
        weights[name] = weight
    return weights


def parse_sources(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Data by name, from NAME=DATA; data without a name are called by the last part of their path.

    Args:
        texts: what the flag was given.
        flag: as it is typed, for messages.

    Raises:
        ValueError: a source is empty, or two have the same name.

    Examples:
        >>> from fastclip.data.options import parse_sources
        >>> parse_sources(["coco=/data/a.json", "s3://b/val-{00..04}.tar"], "--retrieval-data")
        {'coco': '/data/a.json', 'val': 's3://b/val-{00..04}.tar'}
    """
    sources: dict[str, str] = {}
    for text in texts:
        # variants of scenes and URLs have '=' too, behind a colon or a slash
        named = re.fullmatch(r"([\w.-]+)=(.*)", text, re.DOTALL)
        name, data = named.groups() if named else (_name_of(text), text)
        if not name or not data or name in sources:
            raise ValueError(
                f"{flag} {' '.join(texts)}: give NAME=DATA with a name of its own for each"
            )
        sources[name] = data
    return sources


def _name_of(data: str) -> str:
    """The last part of a path, up to its pattern or ending."""
    last = without_photographs(data.split("::")[0]).rstrip("/").rpartition("/")[2]
    return re.split(r"[^\w-]", last, maxsplit=1)[0].rstrip("-_")


def without_commands(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """A configuration of before, when data could be commands, without its `allow_commands`.

    Raises:
        ValueError: it allows them.
    """
    kept = {key: v for key, v in values.items() if str(key).replace("-", "_") != "allow_commands"}
    if any(value for key, value in values.items() if key not in kept):
        raise ValueError(
            f"{origin}: allow_commands is true, and fastclip runs no commands; name data by paths "
            "or by URLs that fsspec reads, and delete the key"
        )
    if len(kept) < len(values):
        note(f"{origin}: allow_commands is not used any more; delete the key")
    return kept
