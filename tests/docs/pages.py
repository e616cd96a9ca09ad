"""The pages that users read, and what tests take out of them."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.test_repo_shape import ROOT, tracked

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Fenced text: its language, what is in it, its line, and why it is not run, if so."""

    language: str
    text: str
    line: int
    not_run: str | None


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[Block]:
        """The fenced blocks of a language, in order."""
        found = []
        for match in _BLOCK.finditer(self.text):
            if match[1] == language:
                before = self.text[: match.start()]
                reason = _NOT_RUN.search(before)
                line = before.count("\n") + 1
                found.append(Block(language, match[2], line, reason[1] if reason else None))
        return found

    @cached_property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        return _BLOCK.sub("", self.text)

    def commands(self) -> list[list[str]]:
        """The words of every command in its shell blocks."""
        found = []
        for block in self.blocks("sh"):
            lines = block.text.replace("\\\n", " ").splitlines()
            found += [words for line in lines if (words := shlex.split(line, comments=True))]
        return found


ALL = [Page(path) for path in tracked("*.md")]
# what is run and parsed; studies and notes are reports of what was
READ = [
    page
    for page in ALL
    if page.path.parent in (ROOT, ROOT / "docs") and page.path.name != "CHANGELOG.md"
]


def table(header: str) -> list[list[str]]:
    """The cells of the one table, on any page, whose first line begins like this.

    Raises:
        AssertionError: there is none, or more than one.
    """
    found = [page for page in READ if f"\n{header}" in page.text]
    assert len(found) == 1, f"{header} is on {[str(page) for page in found]}"
    rows = found[0].text.split(f"\n{header}")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def names(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)
