"""Flags of the command line as fields of dataclasses, which are a configuration's sections.

A field's type, default and the string under it make the flag, its value and its help. `flag` adds
what the three do not say: what a change means for a run that resumes.
"""

import ast
import difflib
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_type_hints


def flag(default: Any, *, defines_run: bool) -> Any:
    """A field of a dataclass of flags.

    Args:
        default: its value where the flag is not given.
        defines_run: whether a resumed run must have the value of its beginning to continue as it
            would have. A change is noted then.
    """
    return field(default=default, metadata={"defines_run": defines_run})


def sections(config: type) -> dict[str, type]:
    """The sections of a configuration by name: each of its fields is a dataclass of flags."""
    hints = get_type_hints(config)
    return {each.name: hints[each.name] for each in fields(config)}


def ordered(section: type) -> list[Field[Any]]:
    """The fields as `--help` lists them: the class's own before those that it inherits."""
    return sorted(fields(section), key=lambda each: each.name not in section.__annotations__)


def defining(config: type) -> list[str]:
    """Names of the flags that a resumed run must share with its beginning."""
    return [
        each.name
        for section in sections(config).values()
        for each in fields(section)
        if each.metadata["defines_run"]
    ]


def flatten(config: Any) -> dict[str, Any]:
    """Every flag's value by the flag's name, without sections."""
    parts = [getattr(config, name) for name in sections(type(config))]
    return {each.name: getattr(part, each.name) for part in parts for each in fields(part)}


def arrange(config: type, values: Mapping[str, Any], origin: str = "") -> dict[str, dict[str, Any]]:
    """Values by section and field.

    Args:
        config: a class of sections.
        values: by the flags' names, with dashes or underscores; or by sections, which hold such; or
            both. A name is in one section alone, so that nothing has to say which.
        origin: what the values are of, for the message.

    Raises:
        ValueError: a name is unknown (the message has the nearest), comes twice, or is not one of
            the section that it is given in.
    """
    known = {each.name: name for name, part in sections(config).items() for each in fields(part)}
    arranged: dict[str, dict[str, Any]] = {name: {} for name in sections(config)}
    said = f"{origin}: " if origin else ""

    def put(key: Any, value: Any, section: str | None = None) -> None:
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{said}unknown key {key!r}{hint}")
        if section not in (None, known[name]):
            raise ValueError(f"{said}{key!r} is not in section {section!r} but in {known[name]!r}")
        if name in arranged[known[name]]:
            raise ValueError(f"{said}key {key!r} is given twice; leave one out")
        arranged[known[name]][name] = value

    for key, value in values.items():
        if key in arranged and isinstance(value, Mapping):
            for inner, content in value.items():
                put(inner, content, key)
        elif key in known or key not in arranged:
            put(key, value)
        # a section all of whose lines are commented out is empty
        elif value is not None:
            raise ValueError(f"{said}{key!r} is a section: give its `key: value` lines below it")
    return arranged


def check_least(section: Any, **least: float) -> None:
    """Check that fields are not below these values; None, where a field may be it, passes.

    Raises:
        ValueError: one is.
    """
    for name, minimum in least.items():
        value = getattr(section, name)
        if value is not None and value < minimum:
            raise ValueError(f"{flag_name(name)} is {value}; give at least {minimum}")


def check_positive(section: Any, *names: str) -> None:
    """Check that fields are above 0; None passes.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise ValueError(f"{flag_name(name)} is {value}; give a positive number")


def flag_name(name: str) -> str:
    """The flag of a field, as it is typed."""
    return "--" + name.replace("_", "-")


def help_texts(kind: type) -> dict[str, str]:
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


def parse_sections(config: type, arguments: Sequence[str], prog: str) -> dict[str, dict[str, Any]]:
    """The values of all flags of a configuration, by section and field.

    Flags have the fields' names alone; their help is by section. Values are of the fields' types
    and not checked any further.

    Raises:
        SystemExit: a flag is unknown or a value of the wrong type (said on standard error), or
            `--help` is asked for.
    """
    import tyro

    # flags of a section are named without the section
    bare: Any = tyro.conf.OmitArgPrefixes
    groups: list[Any] = []
    for name, section in sections(config).items():
        hints, texts = get_type_hints(section), help_texts(section)
        members = [
            (
                each.name,
                # as one line: the terminal's width alone decides where it is broken
                Annotated[hints[each.name], tyro.conf.arg(help=texts.get(each.name))],
                field(default=each.default),
            )
            for each in ordered(section)
        ]
        made: Any = make_dataclass(name, members, namespace={"__doc__": section.__doc__})
        groups.append((name, bare[made], field(default_factory=made)))
    whole: Any = make_dataclass(config.__name__, groups, namespace={"__doc__": config.__doc__})
    read: Any = tyro.cli(whole, args=list(arguments), prog=prog)
    return {name: vars(getattr(read, name)) for name in sections(config)}
