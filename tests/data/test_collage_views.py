"""No augmentation of collages makes a caption false, judged from the geometry and the words."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastclip.data.augment import Augmentation, AugmentationParams, draw_view
from fastclip.data.captions import CaptionSampling, split_sentences
from fastclip.data.collages import Collage, CollageSource, caption
from fastclip.data.labels import LabelSource
from fastclip.data.order import Order, hash64
from fastclip.data.sources import open_photographs
from fastclip.data.text_augment import TextAugmentation
from fastclip.data.training_samples import TrainingSamples
from tests.data.collages import CLASSES, PLACES, Facts, all_facts, is_fact, write_photographs
from tests.data.pipelines import tokenize

STRONG = Augmentation.strong(64)
WORLDS: dict[str, dict[str, Any]] = {
    "short": {},
    "one": {"objects": 1},
    "alt": {"quality": "alt"},
    "dense": {"quality": "dense"},
    "several": {"captions": ("alt", "short"), "objects": 4},
    "negatives": {"quality": "alt", "negatives": True},
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_photographs(str(write_photographs(tmp_path_factory.mktemp("photos"), each=10)))


def world(photographs: Any, name: str = "short") -> CollageSource:
    return CollageSource(photographs, "train", 4000, **WORLDS[name])


def facts_said(source: CollageSource, index: int) -> Facts:
    """All that a sample's texts say, without alternative texts that were wrong from the start.

    With hard negatives the short caption, which they differ from, is said as well.
    """
    collage = source.collage(index)
    texts = [*source.read(0, index).texts]
    if source.negatives:
        texts.append(caption(collage, seed=hash64(index)))
    grid = {photo.name: divmod(PLACES.index(photo.place), 2) for photo in collage.photos}
    return [fact for text in texts for fact in all_facts(text) if is_fact(fact, grid)]


def is_true(fact: tuple[str, ...], collage: Collage, view: AugmentationParams) -> bool:
    """Whether a view shows it: by where the middle of each photograph is, as shares of the view."""
    middles = {}
    for photo in collage.photos:
        row, column = divmod(PLACES.index(photo.place), 2)
        x = (16 + 32 * column - view.left) / view.width
        y = (16 + 32 * row - view.top) / view.height
        if 0 <= x <= 1 and 0 <= y <= 1:
            middles[photo.name] = (1 - x if view.flip else x, y)
    kind, name, *rest = fact
    if name not in middles:
        return False
    x, y = middles[name]
    if kind == "shown":
        return True
    if kind == "at":
        row, column = rest[0].split()
        return (y < 0.5 if row == "top" else y > 0.5) and (x < 0.5 if column == "left" else x > 0.5)
    if rest[0] not in middles:
        return False
    other_x, other_y = middles[rest[0]]
    right, down = other_x - x, other_y - y
    return {"left of": right, "right of": -right, "above": down, "below": -down}[kind] > 0


def views_of(
    source: CollageSource, augmentation: Augmentation, count: int
) -> Iterator[tuple[int, AugmentationParams, np.ndarray]]:
    """Numbers of collages, with the parameters of a view that a batch carries, and its pixels."""
    samples = TrainingSamples(source, Order(source.counts, 0), (augmentation,), tokenize)
    for position in range(count):
        found = samples[0, position]
        view = AugmentationParams.decode(found["params"][0], 64, 64)
        yield int(found["index"]), view, found["images"][0].numpy()


def falsified(photographs: Any, name: str, augmentation: Augmentation, count: int) -> list[Any]:
    """The views of which a text says something false."""
    source = world(photographs, name)
    return [
        (index, view)
        for index, view, _ in views_of(source, augmentation, count)
        if not all(is_true(fact, source.collage(index), view) for fact in facts_said(source, index))
    ]


@pytest.mark.parametrize("name", WORLDS)
def test_no_view_makes_a_caption_false(photographs: Any, name: str) -> None:
    assert falsified(photographs, name, STRONG, 150) == []


def test_the_check_sees_what_free_draws_make_false(photographs: Any) -> None:
    """Otherwise the count of 0 would say nothing."""
    source = world(photographs)
    alone = {
        "crop": Augmentation(64, scale=(0.08, 1.0)),
        "flip": Augmentation(64, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0),
        "gray": Augmentation(64, scale=(1.0, 1.0), ratio=(1.0, 1.0), gray=1.0, jitter=1.0),
    }
    wrong = dict.fromkeys(alone, 0)
    for index in range(100):
        collage, facts = source.collage(index), facts_said(source, index)
        for name, augmentation in alone.items():
            view = draw_view(augmentation, 64, 64, random.Random(index))
            wrong[name] += not all(is_true(fact, collage, view) for fact in facts)
    # every short caption says left or right, none a color
    assert wrong["flip"] == 100 and wrong["gray"] == 0 and wrong["crop"] > 40


def test_views_show_what_is_said_in_their_pixels(photographs: Any) -> None:
    """The middle of each photograph that is named has its color, at the place that is said."""
    crops = Augmentation(64, scale=(0.08, 1.0), flip=0.5)
    source, checked = world(photographs, "dense"), 0
    for index, _, image in views_of(source, crops, 100):
        for kind, name, *rest in facts_said(source, index):
            if kind != "at":
                continue
            row, column = (word in ("bottom", "right") for word in rest[0].split())
            quarter = image[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            color = np.array([10 + 20 * CLASSES.index(name), 200])[:, None, None]
            # the number of a photograph is its blue
            assert (abs(quarter[:2].astype(int) - color).max(axis=0) <= 2).any()
            checked += 1
    assert checked > 150


def test_augmentation_is_left_as_far_as_it_may_be(photographs: Any) -> None:
    views = [view for _, view, _ in views_of(world(photographs), STRONG, 300)]
    assert not any(view.flip for view in views)
    assert 0.72 < sum(view.jitter for view in views) / 300 < 0.88
    assert 0.12 < sum(view.gray for view in views) / 300 < 0.28
    assert sum(view.height * view.width < 0.9 * 64 * 64 for view in views) > 150
    # a text without a place lets views be mirrored, and one that is wrong lets them be anything
    vague = [view for _, view, _ in views_of(world(photographs, "alt"), STRONG, 300)]
    assert 0.4 < sum(view.flip for view in vague) / 300 < 0.6
    assert sum(view.height * view.width < 0.25 * 64 * 64 for view in vague) > 15


def test_a_class_alone_is_a_statement(photographs: Any) -> None:
    source = world(photographs, "one")
    order = Order(source.counts, 0)
    labels = LabelSource(list(CLASSES), "cls")
    small = Augmentation(64, scale=(0.08, 0.3), flip=0.5)
    silent = TrainingSamples(source, order, small, None)
    labeled = TrainingSamples(source, order, small, None, labels=labels)
    hidden = {}
    for name, samples in (("silent", silent), ("labeled", labeled)):
        found = [samples[0, position] for position in range(150)]
        hidden[name] = [
            not is_true(("shown", collage.photos[0].name), collage, view)
            for each in found
            for collage in [source.collage(int(each["index"]))]
            for view in [AugmentationParams.decode(each["params"][0], 64, 64)]
        ]
    # of the place nothing would be said; but the source does not know which text is used
    assert any(hidden["silent"]) and not any(hidden["labeled"])


@pytest.mark.parametrize("preset", ["weak", "strong"])
@pytest.mark.parametrize("quality", ["short", "alt", "dense"])
def test_no_text_augmentation_changes_what_is_said(
    photographs: Any, quality: str, preset: str
) -> None:
    source = CollageSource(photographs, "train", 1000, quality=quality)
    augmentation = getattr(TextAugmentation, preset)()
    drawing = CaptionSampling(views=(augmentation,))
    changed = lost = 0
    for index in range(200):
        sample = source.read(0, index)
        text = sample.texts[0]
        augmented = drawing.draw(sample, random.Random(index)).texts[0]
        assert augmented_facts(augmented) == augmented_facts(text), (text, augmented)
        changed += augmented != text
        free = augmentation.augment(text, random.Random(index))
        lost += augmented_facts(free) != augmented_facts(text)
    assert changed > 40
    # without knowing what is said, places and relations are lost
    assert lost > 60 or quality == "alt"


def augmented_facts(text: str) -> list[list[str]]:
    """Of each sentence the classes and the words of places and relations, in their order."""
    kept = (*CLASSES, "at", "top", "bottom", "left", "right", "of", "above", "below", "and", "with")
    words = [[word.strip(",.|").lower() for word in part.split()] for part in text.split(".")]
    return [[word for word in part if word in kept] for part in words]


def test_any_part_of_the_sentences_is_true(photographs: Any) -> None:
    source = CollageSource(photographs, "train", 1000, quality="dense")
    drawing = CaptionSampling(sentences=True)
    lengths = set()
    for index in range(100):
        sample, collage = source.read(0, index), source.collage(index)
        grid = {photo.name: divmod(PLACES.index(photo.place), 2) for photo in collage.photos}
        text = drawing.draw(sample, random.Random(index)).texts[0]
        assert all(is_fact(fact, grid) for fact in all_facts(text)) and all_facts(text)
        lengths.add(len(split_sentences(text)))
        assert len(split_sentences(sample.texts[0])) == sample.texts[0].count(".")
    assert lengths >= {1, 2, 3, 4}


def test_synonyms_leave_structure_alone() -> None:
    every = TextAugmentation(synonym=1.0, synonym_words=3)
    text = "a picture with a truck above a ship"
    known = frozenset({"truck", "above", "ship"})
    texts = {every.augment(text, random.Random(seed), known) for seed in range(9)}
    assert len(texts) > 1 and all(each.endswith("with a truck above a ship") for each in texts)
    free = {every.augment(text, random.Random(seed)) for seed in range(9)}
    assert not any("truck" in each for each in free)
