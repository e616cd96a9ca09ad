"""Captions of three qualities and hard negatives, each with the claims that its text makes.

A text is composed from claims, never the other way round. A negative is the short caption of the
same seed with one thing changed in its claim, phrased alike, so that nothing but the change
distinguishes the two; and it describes a collage that there could be, so that no text is false in
itself. No text names a color.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations

from fastclip.data.collages.world import (
    PLACES,
    Claim,
    Collage,
    Pair,
    Photo,
    has_held_out,
    held_out,
    holds,
    relation_between,
)
from fastclip.data.scenes.captions import QUALITIES
from fastclip.data.scenes.world import RELATIONS
from fastclip.data.streams import Stream, T, check_choice
from fastclip.data.text_augment import article_before

NEGATIVE_KINDS = ("noun", "place", "order")

# Of so many alternative texts out of ten the class is not in the picture.
WRONG_OF_TEN = 3

# {a} and {b} are classes with their articles, {n} one without, {id} a number.
_SHORT_ONE = ("{a} {place}", "there is {a} {place}", "{a} is {place}", "a picture with {a} {place}")
_SHORT_RELATED = (
    "{a} {place}, {rel} {b}",
    "{a} {place} and {rel} {b}",
    "there is {a} {place}, {rel} {b}",
    "{a} is {place}, {rel} {b}",
)
_SHORT_APART = (
    "{a} {place} and {b}",
    "{a} {place}, with {b}",
    "there is {a} {place} and also {b}",
    "{a} is {place}, and there is {b}",
)
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above"),
    "below": ("below", "below"),
}
_ALT = (
    "a photo of {a}",
    "a photo of {a}",
    "a picture of {a}",
    "{a}",
    "{n}",
    "{n} photo",
    "{n} | stock photo {id}",
    "{n} - free download",
)
_DENSE_PLACE = (
    "{a} is {place}.",
    "there is {a} {place}.",
    "{place} there is {a}.",
    "{place} we see {a}.",
)
_DENSE_RELATION = ("{a} is {rel} {b}.", "{a} is placed {rel} {b}.", "{a} lies {rel} {b}.")

# The place of a photograph that a relation to it, from one at the first place, leads to.
_LEADS_TO = {
    (first, relation): second
    for first, second in permutations(PLACES, 2)
    if (relation := relation_between(first, second)) is not None
}


def _named(name: str) -> str:
    return f"{article_before(name)} {name}"


def _say(template: str, claim: Claim, form: int) -> str:
    """The claim in the template's words; of relation words in one of two forms."""
    words = {key: _named(name) for key, name in zip("ab", claim.names, strict=False)}
    if claim.relation is not None:
        words["rel"] = _RELATION_WORDS[claim.relation][form]
    return template.format(place=claim.place, **words)


def _relation(a: Photo, b: Photo) -> str | None:
    return relation_between(a.place, b.place)


def _short(collage: Collage, seed: int) -> tuple[str, int, Claim]:
    """The template, the form of the relation's words, and what is said."""
    stream = Stream(collage.seed, seed, QUALITIES.index("short"))
    pairs = list(permutations(collage.photos, 2))
    pairs = [pair for pair in pairs if _relation(*pair) is not None] or pairs
    if not pairs:
        [photo] = collage.photos
        return stream.choice(_SHORT_ONE), 0, Claim((photo.name,), photo.place)
    a, b = stream.choice(pairs)
    relation = _relation(a, b)
    template = stream.choice(_SHORT_APART if relation is None else _SHORT_RELATED)
    return template, stream.below(2), Claim((a.name, b.name), a.place, relation)


def _alt(collage: Collage, seed: int) -> tuple[str, tuple[Claim, ...]]:
    stream = Stream(collage.seed, seed, QUALITIES.index("alt"))
    name = stream.choice(collage.photos).name
    if stream.below(10) < WRONG_OF_TEN:
        name = stream.choice(_absent(collage))
    number = str(100 + stream.below(9900))
    text = stream.choice(_ALT).format(a=_named(name), n=name, id=number)
    return text, (Claim((name,)),)


def _dense(collage: Collage, seed: int) -> tuple[str, tuple[Claim, ...]]:
    stream = Stream(collage.seed, seed, QUALITIES.index("dense"))
    said: list[tuple[tuple[str, ...], Claim]]
    said = [(_DENSE_PLACE, Claim((photo.name,), photo.place)) for photo in collage.photos]
    for pair in combinations(collage.photos, 2):
        a, b = pair if stream.below(2) == 0 else pair[::-1]
        relation = _relation(a, b)
        if relation is not None:
            said.append((_DENSE_RELATION, Claim((a.name, b.name), relation=relation)))
    sentences = [
        (_say(stream.choice(templates), claim, stream.below(2)), claim)
        for templates, claim in _shuffled(said, stream)
    ]
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence, _ in sentences)
    return text, tuple(claim for _, claim in sentences)


def _shuffled(items: Sequence[T], stream: Stream) -> list[T]:
    left = list(items)
    return [left.pop(stream.below(len(left))) for _ in items]


def _absent(collage: Collage) -> list[str]:
    """The classes of which the collage shows no photograph."""
    shown = {photo.name for photo in collage.photos}
    return [name for name in collage.classes if name not in shown]


def caption_claims(collage: Collage, quality: str, seed: int = 0) -> tuple[str, tuple[Claim, ...]]:
    """The text that `caption` returns and every claim it makes.

    All are true of the collage, but for the "alt" texts of a class that it does not show.

    Args:
        collage: what to describe.
        quality: "short", "alt" or "dense".
        seed: chooses the phrasing, together with the collage's own seed.

    Raises:
        ValueError: another quality.

    Examples:
        >>> from fastclip.data.collages import caption_claims, holds, sample_collage
        >>> collage = sample_collage(7)
        >>> text, claims = caption_claims(collage, "dense")
        >>> all(holds(claim, collage) for claim in claims)
        True
    """
    check_choice("quality", quality, QUALITIES)
    if quality == "alt":
        return _alt(collage, seed)
    if quality == "dense":
        return _dense(collage, seed)
    template, form, claim = _short(collage, seed)
    return _say(template, claim, form), (claim,)


def caption(collage: Collage, quality: str = "short", seed: int = 0) -> str:
    """A caption of the collage, in one of several phrasings.

    Args:
        collage: what to describe.
        quality: "short", a sentence on two of the photographs, with the place of the first and its
            relation to the second where they share a row or a column; "alt", a text such as is
            found beside pictures on the web: a single class, in 30 % of texts one that is not
            shown; or "dense", a sentence on the place of every photograph and on each relation, in
            a drawn order.
        seed: chooses the phrasing, together with the collage's own seed.

    Raises:
        ValueError: another quality.

    Examples:
        >>> from fastclip.data.collages import caption, sample_collage
        >>> collage = sample_collage(7, classes=("bird", "cat", "dog", "ship"), objects=2)
        >>> caption(collage)
        'there is a dog at the top left, left of a bird'
        >>> caption(collage, "dense").split(". ")[0]
        'There is a dog at the top left'
    """
    return caption_claims(collage, quality, seed)[0]


def _named_pairs(claim: Claim) -> set[Pair]:
    """The (class, place) pairs of which a claim speaks."""
    if claim.place is None:
        return set()
    pairs = {(claim.names[0], claim.place)}
    if claim.relation is not None:
        pairs.add((claim.names[1], _LEADS_TO[claim.place, claim.relation]))
    return pairs


def _noun_edits(claim: Claim, collage: Collage, stream: Stream) -> Iterator[Iterator[Claim]]:
    """For each class named the claims of one that is not shown instead, in a drawn order."""
    absent = _absent(collage)
    for number in range(len(claim.names)):
        start = stream.below(len(absent))
        yield _renamed(claim, number, absent[start:] + absent[:start])


def _renamed(claim: Claim, number: int, others: Sequence[str]) -> Iterator[Claim]:
    """The claim with each of the others instead of one of its names."""
    for other in others:
        yield replace(claim, names=(*claim.names[:number], other, *claim.names[number + 1 :]))


def _place_edits(claim: Claim) -> Iterator[list[Claim]]:
    """The claim with another place, and with another relation, that go with the rest of it."""
    for place in PLACES:
        fits = claim.relation is None or (place, claim.relation) in _LEADS_TO
        if place != claim.place and fits:
            yield [replace(claim, place=place)]
    for relation in RELATIONS if claim.relation is not None else ():
        if relation != claim.relation and (claim.place, relation) in _LEADS_TO:
            yield [replace(claim, relation=relation)]


def hard_negative_claims(
    collage: Collage, kind: str = "noun", seed: int = 0
) -> list[tuple[str, tuple[Claim, ...]]]:
    """The texts that `hard_negatives` returns, each with its claim, which is false.

    Args:
        collage: what not to describe.
        kind: "noun", "place" or "order", what is changed.
        seed: chooses phrasing and replacements, together with the collage's own seed.

    Raises:
        ValueError: another kind.

    Examples:
        >>> from fastclip.data.collages import hard_negative_claims, holds, sample_collage
        >>> collage = sample_collage(7)
        >>> found = hard_negative_claims(collage, "noun")
        >>> [holds(claim, collage) for text, claims in found for claim in claims]
        [False, False]
    """
    check_choice("kind", kind, NEGATIVE_KINDS)
    template, form, claim = _short(collage, seed)
    # of each list the first that may be used
    edits: list[Iterable[Claim]] = []
    if kind == "noun":
        edits = list(_noun_edits(claim, collage, Stream(collage.seed, seed, len(QUALITIES))))
    elif kind == "place":
        edits = list(_place_edits(claim))
    elif len(claim.names) > 1:
        edits = [[replace(claim, names=claim.names[::-1])]]
    # Negatives of what training shows must not teach that the pairs kept out are always false.
    unnamed: frozenset[Pair] = frozenset() if has_held_out(collage) else held_out(collage.classes)
    negatives = {}
    for alternatives in edits:
        for edit in alternatives:
            if not holds(edit, collage) and unnamed.isdisjoint(_named_pairs(edit)):
                negatives[_say(template, edit, form)] = (edit,)
                break
    return list(negatives.items())


def hard_negatives(collage: Collage, kind: str = "noun", seed: int = 0) -> list[str]:
    """Captions that are false of the collage and differ little from its short caption.

    Each is the short caption of the same seed with one change, so it has that caption's phrasing.

    Args:
        collage: what not to describe.
        kind: "noun", a class replaced by one that is not shown; "place", another place, or another
            relation; or "order", the two classes exchanged.
        seed: chooses phrasing and replacements, together with the collage's own seed.

    Returns:
        Different texts. Unless the collage shows a pair of class and place that is held out, none
        names one; so the list can be empty.

    Raises:
        ValueError: another kind.

    Examples:
        >>> from fastclip.data.collages import caption, hard_negatives, sample_collage
        >>> collage = sample_collage(7, classes=("bird", "cat", "dog", "ship"), objects=2)
        >>> caption(collage)
        'there is a dog at the top left, left of a bird'
        >>> hard_negatives(collage, "place")
        ['there is a dog at the bottom left, left of a bird']
    """
    return [text for text, _ in hard_negative_claims(collage, kind, seed)]
