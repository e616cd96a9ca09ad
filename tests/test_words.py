"""Words that were replaced by the field's own, in `words.toml`, stay out of code and pages."""

import re
import sys
from pathlib import Path

import pytest

from tests.test_repo_shape import ROOT, tracked

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIST = ROOT / "tests" / "words.toml"
WORDS = tomllib.loads(LIST.read_text())
PATTERN = re.compile(
    f"({'|'.join(map(re.escape, WORDS['stems']))})"
    rf"|(?<![A-Za-z])({'|'.join(map(re.escape, WORDS['phrases']))})(?![A-Za-z])",
    re.IGNORECASE,
)
# what was written when other words were used, and faults that are seeded by code of before
APART = (
    "benchmarks/results/",
    "benchmarks/notes/",
    "docs/studies/",
    "tests/mutants/",
)
ENDINGS = {
    ".cfg",
    ".cff",
    ".cpp",
    ".cu",
    ".cuh",
    ".h",
    ".hpp",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".txt",
}
ENDINGS |= {".json", ".yaml", ".yml", ""}


def searched() -> list[Path]:
    return [
        path
        for path in tracked("*")
        if path not in (LIST, Path(__file__))
        and path.suffix in ENDINGS
        and not str(path.relative_to(ROOT)).startswith(APART)
    ]


def found(text: str) -> set[str]:
    """What of the list is in the text, whose line breaks may split a phrase or a string."""
    line_break = r'"?\s*\n\s*(?:(?:#|//|\*|>|- )|f?")?\s*'
    unbroken = re.sub(r"\s+", " ", re.sub(line_break, " ", text))
    return {match[0].lower() for match in PATTERN.finditer(unbroken)}


def test_replaced_words_do_not_return() -> None:
    names = {str(path.relative_to(ROOT)): found(path.read_text()) for path in searched()}
    back = {name: words for name, words in names.items() if words}
    right = {name: set(words) for name, words in WORDS["exceptions"].items()}
    assert back == right, "tests/words.toml has what to say instead"


@pytest.mark.parametrize(
    "text",
    [
        "The optimiser.",
        "_run_labelled()",
        "its centre\n",
        "the rival",
    ],
)
def test_they_are_found(text: str) -> None:
    assert len(found(text)) == 1


def test_others_are_not() -> None:
    assert not found("arrivals, concentred, optimizer")
