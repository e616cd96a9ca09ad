"""Which caption is drawn, in which part, how often, and what its hard negatives may be."""

import json
import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.data.captions import CaptionSampling, DrawnCaptions, split_sentences
from fastclip.data.hard_negatives import normalized
from fastclip.data.options import DataOptions
from fastclip.data.samples import Sample, UnreadableSample
from fastclip.data.sources import open_source
from fastclip.data.text_augment import TextAugmentation
from tests.conftest import jpeg

PLAIN, STRONG = TextAugmentation(), TextAugmentation.strong()


def sample(*texts: str, negatives: tuple[str, ...] = (), **captions: tuple[str, ...]) -> Sample:
    image = Image.new("RGB", (1, 1))
    return Sample("a sample", image, texts, captions=captions, negatives=negatives)


def near(count: int, trials: int, probability: float) -> bool:
    """Within four standard deviations of a binomial."""
    deviation = (trials * probability * (1 - probability)) ** 0.5
    return abs(count - trials * probability) <= 4 * deviation


def first_texts(sampling: CaptionSampling, drawn_from: Sample, trials: int) -> Counter[str]:
    return Counter(
        sampling.draw(drawn_from, random.Random(seed)).texts[0] for seed in range(trials)
    )


def test_texts_are_drawn_alike() -> None:
    counts = first_texts(CaptionSampling(), sample("one", "two", " ", "three"), 3000)
    assert set(counts) == {"one", "two", "three"}
    assert all(near(count, 3000, 1 / 3) for count in counts.values())


def test_sources_are_drawn_by_weight_and_their_captions_alike() -> None:
    drawn_from = sample("text", txt=("alt",), recaption=("r1", "r2"), other=("never",))
    sampling = CaptionSampling(weights={"txt": 1, "recaption": 3})
    counts = first_texts(sampling, drawn_from, 4000)
    assert set(counts) == {"alt", "r1", "r2"}
    assert near(counts["alt"], 4000, 1 / 4)
    assert near(counts["r1"], 4000, 3 / 8) and near(counts["r2"], 4000, 3 / 8)


def test_sources_that_are_not_there_are_passed_over() -> None:
    sampling = CaptionSampling(weights=(("a", 1.0), ("b", 2.0), ("c", 1.0)))
    counts = first_texts(sampling, sample("text", a=("A",), b=("", "  "), c=("C",)), 2000)
    assert set(counts) == {"A", "C"} and near(counts["A"], 2000, 1 / 2)
    assert set(first_texts(sampling, sample("text", d=("D",)), 20)) == {"text"}


def test_a_random_part_of_the_sentences() -> None:
    caption = "One cat. Two dogs! Three 3.5 m poles"
    sentences = [part.strip() for part in split_sentences(caption)]
    assert len(sentences) == 3
    trials = 6000
    counts = first_texts(CaptionSampling(sentences=True), sample(caption), trials)
    assert len(counts) == 7
    for text, count in counts.items():
        kept = [sentence for sentence in sentences if sentence in text]
        assert text == " ".join(kept)
        # the number is drawn first: three ways to take one, three to take two, one to take all
        assert near(count, trials, 1 / 3 if len(kept) == 3 else 1 / 9)


@pytest.mark.parametrize(
    "text, count",
    [
        ("A dog. A cat.", 2),
        ("A dog. A cat", 2),
        ("a dog. a cat sits. it naps", 3),
        ("One pole is 3.5 m long. Two are not.", 2),
        ("Mr. Smith and Dr. J. Doe wait. They sit.", 2),
        ("e.g. a dog. A cat.", 2),
        ("What?! A dog!! Yes.", 3),
        ("a dog ... and a cat. The end", 2),
        ("A dog... Then a cat…  Then a bird", 3),
        ("猫がいる。犬もいる。「はい。」そして鳥", 4),
        ("No. 5 is red. I said no. It is.", 3),
        ('He said "Stop!" and left. "Go." She stays.', 3),
        ("(A dog.) A cat.", 2),
        ("1. A dog sits.", 1),
        ("There are 3. They sit.", 2),
        ("At 5 p.m. The sun sets at 6 p.m. there.", 2),
        ("see example.com. Now", 2),
        ("Party. 🎉", 1),
        ("... a dog", 1),
        ("One line\nof two\n\nAnother", 2),
        ("!?", 1),
        ("", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    parts = split_sentences(text)
    assert "".join(parts) == text
    assert len(parts) == count, parts


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["." * 300_000, '."' * 100_000, "! " * 100_000, "\n " * 100_000])
def test_splitting_takes_linear_time(text: str) -> None:
    assert split_sentences("A dog" + text + "ends. B")[-1] == "B"


@pytest.mark.parametrize("redraw", [True, False])
def test_each_view_draws_anew_or_all_share_a_caption(redraw: bool) -> None:
    sampling = CaptionSampling(views=(PLAIN, PLAIN, PLAIN), redraw=redraw)
    trials, drawn_from = 900, sample("one", "two", "three")
    draws = [sampling.draw(drawn_from, random.Random(seed)).texts for seed in range(trials)]
    assert all(len(texts) == 3 for texts in draws)
    same = sum(texts[0] == texts[1] for texts in draws)
    assert near(same, trials, 1 / 3) if redraw else same == trials
    assert len({texts[2] for texts in draws}) == 3


def test_each_view_has_its_own_augmentation() -> None:
    bare = TextAugmentation(stop_words=1.0)
    sampling = CaptionSampling(views=(PLAIN, bare, TextAugmentation(deletion=1)), redraw=False)
    texts = {sampling.draw(sample("a dog"), random.Random(seed)).texts for seed in range(200)}
    assert texts == {("a dog", "dog", rest) for rest in ("a dog", "dog", "a")}


def test_views_share_the_same_sentences_where_they_share_a_caption() -> None:
    sampling = CaptionSampling(sentences=True, views=(PLAIN, PLAIN), redraw=False)
    for seed in range(50):
        first, second = sampling.draw(sample("A. Dogs. Cats. Cows."), random.Random(seed)).texts
        assert first == second


def test_the_samples_negatives_come_first_and_are_repeated_at_the_end() -> None:
    brought = ("a cat", "a cow", "A  DOG", "a pig", " ")
    sampling = CaptionSampling(negatives=2)
    counts: Counter[str] = Counter()
    for seed in range(1500):
        drawn = sampling.draw(sample("a dog", negatives=brought), random.Random(seed)).negatives
        assert len(set(drawn)) == 2
        counts.update(drawn)
    assert set(counts) == {"a cat", "a cow", "a pig"}
    assert all(near(count, 1500, 2 / 3) for count in counts.values())
    drawn = CaptionSampling(negatives=7).draw(sample("a dog", negatives=brought), random.Random(0))
    assert sorted(Counter(drawn.negatives).values()) == [2, 2, 3]


def test_negatives_are_made_of_the_first_views_caption_without_its_augmentation() -> None:
    sampling = CaptionSampling(views=(STRONG, PLAIN), negatives=3)
    drawn_from = sample("a red car in front of a bus", "two dogs on a wooden bench")
    for seed in range(50):
        drawn = sampling.draw(drawn_from, random.Random(seed))
        of_cars = {"car", "bus"} & set(drawn.texts[0].split())
        for text in drawn.negatives:
            assert ({"car", "bus"} if of_cars else {"dogs", "bench"}) <= set(text.split())


def test_attributes_and_relations_before_order() -> None:
    sampling = CaptionSampling(negatives=1)
    texts = {
        sampling.draw(sample("a large dog on a rug"), random.Random(seed)).negatives[0]
        for seed in range(50)
    }
    assert texts == {"a small dog on a rug", "a large dog under a rug", "a rug on a large dog"}


@pytest.mark.parametrize(
    "texts, negatives",
    [
        (("dog",), {"no dog"}),
        (("dog", "No dog", "dog no"), {"no no dog", "no No dog", "no dog no"}),
        (("dog dog",), {"no dog dog"}),
        (("!!!",), {"no !!!"}),
        (("一只狗",), {"no 一只狗"}),
        (("dog cat",), {"cat dog"}),
        (("dog cat", "Cat dog"), {"no dog cat", "no Cat dog"}),
        (("red", "NO red"), {"no no red", "no red red"}),
    ],
)
def test_last_resorts(texts: tuple[str, ...], negatives: set[str]) -> None:
    sampling = CaptionSampling(negatives=2)
    for seed in range(20):
        drawn = sampling.draw(sample(*texts), random.Random(seed)).negatives
        assert len(drawn) == 2
        taken = {normalized(text) for text in texts}
        assert not taken & {normalized(text) for text in drawn}
        if texts[0] != "red":
            assert set(drawn) <= negatives


def test_cleaned_captions_have_cleaned_negatives() -> None:
    cleaning = CaptionSampling(views=(TextAugmentation(clean=True),), negatives=4)
    made = cleaning.draw(sample("a red car &amp; a  blue bus"), random.Random(0)).negatives
    assert len(set(made)) == 4 and not any("amp" in text or "  " in text for text in made)
    brought = sample("a dog", "salt &amp; pepper", negatives=("salt & pepper", "a&nbsp;cat"))
    assert set(cleaning.draw(brought, random.Random(0)).negatives) == {"a cat"}


def random_words(rng: random.Random) -> str:
    words = [
        "a",
        "the",
        "red",
        "dog",
        "on",
        "couch.",
        "Two",
        "left",
        "of",
        "A",
        "…",
        "—",
        "🐶",
        "&amp;",
    ]
    words += [
        "naïve",
        "हिन्दी",
        "犬。",
        "собака",
        "e\u0301",
        "\u200b",
        "👩‍👩‍👧",
        "it's",
        "(big)",
        "1.5",
        "ß",
    ]
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))


def random_characters(rng: random.Random) -> str:
    letters = "aB .!?'\"-&;#\t\n\u00a0\u3000é犬🐶\u0301\u202e\x00"
    return "".join(rng.choice(letters) for _ in range(rng.randint(0, 20))) + rng.choice("a!🐶")


def random_marks(rng: random.Random) -> str:
    return "".join(rng.choice(".,!?…()&#'\" ") for _ in range(rng.randint(0, 8))) + rng.choice(".!")


@pytest.mark.parametrize("make", [random_words, random_characters, random_marks])
def test_what_holds_of_any_caption(make: Callable[[random.Random], str]) -> None:
    for seed in range(250):
        rng = random.Random(seed)
        texts = tuple(make(rng) for _ in range(rng.randint(1, 3)))
        brought = tuple(make(rng) for _ in range(rng.choice((0, 0, 2))))
        drawn_from = sample(*texts, negatives=brought, alt=(make(rng),))
        sampling = CaptionSampling(
            weights=rng.choice(((), {"alt": 1.0})),
            sentences=rng.random() < 0.5,
            views=(STRONG, TextAugmentation(deletion=1, deletion_rate=1, clean=True)),
            redraw=rng.random() < 0.5,
            negatives=3,
        )
        drawn = sampling.draw(drawn_from, random.Random(seed))
        assert len(drawn.texts) == 2 and all(text.strip() for text in drawn.texts)
        assert len(drawn.negatives) == 3 and all(text.strip() for text in drawn.negatives)
        known = {normalized(text) for text in (*texts, *drawn_from.captions["alt"], *drawn.texts)}
        assert not known & {normalized(text) for text in drawn.negatives}
        # and nothing but the arguments counts
        assert sampling.draw(drawn_from, random.Random(seed)) == drawn


def test_ten_thousand_words() -> None:
    rng = random.Random(0)
    caption = " ".join(
        rng.choice("a red dog on the big couch. Then It sat".split()) for _ in range(10_000)
    )
    sampling = CaptionSampling(sentences=True, views=(STRONG,), negatives=5)
    drawn = sampling.draw(sample(caption), random.Random(0))
    assert drawn.texts[0] and len(set(drawn.negatives)) == 5 and caption not in drawn.negatives


def test_global_random_states_are_left_alone() -> None:
    states = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    sampling = CaptionSampling(sentences=True, views=(STRONG, STRONG), negatives=4)
    draws = [
        sampling.draw(sample("A red dog. Two cats on a mat.", "dog"), random.Random(seed))
        for seed in range(50)
    ]
    assert len(set(draws)) > 10
    assert random.getstate() == states[0]
    assert pickle.dumps(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_draw_does_not_change_with_what_the_global_states_are() -> None:
    sampling = CaptionSampling(sentences=True, views=(STRONG, STRONG), negatives=4)
    drawn_from = sample("A red dog. Two cats on a mat.", "Some small birds")
    before = random.getstate()
    try:
        draws = []
        for state in range(2):
            random.seed(state)
            draws.append([sampling.draw(drawn_from, random.Random(seed)) for seed in range(20)])
    finally:
        random.setstate(before)
    assert draws[0] == draws[1]


def test_settings_can_be_sent_to_loader_processes() -> None:
    sampling = CaptionSampling({"txt": 1.0}, views=(STRONG,), negatives=1)
    copy = pickle.loads(pickle.dumps(sampling))
    assert copy == sampling and hash(copy) == hash(sampling)
    drawn_from = sample(txt=("a dog on a mat",))
    assert copy.draw(drawn_from, random.Random(0)) == sampling.draw(drawn_from, random.Random(0))


def test_no_negatives_unless_asked_for() -> None:
    drawn = CaptionSampling().draw(sample("a dog", negatives=("a cat",)), random.Random(0))
    assert drawn == DrawnCaptions(("a dog",), ())


def test_a_sample_without_captions() -> None:
    for empty in (sample(), sample("", " \n"), sample("", txt=(" ",))):
        with pytest.raises(UnreadableSample, match="sample without caption: a sample"):
            CaptionSampling(weights={"txt": 1.0}).draw(empty, random.Random(0))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": {"txt": 0.0}}, r"weight of 'txt' is 0.0; give a positive"),
        ({"weights": (("alt", float("nan")),)}, "weight of 'alt' is nan"),
        ({"weights": {"alt": float("inf")}}, "weight of 'alt' is inf"),
        ({"views": ()}, "no views of a caption; give at least one"),
        ({"negatives": -1}, "negatives is -1; give 0 or more"),
    ],
)
def test_impossible_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionSampling(**options)


def test_one_usable_caption_is_enough(make_shard: Callable[..., Path]) -> None:
    """A damaged KEY.txt costs no sample that has another of the captions asked for."""
    good = json.dumps({"recaption": "a cat"}).encode()
    members = [("0.jpg", jpeg()), ("0.txt", b"\xff"), ("0.json", good)]
    shard = make_shard("a.tar", [*members, ("1.jpg", jpeg()), ("1.txt", b"\xff")])
    options = DataOptions(captions="txt=1,recaption=3")
    source = open_source(str(shard), options, split="train")
    assert source.read(0, 0).texts == ("a cat",)
    with pytest.raises(UnreadableSample):
        source.read(0, 1)
