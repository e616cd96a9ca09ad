"""Prompt templates: captions made of class names."""

from pathlib import Path

from fastclip.bounded import read_text

DEFAULT_TEMPLATES = ("a photo of a {}.",)

# Looked for beside data, in this order: CLIP_benchmark's names, then fastclip's own.
CLASS_FILES = ("classnames.txt", "classes.txt")
TEMPLATE_FILES = ("zeroshot_classification_templates.txt", "templates.txt")


def fill_template(template: str, name: str) -> str:
    """The template with its {} or {c} replaced by the class name.

    Raises:
        ValueError: the template has no such place.
    """
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"template {template!r} has no {{}} or {{c}} for the class name")
    return template.replace("{}", name).replace("{c}", name)


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file, stripped, without a byte-order mark.

    Raises:
        ValueError: it is not UTF-8, no regular file, or over 16 MiB.
        FileNotFoundError: there is no such file.
    """
    # not splitlines, which also splits at separators that names may contain
    lines = [line.strip() for line in read_text(path).removeprefix("\ufeff").split("\n")]
    return [line for line in lines if line]


def find_beside(data: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named files in the folder of `data`."""
    return next((data.parent / name for name in names if (data.parent / name).is_file()), None)
