"""Variants of an embedded world, as `scenes:split=val,caption=dense` names them."""

from collections.abc import Mapping, Sequence


def parse_variant(
    data: str,
    keys: Mapping[str, Sequence[str]],
    *,
    several: tuple[str, ...] = (),
    last: str | None = None,
) -> dict[str, str]:
    """The values that a variant gives to its keys.

    Args:
        data: the world's name, alone or with ":KEY=VALUE,..." behind it.
        keys: the values that each key may have.
        several: keys of which several values may be joined by '+'.
        last: a key with any value, which is the rest of the text, commas and all.

    Raises:
        ValueError: a key or value is unknown, a key comes twice, or one comes behind the last.

    Examples:
        >>> from fastclip.data.variants import parse_variant
        >>> keys = {"split": ("train", "val")}
        >>> parse_variant("collages:split=val,photos=a,b.tar", keys, last="photos")
        {'photos': 'a,b.tar', 'split': 'val'}
    """
    options = data.partition(":")[2]
    known = (*keys, last) if last else tuple(keys)
    chosen: dict[str, str] = {}
    if last and f",{last}=" in f",{options}":
        options, _, rest = f",{options}".partition(f",{last}=")
        for key in known:
            if f",{key}=" in rest:
                raise ValueError(
                    f"{data!r}: {last}= takes the rest of the text, and {key}= follows it; give "
                    f"{last}= once, as the last key"
                )
        if not rest:
            raise ValueError(f"{data!r}: {last}= is empty; leave it out, or name data")
        chosen[last] = rest
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in keys:
            raise ValueError(f"{data!r}: unknown key {key!r}; known are {', '.join(known)}")
        for one in value.split("+") if key in several else [value]:
            if one not in keys[key]:
                allowed = ", ".join(keys[key])
                raise ValueError(f"{data!r}: unknown {key} {one!r}; known are {allowed}")
        if key in chosen:
            raise ValueError(f"{data!r} gives {key} twice")
        chosen[key] = value
    return chosen


def check_captions(world: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError where a world has no captions of one of the names."""
    for name in names:
        if name not in known:
            listed = ", ".join(known)
            raise ValueError(f"{world} have no captions called {name!r}; they have {listed}")


def without_photographs(data: str) -> str:
    """The name of collages without that of their photographs; other data as they are.

    Examples:
        >>> from fastclip.data.variants import without_photographs
        >>> without_photographs("collages:split=val,photos=/data/{0..4}.tar")
        'collages:split=val'
    """
    if data.partition(":")[0] != "collages":
        return data
    return data.partition("photos=")[0].rstrip(":,")
