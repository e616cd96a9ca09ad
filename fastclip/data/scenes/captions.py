"""Captions of three qualities and hard negatives, each with the claims that its text makes.

A text is composed from claims, never the other way round: a claim is chosen from the scene graph,
checked with `holds`, and then phrased. A negative is the short caption of the same seed with one
thing changed in its claim, phrased alike, so that nothing but the change distinguishes the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from fastclip.data.scenes.world import (
    COLORS,
    HELD_OUT,
    OPPOSITE,
    SHAPES,
    SIZES,
    Claim,
    Mention,
    Object,
    Scene,
    has_held_out,
    holds,
    relation_between,
)
from fastclip.data.streams import Stream, check_choice

QUALITIES = ("short", "alt", "dense")
NEGATIVE_KINDS = ("attribute", "relation", "order")

_VALUES = {"color": COLORS, "shape": SHAPES, "size": tuple(SIZES)}
_NUMBERS = ("no", "one", "two", "three")

# "by itself" claims that there is no other object; see _short.
_ALONE = "{a} by itself"
_SHORT_ONE = ("{a}", "{a}", "a picture of {a}", "there is {a}", _ALONE)
_SHORT_TWO = (
    "{a} {rel} {b}",
    "{a} {rel} {b}",
    "{a} is {rel} {b}",
    "there is {a} {rel} {b}",
    "{b} with {a} {rel} it",
)
_SHORT_THIRD = (", plus {c}", ", and also {c}")
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above"),
    "below": ("below", "below"),
}

# {n} and {m} are noun phrases, {id} a number, {s} a plural ending.
_ALT_VAGUE = (
    "image",
    "picture",
    "untitled",
    "my picture",
    "thumbnail",
    "IMG_{id}.JPG",
    "DSC0{id}",
    "download ({id})",
    "image {id} | free download",
    "best deal online, shop now!",
)
_ALT_COUNT = (
    "{count} shape{s}",
    "{count} shape{s} for kids",
    "{count} simple shape{s}, royalty free",
    "{count} shape{s} - stock image {id}",
)
_ALT_ONE = (
    "{n}",
    "{n}",
    "{n} free download",
    "{n} | stock image {id}",
    "cute {n}!! best price",
    "buy {n} online - fast shipping",
    "new {n}, high quality, on sale now",
    "{n} for sale",
)
_ALT_TWO = (
    "{n} and {m}",
    "{n}, {m}",
    "{n} + {m} | royalty free",
    "{n} with {m} - high resolution",
    "{n} {rel} {m}",
)
_ALT_FILES = ("{n}.png", "{n}_{id}.jpg", "{n}_final.png", "{id}_{n}.jpg")

_BACKGROUND_WORDS = {
    "white": "a plain white background",
    "gray": "a plain gray background",
    "black": "a plain black background",
    "beige": "a plain beige background",
    "gradient": "a smooth gradient background",
    "speckled": "a speckled background",
    "gridded": "a background of grid lines",
    "brick": "a brick wall background",
}
_STYLE_WORDS = {
    "filled": "in flat solid color",
    "bordered": "in solid color with a dark border",
    "shaded": "with a soft shine",
    "outline": "in outline only",
    "sketch": "as a rough pencil sketch",
    "hatched": "with diagonal hatching",
    "stippled": "with many small dots",
}
_DENSE_INTRO = (
    "The picture shows {count} on {bg}.",
    "{Count} on {bg}.",
    "This is an image of {count} on {bg}.",
    "On {bg} there {is_are} {count}.",
)


@dataclass(frozen=True)
class _Phrasing:
    """The choices of words that a short caption and its negatives share."""

    template: str
    third: str
    relation_form: int


def _noun(mention: Mention) -> str:
    words = (mention.size, mention.color, mention.shape or "shape")
    return " ".join(word for word in words if word)


def _mention(obj: Object, with_size: bool = True) -> Mention:
    return Mention(obj.color, obj.shape, obj.size if with_size else None)


def _say_short(claim: Claim, phrasing: _Phrasing) -> str:
    # No word of the vocabulary starts with a vowel: the article is always "a".
    names = {key: f"a {_noun(m)}" for key, m in zip("abc", claim.objects, strict=False)}
    if claim.relation is not None:
        names["rel"] = _RELATION_WORDS[claim.relation][phrasing.relation_form]
    return (phrasing.template + (phrasing.third if "c" in names else "")).format(**names)


def _short(scene: Scene, seed: int) -> tuple[_Phrasing, Claim]:
    stream = Stream(scene.seed, seed, QUALITIES.index("short"))
    with_size = stream.below(3) > 0
    mentions = tuple(_mention(obj, with_size) for obj in scene.objects)
    template = stream.choice(_SHORT_ONE if len(mentions) == 1 else _SHORT_TWO)
    phrasing = _Phrasing(template, stream.choice(_SHORT_THIRD), stream.below(2))
    return phrasing, Claim(mentions, scene.relation, count=1 if template == _ALONE else None)


def _vague_mention(obj: Object, stream: Stream) -> Mention:
    """Some of the object's attributes, most often its color and shape."""
    return Mention(
        obj.color if stream.below(10) < 6 else None,
        obj.shape if stream.below(10) < 8 else None,
        obj.size if stream.below(10) < 2 else None,
    )


def _alt(scene: Scene, seed: int) -> tuple[str, tuple[Claim, ...]]:
    stream = Stream(scene.seed, seed, QUALITIES.index("alt"))
    number, kind = str(100 + stream.below(9900)), stream.below(20)
    count = len(scene.objects)
    if kind < 4:
        return stream.choice(_ALT_VAGUE).format(id=number), ()
    if kind < 6:
        text = stream.choice(_ALT_COUNT)
        plural = "s" if count > 1 else ""
        return text.format(count=count, s=plural, id=number), (Claim(count=count),)
    mentions = [_vague_mention(obj, stream) for obj in scene.objects[:2]]
    two = count > 1 and kind >= 13
    if not two:
        mentions = [stream.choice(mentions)]
    claim = Claim(tuple(mentions))
    names = [_noun(m) for m in mentions]
    if kind % 4 == 0:
        separator = stream.choice(("_", "-"))
        joined = separator.join(" ".join(names).split())
        return stream.choice(_ALT_FILES).format(n=joined, id=number), (claim,)
    template = stream.choice(_ALT_TWO if two else _ALT_ONE)
    words = {"n": names[0], "m": names[-1], "id": number}
    if "{rel}" in template:
        claim = replace(claim, relation=scene.relation)
        words["rel"] = scene.relation or ""
    text = template.format(**words)
    letters = stream.below(6)
    return (text.title() if letters == 0 else text.upper() if letters == 1 else text), (claim,)


def _dense(scene: Scene, seed: int) -> tuple[str, tuple[Claim, ...]]:
    stream = Stream(scene.seed, seed, QUALITIES.index("dense"))
    count = len(scene.objects)
    plural = "s" if count > 1 else ""
    number = f"{_NUMBERS[count]} shape{plural}"
    intro = stream.choice(_DENSE_INTRO).format(
        count=number,
        Count=number.capitalize(),
        bg=_BACKGROUND_WORDS.get(scene.background, f"a {scene.background} background"),
        is_are="are" if count > 1 else "is",
    )
    sentences = [(intro, Claim(background=scene.background, count=count))]
    sentences += _dense_objects(scene, stream)
    sentences += _dense_relations(scene, stream)
    verb = "are" if count > 1 else "is"
    style = f"The shape{plural} {verb} drawn {_STYLE_WORDS[scene.style]}."
    sentences.insert(stream.choice((1, len(sentences))), (style, Claim(style=scene.style)))
    return " ".join(text for text, _ in sentences), tuple(claim for _, claim in sentences)


def _dense_objects(scene: Scene, stream: Stream) -> list[tuple[str, Claim]]:
    mentions = [_mention(obj) for obj in scene.objects]
    names = [f"a {_noun(m)}" for m in mentions]
    if len(mentions) == 1:
        text = stream.choice(("It is {}.", "The shape is {}.", "We see {}.")).format(names[0])
        return [(text, Claim(tuple(mentions)))]
    if stream.below(2) == 0:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        text = stream.choice(("There is {}.", "They are {}.", "We see {}.")).format(listed)
        return [(text, Claim(tuple(mentions)))]
    starts = ["One of them is", "Another is", "The last is"]
    if len(names) == 2:
        starts = ["One is", "The other is"]
    said = zip(starts, names, mentions, strict=True)
    return [(f"{start} {name}.", Claim((mention,))) for start, name, mention in said]


def _dense_relations(scene: Scene, stream: Stream) -> list[tuple[str, Claim]]:
    sentences = []
    for pair in combinations(scene.objects, 2):
        a, b = pair if stream.below(2) == 0 else pair[::-1]
        relation = relation_between(a, b)
        if relation is None:
            continue
        # Color and shape name one object of the scene, so "the" is right.
        first, second = _mention(a, with_size=False), _mention(b, with_size=False)
        words = stream.choice(_RELATION_WORDS[relation])
        verb = stream.choice(("is", "is placed", "lies"))
        text = f"The {_noun(first)} {verb} {words} the {_noun(second)}."
        sentences.append((text, Claim((first, second), relation)))
    return sentences


def caption_claims(scene: Scene, quality: str, seed: int = 0) -> tuple[str, tuple[Claim, ...]]:
    """The text that `caption` returns and every claim it makes, all true of the scene.

    Args:
        scene: what to describe.
        quality: "short", "alt" or "dense".
        seed: chooses the phrasing, together with the scene's own seed.

    Raises:
        ValueError: another quality.

    Examples:
        >>> from fastclip.data.scenes import caption_claims, holds, sample_scene
        >>> scene = sample_scene(7)
        >>> text, claims = caption_claims(scene, "dense")
        >>> all(holds(claim, scene) for claim in claims)
        True
    """
    check_choice("quality", quality, QUALITIES)
    if quality == "alt":
        return _alt(scene, seed)
    if quality == "dense":
        return _dense(scene, seed)
    phrasing, claim = _short(scene, seed)
    return _say_short(claim, phrasing), (claim,)


def caption(scene: Scene, quality: str = "short", seed: int = 0) -> str:
    """A true caption of the scene, in one of several phrasings.

    Args:
        scene: what to describe.
        quality: "short", one phrase with every object's color and shape, often the sizes, and the
            relation; "alt", the kind of text found beside pictures on the web: vague, a file name,
            attributes missing, words that sell; or "dense", several sentences on every object, the
            relations, the background and the style.
        seed: chooses the phrasing, together with the scene's own seed.

    Raises:
        ValueError: another quality.

    Examples:
        >>> from fastclip.data.scenes import caption, sample_scene
        >>> scene = sample_scene(7, objects=2)
        >>> caption(scene)
        'there is a small red cross below a large cyan diamond'
        >>> caption(scene, "alt")
        'Large Diamond | Stock Image 7262'
    """
    return caption_claims(scene, quality, seed)[0]


def _attribute_edits(claim: Claim, stream: Stream) -> Iterator[Claim]:
    """The claim with two objects' attributes swapped, or one attribute replaced."""
    mentions = claim.objects
    for i, j in combinations(range(len(mentions)), 2):
        for name in _VALUES:
            edited = list(mentions)
            edited[i] = replace(mentions[i], **{name: getattr(mentions[j], name)})
            edited[j] = replace(mentions[j], **{name: getattr(mentions[i], name)})
            yield replace(claim, objects=tuple(edited))
    for i, mention in enumerate(mentions):
        for name, values in _VALUES.items():
            if getattr(mention, name) is None:
                continue
            start = stream.below(len(values))
            for value in values[start:] + values[:start]:
                changed = replace(mention, **{name: value})
                if (
                    value != getattr(mention, name)
                    and (changed.color, changed.shape) not in HELD_OUT
                ):
                    yield replace(claim, objects=(*mentions[:i], changed, *mentions[i + 1 :]))
                    break


def hard_negative_claims(
    scene: Scene, kind: str = "attribute", seed: int = 0
) -> list[tuple[str, tuple[Claim, ...]]]:
    """The texts that `hard_negatives` returns, each with its claims, some false of the scene.

    Args:
        scene: what not to describe.
        kind: "attribute", "relation" or "order", what is changed.
        seed: chooses phrasing and replacements, together with the scene's own seed.

    Raises:
        ValueError: another kind.

    Examples:
        >>> from fastclip.data.scenes import hard_negative_claims, holds, sample_scene
        >>> scene = sample_scene(7, objects=2)
        >>> found = hard_negative_claims(scene, "relation")
        >>> [all(holds(claim, scene) for claim in claims) for text, claims in found]
        [False]
    """
    check_choice("kind", kind, NEGATIVE_KINDS)
    phrasing, claim = _short(scene, seed)
    edits: list[Claim] = []
    if kind == "attribute":
        stream = Stream(scene.seed, seed, len(QUALITIES))
        edits = list(_attribute_edits(claim, stream))
    elif claim.relation is not None and kind == "relation":
        edits = [replace(claim, relation=OPPOSITE[claim.relation])]
    elif claim.relation is not None:
        first, second, *others = claim.objects
        edits = [replace(claim, objects=(second, first, *others))]
    may_name_held_out = has_held_out(scene)
    negatives = {}
    for edit in edits:
        pairs = {(mention.color, mention.shape) for mention in edit.objects}
        # Negatives of training scenes must not teach that the pairs kept out are always false.
        if not holds(edit, scene) and (may_name_held_out or not pairs & HELD_OUT):
            negatives[_say_short(edit, phrasing)] = (edit,)
    return list(negatives.items())


def hard_negatives(scene: Scene, kind: str = "attribute", seed: int = 0) -> list[str]:
    """Captions that are false of the scene and differ little from its short caption.

    Each is the short caption of the same seed with one change, so it has that caption's phrasing.

    Args:
        scene: what not to describe.
        kind: "attribute", colors, shapes or sizes swapped between two objects, or one of them
            replaced; "relation", left and right or above and below exchanged; or "order", the two
            objects around the relation exchanged.
        seed: chooses phrasing and replacements, together with the scene's own seed.

    Returns:
        Different texts; an empty list where there is none, as for the relation of one object.

    Raises:
        ValueError: another kind.

    Examples:
        >>> from fastclip.data.scenes import caption, hard_negatives, sample_scene
        >>> scene = sample_scene(7, objects=2)
        >>> caption(scene)
        'there is a small red cross below a large cyan diamond'
        >>> hard_negatives(scene, "relation")
        ['there is a small red cross above a large cyan diamond']
    """
    return [text for text, _ in hard_negative_claims(scene, kind, seed)]
