"""Messages: one logger, `logging.getLogger("fastclip")`. Results are printed on standard output.

Imported as a library, fastclip gives the logger no handler: Python then shows warnings and errors
on standard error, and a program that wants more, less, or elsewhere configures the logger. The
command line shows all messages on standard error.
"""

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterator

from fastclip.printable import printable

logger = logging.getLogger("fastclip")
# of a terminal, in columns
WIDTH = 80


def _make_printable(record: logging.LogRecord) -> bool:
    # names of files and URLs come from elsewhere, and any handler may be a terminal's
    record.msg, record.args = printable(record.getMessage()), None
    return True


logger.addFilter(_make_printable)


def filled(start: str, text: str, indent: int | None = None) -> str:
    """A text behind what its first line starts with, at most 80 columns wide.

    Names and paths stay whole.

    Args:
        start: a label, padded.
        text: on one line.
        indent: blanks before further lines; by default as many as `start` has columns.

    Examples:
        >>> from fastclip.messages import filled
        >>> filled("step    ", "128 samples")
        'step    128 samples'
    """
    return textwrap.fill(
        start + text,
        WIDTH,
        subsequent_indent=" " * (len(start) if indent is None else indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def shortened(text: str, most: int) -> str:
    """A text of at most so many letters, on one line; a longer one is cut at a word.

    Args:
        text: of any length.
        most: at least 2.

    Examples:
        >>> from fastclip.messages import shortened
        >>> shortened("two cups, one of them chipped", 12)
        'two cups…'
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    # scripts without blanks are cut between letters
    words = line[:most].rpartition(" ")[0] or line[: most - 1]
    return words.rstrip(" ,;:.-") + "…"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun, as in "1 step" and "2,000 steps"; the plural by default ends in s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def note(text: str) -> None:
    """Report what is the same on all ranks: the first does."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(f"note: {text}")


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show messages on standard error, each as its text; a program's own handlers stay."""
    if logger.handlers:
        yield
        return
    level, propagate = logger.level, logger.propagate
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # a library may have given the root logger a handler: nothing is said twice
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
