"""Texts of unknown origin, made fit for a terminal."""

import re

# Control characters, C1's too, may move the cursor, set a title or clear the screen; marks of
# writing direction reorder what is read; halves of surrogate pairs cannot be written at all.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# What stands between "://" and the last "@" before a path; without "user:" it may be a token.
_SECRET = re.compile(r"(?<=://)[^/\s?#]*@")
# Signatures of signed URLs are in what follows the "?".
_QUERY = re.compile(r"(://[^\s?#]*\?)[^\s'\"]+")


def printable(text: str) -> str:
    """The text with what a terminal would obey escaped, and without the secrets of URLs.

    Tabs and line feeds stay: messages have several lines.
    """
    text = _QUERY.sub(r"\1***", _SECRET.sub("***@", text))
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_line(text: str) -> str:
    """As `printable`, on one line: what somebody else named begins no line of its own."""
    return printable(text).replace("\n", r"\n")
