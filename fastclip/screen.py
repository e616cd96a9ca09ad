"""Markdown on a screen: reports are files for a browser, and are printed too."""

from collections.abc import Iterator, Sequence

from fastclip.messages import WIDTH, filled


def on_screen(text: str, width: int = WIDTH) -> str:
    """A Markdown text whose lines fit a terminal; it is Markdown still.

    Paragraphs and items of lists are broken between words, at 80 columns. A table that is wider
    than `width` becomes several, each with the first column.

    Args:
        text: paragraphs, lists and tables, with blank lines between them.
        width: of a row of a table, at most; one with a single further column may be wider.

    Examples:
        >>> from fastclip.screen import on_screen
        >>> print(on_screen("| run | loss | accuracy |\\n| --- | --- | --- |\\n| a | 1 | 2 |", 20))
        | run | loss |
        | --- | --- |
        | a | 1 |
        <BLANKLINE>
        | run | accuracy |
        | --- | --- |
        | a | 2 |
    """
    blocks: list[str] = []
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if block.startswith("| "):
            blocks += _tables([line[1:-1].split("|") for line in lines if line], width)
        else:
            blocks.append("\n".join(filled("", line, indent=_indent(line)) for line in lines))
    return "\n\n".join(blocks)


def _indent(line: str) -> int:
    return 2 if line.startswith("- ") else 0


def _tables(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    groups: list[list[int]] = [[]]
    for column in range(1, len(rows[0])):
        wider = [0, *groups[-1], column]
        if groups[-1] and max(len(_row(row, wider)) for row in rows) > width:
            groups.append([])
        groups[-1].append(column)
    return ("\n".join(_row(row, [0, *group]) for row in rows) for group in groups)


def _row(cells: Sequence[str], columns: Sequence[int]) -> str:
    return f"|{'|'.join(cells[column] for column in columns)}|"
