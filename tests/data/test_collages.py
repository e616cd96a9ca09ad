"""Collages: what they show, say and deny, judged from their pixels and words alone."""

import doctest
import importlib
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest

from fastclip.data import collages as C
from fastclip.data.order import hash64
from fastclip.data.scenes import COLORS
from fastclip.data.sources import open_photographs
from tests.data.collages import (
    CLASSES,
    PLACES,
    Facts,
    all_facts,
    facts_of,
    is_fact,
    shown,
    write_photographs,
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> C.Photographs:
    return open_photographs(str(write_photographs(tmp_path_factory.mktemp("photos") / "classes")))


def made(photographs: C.Photographs, split: str, **options: object) -> C.CollageSource:
    return C.CollageSource(photographs, split, 4000, **options)


@pytest.mark.parametrize("split", ["train", "compositional"])
def test_captions_say_what_is_shown(photographs: C.Photographs, split: str) -> None:
    source = made(photographs, split, captions=("short", "dense"))
    numbers: Counter[int] = Counter()
    for index in range(300):
        sample = source.read(0, index)
        grid, _ = shown(sample.image)
        numbers[len(grid)] += 1
        short, dense = sample.texts
        assert sample.captions == {"short": (short,), "dense": (dense,)}
        for text in sample.texts:
            assert all(is_fact(fact, grid) for fact in all_facts(text)), (text, grid)
        aligned = {
            frozenset((a, b))
            for a, b in combinations(grid, 2)
            if (grid[a][0] == grid[b][0]) != (grid[a][1] == grid[b][1])
        }
        kinds = [fact[0] for fact in facts_of(short)]
        assert kinds.count("shown") == 2 and kinds.count("at") == 1
        assert len(kinds) - 3 == bool(aligned)
        facts = all_facts(dense)
        assert {fact[1] for fact in facts if fact[0] == "at"} == set(grid)
        relations = [frozenset(fact[1:]) for fact in facts if fact[0] not in ("shown", "at")]
        assert set(relations) == aligned and len(relations) == len(aligned)
        assert dense.count(".") == len(grid) + len(aligned)
    assert min(numbers[2], numbers[3]) > 100 and numbers[2] + numbers[3] == 300


def test_alternative_texts_name_one_class_and_are_often_wrong(photographs: C.Photographs) -> None:
    source = made(photographs, "train")
    wrong = 0
    for index in range(1000):
        collage = source.collage(index)
        facts = facts_of(C.caption(collage, "alt", hash64(index)))
        assert [fact[0] for fact in facts] == ["shown"]
        wrong += facts[0][1] not in {photo.name for photo in collage.photos}
    # 300, within 3.5 standard deviations
    assert 250 < wrong < 350


def test_no_text_names_a_color_and_articles_are_right(photographs: C.Photographs) -> None:
    source = made(photographs, "train", captions=C.QUALITIES)
    texts = [text for index in range(200) for text in source.read(0, index).texts]
    words = [re.findall("[a-z]+", text.lower()) for text in texts]
    assert not {word for each in words for word in each} & {*COLORS, "gray", "white", "black"}
    for article, noun in (pair for each in words for pair in pairwise(each)):
        if article in ("a", "an"):
            assert (article == "an") == (noun in ("airplane", "automobile")), noun


def test_phrasings_vary_with_the_seed() -> None:
    collage = C.sample_collage(3, classes=CLASSES)
    for quality, least in (("short", 8), ("alt", 20), ("dense", 40)):
        assert len({C.caption(collage, quality, seed) for seed in range(100)}) >= least


def test_sentences_come_in_any_order(photographs: C.Photographs) -> None:
    source = made(photographs, "train", objects=3)
    dense = (C.caption(source.collage(index), "dense") for index in range(200))
    first = Counter(len(facts_of(text.split(".")[0])) for text in dense)
    # a place has two facts, a relation three
    assert min(first[2], first[3]) > 40


def test_the_photographs_of_each_split_are_its_own(photographs: C.Photographs) -> None:
    seen: dict[str, Counter[tuple[str, int]]] = {}
    for split in ("train", "val", "test"):
        source = made(photographs, split)
        seen[split] = Counter(
            pair for index in range(1000) for pair in shown(source.read(0, index).image)[1].items()
        )
    for a, b in combinations(seen.values(), 2):
        assert not a.keys() & b.keys()
    assert [len(found) for found in seen.values()] == [240, 30, 30]
    # drawn alike: 2,500 photographs from 240, and from 30
    assert max(seen["train"].values()) < 28 and min(seen["val"].values()) > 50
    assert {name for name, _ in seen["val"]} == set(CLASSES)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 10, 11, 24, 100, 1000])
def test_held_out_pairs_are_balanced(count: int) -> None:
    classes = tuple(f"class {number}" for number in range(count))
    pairs = C.held_out(classes)
    assert abs(len(pairs) - 0.3 * 4 * count) <= 0.5
    of_class = Counter(name for name, _ in pairs)
    of_place = Counter(place for _, place in pairs)
    assert set(of_class) == set(classes) and max(of_class.values()) <= 2
    places = [of_place[place] for place in C.PLACES]
    assert max(places) - min(places) <= 1
    if count > 3:
        assert all(0 < number < count for number in places)
    assert pairs == C.held_out(classes[::-1])


def test_held_out_pairs_are_shown_by_compositional_alone() -> None:
    pairs = {(name, place) for name in CLASSES for place in C.PLACES}
    out = {pair for pair in pairs if C.is_held_out(*pair, CLASSES)}
    assert list(C.PLACES) == PLACES and len(out) == 12
    for split in ("train", "val", "test", "compositional"):
        seen: Counter[tuple[str, str]] = Counter()
        for seed in range(1000):
            collage = C.sample_collage(seed, split=split, classes=CLASSES)
            seen.update(collage.pairs())
            assert C.has_held_out(collage) == (split == "compositional")
            assert bool(collage.pairs() & out) == (split == "compositional")
        assert seen.keys() == (pairs if split == "compositional" else pairs - out)
        # no class and no place is rare
        for part in (0, 1):
            alike = Counter(pair[part] for pair in seen.elements()).values()
            assert min(alike) > 0.7 * max(alike)


@pytest.mark.parametrize("objects", [1, 2, 3, 4])
def test_number_of_photographs(photographs: C.Photographs, objects: int) -> None:
    for split in ("train", "compositional"):
        source = made(photographs, split, objects=objects)
        for index in range(40):
            sample = source.read(0, index)
            grid, _ = shown(sample.image)
            assert len(grid) == objects
            assert all(is_fact(fact, grid) for fact in facts_of(sample.texts[0]))
            label = CLASSES.index(next(iter(grid))) if objects == 1 else None
            assert sample.label == label


# from a photograph to what it is so related to: rows down, columns to the right
OFFSETS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}


def named_pairs(facts: Facts) -> set[tuple[str, str]]:
    """The (class, place) pairs of which a short caption speaks; there could be such a collage."""
    [(name, place)] = [(name, f"at the {rest[0]}") for kind, name, *rest in facts if kind == "at"]
    pairs = {(name, place)}
    for kind, _, *rest in facts:
        if kind in OFFSETS:
            row, column = divmod(PLACES.index(place), 2)
            row, column = row + OFFSETS[kind][0], column + OFFSETS[kind][1]
            assert row in (0, 1) and column in (0, 1), facts
            pairs.add((rest[0], PLACES[2 * row + column]))
    return pairs


def nouns_and_rest(facts: Facts) -> tuple[list[str], list[str]]:
    """The classes that a short caption names; its place, and its relation if it has one."""
    nouns = [name for kind, name, *_ in facts if kind == "shown"]
    return nouns, [rest[0] if kind == "at" else kind for kind, _, *rest in facts if rest]


@pytest.mark.parametrize("split", ["train", "compositional"])
def test_every_hard_negative_is_false_by_one_change(photographs: C.Photographs, split: str) -> None:
    source = made(photographs, split)
    found: Counter[str] = Counter()
    for index in range(400):
        collage, seed = source.collage(index), hash64(index)
        grid, _ = shown(source.read(0, index).image)
        nouns, rest = nouns_and_rest(facts_of(C.caption(collage, seed=seed)))
        for kind in C.NEGATIVE_KINDS:
            texts = C.hard_negatives(collage, kind, seed)
            found[kind] += bool(texts)
            assert len(set(texts)) == len(texts) <= 3
            for text in texts:
                facts = facts_of(text)
                assert not all(is_fact(fact, grid) for fact in facts), (text, grid)
                others, other_rest = nouns_and_rest(facts)
                changes = [
                    sum(a != b for a, b in zip(*both, strict=True))
                    for both in ((nouns, others), (rest, other_rest))
                ]
                assert changes == {"noun": [1, 0], "place": [0, 1], "order": [2, 0]}[kind]
                assert kind != "noun" or not set(others) <= set(grid)
                assert kind != "order" or others == nouns[::-1]
                named = {C.is_held_out(*pair, CLASSES) for pair in named_pairs(facts)}
                assert split == "compositional" or named == {False}
    least = {"noun": 390, "place": 300, "order": 150}
    if split == "compositional":
        least = dict.fromkeys(least, 400)
    assert all(found[kind] >= count for kind, count in least.items()), found


def test_negatives_come_with_samples(photographs: C.Photographs) -> None:
    source = made(photographs, "train", quality="alt", negatives=True)
    for index in range(30):
        collage, sample = source.collage(index), source.read(0, index)
        texts = [C.hard_negatives(collage, kind, hash64(index)) for kind in C.NEGATIVE_KINDS]
        assert sample.negatives == tuple(text for each in texts for text in each) != ()
    assert not made(photographs, "train").read(0, 0).negatives


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: C.sample_collage(-1), "seed is -1"),
        (lambda: C.sample_collage(0, split="dev"), "split is 'dev'; use one of train"),
        (lambda: C.sample_collage(0, objects=5), "objects is 5; use 1 to 4"),
        (lambda: C.sample_collage(0, classes=("a", "b", "c")), "3 classes are too few .*least 4"),
        (lambda: C.sample_collage(0, classes=("a", "b", "c", "b")), "two classes are called 'b'"),
        (lambda: C.caption(C.sample_collage(0), "long"), "quality is 'long'"),
        (lambda: C.hard_negatives(C.sample_collage(0), "relation"), "kind is 'relation'"),
        (lambda: C.Photo("dog", "left"), "place is 'left'; use one of at the top left"),
        (lambda: C.Collage((), ("dog",)), "0 photographs; give one to four"),
        (lambda: C.Collage((C.Photo("cat", PLACES[0]),), ("dog",)), "class is 'cat'"),
        (
            lambda: C.Collage(tuple(C.Photo(name, PLACES[0]) for name in "ab"), ("a", "b")),
            "shows a at the top left, b at the top left; give different classes and places",
        ),
        (lambda: C.Claim(("dog",), relation="above"), "names 1 classes; give one or two"),
        (lambda: C.Claim(("dog",), "here"), "place is 'here'"),
        (lambda: C.is_held_out("cow", PLACES[0], CLASSES), "class is 'cow'"),
    ],
)
def test_errors_name_the_value_and_the_remedy(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["collages.meaning", "variants"])
def test_examples_of_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"fastclip.data.{name}"))
    assert result.attempted > 0 and result.failed == 0
