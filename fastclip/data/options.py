"""What the flags say of data, apart from its name."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

DatasetType = Literal["auto", "webdataset", "csv", "coco", "imagefolder", "synthetic", "scenes"]
CACHE_BYTES = 50 << 30


@dataclass(frozen=True)
class DataOptions:
    """How data is read; the fields are the flags of the same names.

    Args:
        dataset_type: "auto" tells by the data's name.
        csv_img_key, csv_caption_key: the columns of a table that hold image paths and captions.
        csv_separator: one character between columns, or the two characters \\t for a tab.
        image_root: folder that relative image paths of tables begin at; None for the defaults of
            `fastclip.data.tables`.
        templates: file of prompt templates that make an ImageFolder's captions, one a line.
        cache_dir: folder that remote shards are fetched to; None for the user's cache folder.
        cache_bytes: most bytes kept in it.

    Raises:
        ValueError: the separator is no single character, or the cache has no room at all.
    """

    dataset_type: DatasetType = "auto"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str = "\t"
    image_root: str | Path | None = None
    templates: str | Path | None = None
    cache_dir: str | Path | None = None
    cache_bytes: int = CACHE_BYTES

    def __post_init__(self) -> None:
        # a shell passes '\t' on as two characters
        if self.csv_separator == "\\t":
            object.__setattr__(self, "csv_separator", "\t")
        if len(self.csv_separator) != 1 or self.csv_separator in '"\r\n':
            raise ValueError(
                f"--csv-separator is {self.csv_separator!r}; give one character, e.g. ',' or '\\t'"
            )
        if self.cache_bytes <= 0:
            raise ValueError(f"--cache-bytes is {self.cache_bytes}; give a positive number")

    @classmethod
    def of(cls, flags: Any) -> "DataOptions":
        """The options among a configuration's fields; those it lacks keep their defaults."""
        names = [field.name for field in fields(cls) if hasattr(flags, field.name)]
        return cls(**{name: getattr(flags, name) for name in names})
