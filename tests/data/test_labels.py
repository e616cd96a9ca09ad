"""Labels: class names found in captions, and labels in the batches of training."""

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastclip.data.augment import Augmentation
from fastclip.data.labels import ClassMatcher, LabelSource
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.samples import Sample
from fastclip.data.shards import ShardSource
from fastclip.data.training_samples import TrainingSamples
from tests.conftest import jpeg
from tests.data.pipelines import tokenize

MakeShard = Callable[..., Path]

NAMES = ["tench, Tinca tinca", "shark", "hammerhead shark, hammerhead", "T-shirt", "crane", "crane"]
TENCH, SHARK, HAMMERHEAD, SHIRT, BIRD, MACHINE = range(6)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A shark, and a tench.", [SHARK, TENCH]),
        ("sharks and sharkskin", []),
        ("the shark's fin (shark)", [SHARK]),
        ("SHARK", [SHARK]),
        ("tinca \n\t tinca", [TENCH]),
        ("tinca, tinca", []),
        ("a hammerhead  shark", [HAMMERHEAD]),
        ("hammerhead or shark", [HAMMERHEAD, SHARK]),
        ("hammerhead sharks", [HAMMERHEAD]),
        ("my t-shirt", [SHIRT]),
        ("my t shirt", []),
        ("a crane", [BIRD, MACHINE]),
        ("", []),
    ],
)
def test_class_names_in_texts(text: str, found: list[int]) -> None:
    assert ClassMatcher(NAMES)(text) == found


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        # longer at one place, inside but later, and overlapping
        (["ice", "ice cream", "ice cream cone"], "ice cream cones", [1]),
        (["great white shark", "white"], "a great white shark", [0]),
        (["great white", "white shark"], "a great white shark", [0, 1]),
        (["C++"], "in C++.", [0]),
        (["C++"], "C", []),
        (["Straße"], "STRASSE", [0]),
        (["猫"], "猫", [0]),
    ],
)
def test_names_in_names_and_of_other_letters(names: list[str], text: str, found: list[int]) -> None:
    assert ClassMatcher(names)(text) == found


def test_capitals_matter_where_asked_for() -> None:
    match = ClassMatcher(["Turkey", "turkey"], case_sensitive=True)
    assert (match("turkey in Turkey"), match("TURKEY")) == ([1, 0], [])


def test_a_class_needs_a_name() -> None:
    with pytest.raises(ValueError, match=r"class 1 is called ' , -'; give a name of words"):
        ClassMatcher(["cat", " , -"])


def test_matches_are_those_of_one_expression_a_name() -> None:
    rng = random.Random(0)
    letters = ["a", "b", "ab", "c-d"]
    names = [" ".join(rng.choices(letters, k=rng.randint(1, 3))) for _ in range(12)]
    match = ClassMatcher(names)
    several = 0
    for _ in range(300):
        text = "".join(part + rng.choice([" ", " ", "-", ""]) for part in rng.choices(letters, k=9))
        spans = [
            (hit.start(), hit.start() + len(name), number)
            for number, name in enumerate(names)
            for hit in re.finditer(rf"(?<!\w)(?={re.escape(name)}(?!\w))", text)
        ]
        outer = sorted(
            (start, end, number)
            for start, end, number in spans
            if not any(s <= start and end <= e and (s, e) != (start, end) for s, e, _ in spans)
        )
        wanted = list(dict.fromkeys(number for _, _, number in outer))
        assert match(text) == wanted, text
        several += len(wanted) > 1
    assert several > 100


def test_labels_of_samples() -> None:
    sample = Sample("k", Image.new("RGB", (1, 1)), ("a shark", "a tench"), label=4, where="a.jpg")
    own, found = LabelSource(NAMES), LabelSource(NAMES, "text")
    assert own.draw(sample, random.Random(0)) == 4
    drawn = [found.draw(sample, random.Random(seed)) for seed in range(100)]
    assert set(drawn) == {SHARK, TENCH} and 25 < drawn.count(SHARK) < 75
    bare = Sample("k", sample.image, (), captions={"dense": ("one t-shirt",)})
    assert own.draw(bare, random.Random(0)) == -1
    assert found.draw(bare, random.Random(0)) == SHIRT
    bare.captions.clear()
    assert found.draw(bare, random.Random(0)) == -1
    with pytest.raises(ValueError, match=r"sample k \(a.jpg\) has label 4, the 3 classes are 0..2"):
        LabelSource(NAMES[:3]).draw(sample, random.Random(0))


@pytest.fixture
def shard(make_shard: MakeShard) -> str:
    """Twelve samples: captions of two classes, of one and of none; labels 0, 1, 2, or none."""
    captions = ("a tench and a shark", "a shark", "a cat")
    members = []
    for i in range(12):
        members.append((f"{i:02d}.jpg", jpeg()))
        members.append((f"{i:02d}.txt", captions[i % 3].encode()))
        if i % 4:
            members.append((f"{i:02d}.cls", str(i % 3).encode()))
    return str(make_shard(members=members))


def load(shard: str, labels: LabelSource | None, epoch: int = 0, **options: Any) -> dict[str, int]:
    """The label of each sample, by key."""
    source = ShardSource(shard)
    order = Order(source.counts, seed=0)
    samples = TrainingSamples(source, order, Augmentation(16), tokenize, labels=labels)
    found: dict[str, int] = {}
    for batch in TrainingLoader(samples, 4, **options).batches(epoch):
        assert batch["label"].shape == (4,) and batch["label"].dtype == torch.int64
        found |= zip(batch["key"], batch["label"].tolist(), strict=True)
    assert len(found) == 12
    return found


@pytest.mark.parametrize("source", ["cls", "text"])
def test_batches_have_the_labels_of_their_samples(shard: str, source: Any) -> None:
    labels = LabelSource(NAMES, source)
    found = load(shard, labels)
    assert load(shard, pickle.loads(pickle.dumps(labels)), workers=2) == found
    several = {found[f"{i:02d}"] for i in range(0, 12, 3)}
    for i in range(12):
        label = found[f"{i:02d}"]
        if source == "cls":
            assert label == (i % 3 if i % 4 else -1)
        elif i % 3:
            assert label == (SHARK, -1)[i % 3 - 1]
    if source == "text":
        # another draw every epoch
        for epoch in range(1, 3):
            again = load(shard, labels, epoch)
            several |= {again[f"{i:02d}"] for i in range(0, 12, 3)}
            assert again["01"] == SHARK
        assert several == {TENCH, SHARK}


def test_labels_beyond_the_classes_end_the_run(shard: str) -> None:
    with pytest.raises(ValueError, match=r"shard-00000.tar:\d\d.jpg\) has label 2, the 2 classes"):
        load(shard, LabelSource(NAMES[:2]), workers=1)


def test_labels_and_texts_only_where_asked_for(make_shard: MakeShard) -> None:
    members = [m for i in range(4) for m in ((f"{i}.jpg", jpeg()), (f"{i}.cls", b"1"))]
    source = ShardSource(str(make_shard(members=members)), required=("cls",))
    order = Order(source.counts, seed=0)
    batches = {
        name: next(TrainingLoader(samples, 4).batches(0))
        for name, samples in {
            "plain": TrainingSamples(source, order, Augmentation(16), None),
            "labeled": TrainingSamples(
                source, order, Augmentation(16), None, labels=LabelSource(NAMES)
            ),
        }.items()
    }
    assert batches["plain"].keys() == {*("key", "position", "index", "params", "images", "faults")}
    assert batches["labeled"].keys() - batches["plain"].keys() == {"label"}
    assert torch.equal(batches["labeled"]["images"][0], batches["plain"]["images"][0])
    assert batches["labeled"]["label"].tolist() == [1] * 4 and not batches["labeled"]["faults"]
