"""Messages quoted on the troubleshooting page are those of the code, word for word."""

import ast
import re

import pytest

from tests.docs.pages import Page
from tests.test_repo_shape import ROOT, tracked

PAGE = Page(ROOT / "docs" / "troubleshooting.md")
QUOTED = [line for block in PAGE.blocks("text") for line in block.text.splitlines()]
SHORTEST = 10


def _text(node: ast.expr) -> str:
    """A string's text, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    return "…"


@pytest.fixture(scope="module")
def texts() -> str:
    """All strings of the package, with constants of text filled in."""
    found = []
    for path in tracked("fastclip/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                found.append(_text(node))
    return "\n".join(found)


def test_something_is_quoted() -> None:
    assert len(QUOTED) > 30


@pytest.mark.parametrize("line", QUOTED)
def test_it_is_the_codes(line: str, texts: str) -> None:
    pieces = [piece.strip(" :;,.()") for piece in re.split("…", line)]
    for piece in pieces:
        if len(piece) >= SHORTEST:
            assert piece in texts, piece
