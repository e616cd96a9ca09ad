"""Command lines read into dataclasses of flags, and the help that is made of them.

Help is broken into lines once, by the width of the terminal: the strings under fields and the
docstrings of commands are broken in the source too, for its own width, and are made whole first.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from types import MappingProxyType
from typing import Any, TextIO, get_args, get_type_hints

from fastclip.flags import flag_name, headed, sections
from fastclip.messages import logger, shown

_COLORS = re.compile(r"\x1b\[[\d;]*m")
# an option, and not a negative number
_OPTION = re.compile(r"--?[a-zA-Z][\w-]+")
# what every command has
_OF_ALL = {"--help"}


def parse_flags(
    kind: Any, arguments: Sequence[str], prog: str, *, description: str | None = None
) -> Any:
    """A command's flags.

    Args:
        kind: a dataclass whose fields are the flags, or a union of such, one a subcommand.
        arguments: of the command line.
        prog: the command as it is typed.
        description: of the command; by default the docstring of `kind`.

    Raises:
        SystemExit: a flag is unknown, missing or a value of the wrong type (said on standard
            error), or `--help` is asked for.
    """
    import tyro

    parts = {part for command in _dataclasses(kind) for part in (command, *_parts(command))}
    _refuse_unknown(arguments, [each.name for part in parts for each in fields(part)], prog)
    for command in _dataclasses(kind):
        command.__doc__ = _as_paragraphs(command.__doc__)
        for part in (command, *_parts(command)):
            texts = help_texts(part)
            for each in fields(part):
                each.metadata = MappingProxyType({"help": texts.get(each.name), **each.metadata})
    # a script for a shell's completion is printed as it is
    output: Any = _Wrapping(sys.stdout) if _asks_for_help(arguments) else sys.stdout
    with contextlib.redirect_stdout(output):
        return tyro.cli(kind, args=list(arguments), prog=prog, description=description)


def parse_sections(
    config: type, arguments: Sequence[str], prog: str, headings: Mapping[str, str]
) -> dict[str, Any]:
    """The values of all flags of a configuration, by name.

    Flags have the fields' names alone. Values are of the fields' types and not checked any further.

    Args:
        config: a class of sections.
        arguments: of the command line.
        prog: the command as it is typed.
        headings: of the help, in their order, each a word with a sentence.

    Raises:
        SystemExit: a flag is unknown or a value of the wrong type (said on standard error), or
            `--help` is asked for.
    """
    import tyro

    # flags of a section are named without the section
    bare: Any = tyro.conf.OmitArgPrefixes
    groups: list[Any] = []
    flags = headed(config)
    names = [each.name for members in flags.values() for _, each in members]
    _refuse_unknown(arguments, names, prog)
    # tyro takes longer for all flags than what else starts a run: it gets those that are given,
    # and all where they are listed
    given = {_option(argument) for argument in arguments}
    if _asks_for_help(arguments) or any(map(_is_tyros, given)):
        given |= {flag_name(name) for name in names}
    values: dict[str, Any] = {}
    types = {section: get_type_hints(section) for section in sections(config).values()}
    for heading, text in headings.items():
        listed = flags.pop(heading)
        values |= {each.name: each.default for _, each in listed}
        members = [
            (
                each.name,
                types[section][each.name],
                field(default=each.default, metadata={"help": help_texts(section).get(each.name)}),
            )
            for section, each in listed
            if given & {flag_name(each.name), flag_name(f"no_{each.name}")}
        ]
        if members:
            made: Any = make_dataclass(heading, members, namespace={"__doc__": text})
            groups.append((heading, bare[made], field(default_factory=made)))
    assert not flags, f"no such heading: {', '.join(flags)}"
    whole: Any = make_dataclass(config.__name__, groups, namespace={"__doc__": config.__doc__})
    read: Any = parse_flags(whole, arguments, prog)
    for heading, *_ in groups:
        values |= vars(getattr(read, heading))
    return values


def _option(argument: str) -> str:
    """An argument as the flag that it may be, without a value and as `--help` spells it."""
    return "--" + argument.partition("=")[0].lstrip("-").replace("_", "-")


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def _is_tyros(option: str) -> bool:
    """Whether it is one of tyro's own, which make scripts for a shell's completion."""
    return option.startswith("--tyro-")


def _refuse_unknown(arguments: Sequence[str], names: Iterable[str], prog: str) -> None:
    """Report options that are none of a command's, each with the nearest that is.

    Raises:
        SystemExit: there are such.
    """
    known = {flag_name(name) for name in names} | _OF_ALL
    known |= {flag_name(f"no_{name[2:]}") for name in known}
    problems = []
    for argument in arguments:
        given, name = argument.partition("=")[0], _option(argument)
        unknown = name not in known or not given.startswith("--")
        if not unknown or not _OPTION.fullmatch(given) or _is_tyros(name):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"{given} is unknown" + (f"; did you mean {near[0]}?" if near else ""))
    if problems:
        with shown():
            logger.error(f"{prog}: error: {'; '.join(problems)} ({prog} --help lists all options)")
        raise SystemExit(2)


def refuse_renamed(arguments: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Refuse flags that have another name now.

    Args:
        arguments: of a command line.
        renamed: from an old flag, or an old flag and its value, to what is written now.

    Raises:
        ValueError: an old one is given; the message has the new one.
    """
    words: list[str] = []
    for argument in arguments:
        flag, *value = argument.split("=", 1) if argument.startswith("--") else [argument]
        words += [flag.replace("_", "-") if argument.startswith("--") else flag, *value]
    for old, new in renamed.items():
        size = len(old.split())
        if any(words[i : i + size] == old.split() for i in range(len(words))):
            raise ValueError(f"{old} has been renamed; write {new}")


@functools.cache
def help_texts(kind: type) -> Mapping[str, str]:
    """The string under each field, inherited ones included, as one line."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        try:
            (definition,) = ast.parse(inspect.getsource(base)).body
        except OSError:
            # installed without sources: flags work, and have no help
            continue
        assert isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = ast.literal_eval(following.value)
                texts[ast.unparse(statement.target)] = " ".join(text.split())
    return texts


def _dataclasses(kind: Any) -> Iterator[type]:
    """Those that a type is made of, a dataclass alone or the members of a union."""
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
    for part in get_args(kind):
        yield from _dataclasses(part)


def _parts(kind: type) -> Iterator[type]:
    """The dataclasses that are fields of a dataclass."""
    for hint in get_type_hints(kind).values():
        for part in _dataclasses(hint):
            yield from (part, *_parts(part))


def _as_paragraphs(text: str | None) -> str | None:
    """Each paragraph as one line."""
    if text is None:
        return None
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


class _Wrapping:
    """Standard output, whose lines are broken between words at the terminal's width."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        width = shutil.get_terminal_size().columns
        return self._stream.write("\n".join(_wrapped(line, width) for line in text.split("\n")))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _wrapped(line: str, width: int) -> str:
    if len(_COLORS.sub("", line)) <= width:
        return line
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
