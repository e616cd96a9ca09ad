"""What MkDocs needs beyond mkdocs.yml: pages and files from outside docs/, and their links."""

import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
DOCS = PurePosixPath("docs")
HOME = "index.md"
# a Markdown link or image to a file: neither an address nor an anchor of the page itself
LINK = re.compile(r"(!?\[[^\]]*\]\()(?![a-z]+:|#)([^)#\s]+)([^)\s]*\))")


def anchor(text: str, separator: str) -> str:
    """A heading's anchor as code hosts make it, which is what the pages' links are written for."""
    kept = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", text).strip().lower())
    return kept.replace(" ", separator)


def on_files(files: Files, config: Any) -> Files:
    """Add the README as first page, the pages beside it, and every file that a page links to."""
    pages = {"README.md", *(str(uri) for uri in _nav(config["nav"]) if (ROOT / str(uri)).is_file())}
    for name in sorted(pages):
        _add(files, config, PurePosixPath(name), InclusionLevel.INCLUDED)
    for page in list(files.documentation_pages()):
        for target in _targets(page):
            if _place(target) not in files.src_uris and (ROOT / target).is_file():
                _add(files, config, target, InclusionLevel.NOT_IN_NAV)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at where the site has their files."""
    here = PurePosixPath(page.file.src_uri)
    return LINK.sub(lambda link: link[1] + _link(here, link[2]) + link[3], markdown)


def _nav(entries: list[Any]) -> list[Any]:
    found: list[Any] = []
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += _nav(value) if isinstance(value, list) else [value]
    return found


def _add(files: Files, config: Any, path: PurePosixPath, inclusion: InclusionLevel) -> None:
    source = str(ROOT / path)
    files.append(File.generated(config, _place(path), abs_src_path=source, inclusion=inclusion))


def _source(uri: PurePosixPath) -> PurePosixPath:
    """Where a page of the site lies in the checkout."""
    if str(uri) == HOME:
        return PurePosixPath("README.md")
    return uri if (ROOT / uri).is_file() else DOCS / uri


def _place(path: PurePosixPath) -> str:
    """Where a file of the checkout lies in the site: docs/ is its root."""
    if str(path) == "README.md":
        return HOME
    return str(path.relative_to(DOCS) if path.is_relative_to(DOCS) else path)


def _target(page: PurePosixPath, link: str) -> PurePosixPath:
    """The file of the checkout that a page's link means."""
    parts: list[str] = []
    for part in (_source(page).parent / link).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    return PurePosixPath(*parts)


def _targets(page: File) -> list[PurePosixPath]:
    here = PurePosixPath(page.src_uri)
    return [_target(here, link) for _, link, _ in LINK.findall(page.content_string)]


def _link(page: PurePosixPath, link: str) -> str:
    target = _place(_target(page, link))
    up = len(page.parts) - 1
    return "../" * up + target
