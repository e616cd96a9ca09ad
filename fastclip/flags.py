"""Flags of the command line as fields of a dataclass.

A field's type, default and the string under it make the flag, its value and its help. `flag` adds
what the three do not say: where `--help` lists it, and what a change means for a run that resumes.
"""

import ast
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal, get_type_hints

Group = Literal["data", "model", "optim", "loss", "distributed", "checkpoint", "log"]
# in the order of --help
GROUPS: dict[Group, str] = {
    "data": "What to train on, and how it is read and augmented.",
    "model": "What is trained, and how it is computed.",
    "optim": "Batches, steps and updates.",
    "loss": "Loss, and how processes share it.",
    "distributed": "Devices and processes.",
    "checkpoint": "Saving and resuming.",
    "log": "The run directory, metrics and evaluation.",
}


def flag(default: Any, group: Group, *, defines_run: bool) -> Any:
    """A field of a dataclass of flags.

    Args:
        default: its value where the flag is not given.
        group: heading under which `--help` lists it.
        defines_run: whether a resumed run must have the value of its beginning to continue as it
            would have. A change is noted then.
    """
    return field(default=default, metadata={"group": group, "defines_run": defines_run})


def defining(kind: type) -> list[str]:
    """Names of the fields that a resumed run must share with its beginning."""
    return [each.name for each in fields(kind) if each.metadata["defines_run"]]


def ordered(kind: type) -> list[Field[Any]]:
    """The fields by group, in each the class's own before those that it inherits."""
    groups = list(GROUPS)

    def place(each: Field[Any]) -> tuple[int, bool]:
        return groups.index(each.metadata["group"]), each.name not in kind.__annotations__

    return sorted(fields(kind), key=place)


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


def parse_grouped(kind: type, arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """The values of all fields of a dataclass whose every field is a `flag`.

    Flags have the fields' names alone; their help is in groups. Values are of the fields' types and
    not checked any further.

    Raises:
        SystemExit: a flag is unknown or a value of the wrong type (said on standard error), or
            `--help` is asked for.
    """
    import tyro

    hints, texts = get_type_hints(kind), help_texts(kind)
    # flags of a group are named without the group
    bare: Any = tyro.conf.OmitArgPrefixes
    groups: list[Any] = []
    for group, about in GROUPS.items():
        members = [
            (
                each.name,
                # as one line: the terminal's width alone decides where it is broken
                Annotated[hints[each.name], tyro.conf.arg(help=texts.get(each.name))],
                field(default=each.default),
            )
            for each in ordered(kind)
            if each.metadata["group"] == group
        ]
        made: Any = make_dataclass(group, members, namespace={"__doc__": about})
        groups.append((group, bare[made], field(default_factory=made)))
    whole: Any = make_dataclass(kind.__name__, groups, namespace={"__doc__": kind.__doc__})
    read: Any = tyro.cli(whole, args=list(arguments), prog=prog)
    return {
        each.name: getattr(getattr(read, each.metadata["group"]), each.name)
        for each in fields(kind)
    }
