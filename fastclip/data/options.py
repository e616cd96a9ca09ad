"""What the flags say of data, apart from its name."""

from dataclasses import dataclass, fields
from typing import Any, Literal

DatasetType = Literal["auto", "webdataset", "csv", "coco", "imagefolder", "synthetic", "scenes"]
CACHE_BYTES = 50 << 30


@dataclass(frozen=True)
class DataOptions:
    """How data is read; the fields are the flags of the same names.

    Raises:
        ValueError: the separator is no single character, or the cache has no room at all.
    """

    dataset_type: DatasetType = "auto"
    """What the data are; auto tells by the name."""
    csv_img_key: str = "filepath"
    """Column of a table that holds the paths of images."""
    csv_caption_key: str = "title"
    """Column of a table that holds captions."""
    csv_separator: str = "\t"
    """One character between the columns of a table; \\t means a tab."""
    image_root: str | None = None
    """Folder of a table's images; by default beside the table."""
    templates: str | None = None
    """File of prompt templates, one a line with {} or {c} for the class name; they make an
    image folder's captions, and the prompts of a zero-shot evaluation."""
    cache_dir: str | None = None
    """Folder that remote shards are fetched to; by default fastclip in the user's cache."""
    cache_bytes: int = CACHE_BYTES
    """Most bytes kept there."""

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
