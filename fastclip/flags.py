"""Flags as fields of dataclasses, which are a configuration's sections.

A field's type, default and the string under it make the flag, its value and its help
(`command_line`). `flag` adds what the three do not say: what a change means for a run that resumes.
"""

import difflib
from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, get_type_hints


def flag(
    default: Any, *, defines_run: bool, heading: str | None = None, inherited: bool = True
) -> Any:
    """A field of a dataclass of flags.

    Args:
        default: its value where the flag is not given.
        defines_run: whether a resumed run must have the value of its beginning to continue as it
            would have. A change is noted then.
        heading: under which `--help` lists it; None for that of its section.
        inherited: whether a resumed run has the value of its beginning where the flag is not given.
    """
    metadata = {"defines_run": defines_run, "heading": heading, "inherited": inherited}
    return field(default=default, metadata=metadata)


def sections(config: type) -> dict[str, type]:
    """The sections of a configuration by name: each of its fields is a dataclass of flags."""
    hints = get_type_hints(config)
    return {each.name: hints[each.name] for each in fields(config)}


def ordered(section: type) -> list[Field[Any]]:
    """The fields as `--help` lists them: the class's own before those that it inherits."""
    return sorted(fields(section), key=lambda each: each.name not in section.__annotations__)


def headed(config: type) -> dict[str, list[tuple[type, Field[Any]]]]:
    """The flags under each heading of `--help`, with the section that each is a field of.

    Those of the section that a heading is for come first.
    """
    kinds = sections(config)
    own: dict[str, list[tuple[type, Field[Any]]]] = {}
    others: dict[str, list[tuple[type, Field[Any]]]] = {}
    for part in fields(config):
        for each in ordered(kinds[part.name]):
            heading = each.metadata["heading"]
            found = own if heading is None else others
            name = heading or part.metadata["heading"]
            found.setdefault(name, []).append((kinds[part.name], each))
    return {name: own.get(name, []) + others.get(name, []) for name in own | others}


def defining(config: type) -> list[str]:
    """Names of the flags that a resumed run must share with its beginning."""
    return _marked(config, "defines_run")


def inherited(config: type) -> list[str]:
    """Names of the flags that a resumed run has from its beginning where they are not given."""
    return _marked(config, "inherited")


def _marked(config: type, mark: str) -> list[str]:
    parts = sections(config).values()
    return [each.name for part in parts for each in fields(part) if each.metadata[mark]]


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
            # what has lines below it was meant as a section
            names = arranged if isinstance(value, Mapping) else known
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
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
