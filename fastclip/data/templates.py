"""Prompt templates: captions made of class names."""

from pathlib import Path

from fastclip.bounded import read_text
from fastclip.data.remote import beside, is_remote, read_small

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
    return _lines(read_text(path))


def read_beside(data: str, names: tuple[str, ...]) -> list[str] | None:
    """The lines of the first of the named files that is in the folder of `data`; None without one.

    Args:
        data: a path, or the URL of a remote shard.
        names: of files.

    Raises:
        ValueError: the file is not UTF-8, no regular file, or over 16 MiB.
        FetchError: a remote file could not be read.
    """
    if not is_remote(data):
        folder = Path(data).expanduser().parent
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        return None if path is None else read_lines(path)
    urls = [beside(data, name) for name in names]
    found = read_small(urls)
    url = next((url for url in urls if url in found), None)
    if url is None:
        return None
    try:
        return _lines(found[url].decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 ({error})") from error


def _lines(text: str) -> list[str]:
    # not splitlines, which also splits at separators that names may contain
    lines = [line.strip() for line in text.removeprefix("\ufeff").split("\n")]
    return [line for line in lines if line]
