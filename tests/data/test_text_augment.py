"""Text augmentation: each operation by example, its probabilities, and texts of every kind."""

import pickle
import random
from collections import Counter
from pathlib import Path

import pytest

from fastclip.data.text_augment import (
    PUNCTUATION,
    STOP_WORDS,
    TextAugmentation,
    article_before,
    clean,
    common_synonyms,
    looks_english,
    read_synonyms,
)
from tests.test_repo_shape import ROOT

NO_STOP_WORDS = TextAugmentation(stop_words=1.0)


def near(count: int, trials: int, probability: float) -> bool:
    """Within four standard deviations of a binomial."""
    deviation = (trials * probability * (1 - probability)) ** 0.5
    return abs(count - trials * probability) <= 4 * deviation


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A dog is on the couch", "dog couch"),
        ("there it is, the dog.", "is, dog."),
        ("It’s a dog", "dog"),
        ("the", "the"),
        ("it is & the", "it is & the"),
        ("not a dog", "not dog"),
        ("2 dogs", "2 dogs"),
        ("", ""),
    ],
)
def test_stop_words_go_unless_nothing_is_left(text: str, expected: str) -> None:
    assert NO_STOP_WORDS.augment(text, random.Random(0)) == expected


def test_stop_words_go_with_their_probability() -> None:
    weak, trials = TextAugmentation.weak(), 2000
    texts = Counter(weak.augment("a dog", random.Random(seed)) for seed in range(trials))
    assert set(texts) == {"a dog", "dog"} and near(texts["dog"], trials, 0.8)


def test_one_operation_is_drawn_by_weight() -> None:
    augmentation = TextAugmentation(synonym=4, swap=3, deletion=2, identity=1, deletion_rate=1.0)
    text, trials = "red couch", 4000
    texts = Counter(augmentation.augment(text, random.Random(seed)) for seed in range(trials))
    assert near(texts["red sofa"], trials, 0.4)
    assert near(texts["couch red"], trials, 0.3)
    # of two words that were both to go, one stays
    assert near(texts["red"] + texts["couch"], trials, 0.2)
    assert near(texts["red"], trials, 0.1)
    assert near(texts["red couch"], trials, 0.1)


def test_strong_is_weak_and_one_operation_more() -> None:
    strong = TextAugmentation.strong()
    assert (strong.stop_words, strong.synonym, strong.swap, strong.deletion) == (0.8, 0.4, 0.4, 0.2)
    assert strong.identity == 0
    assert TextAugmentation.weak() == TextAugmentation(stop_words=0.8)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(Couch).", "(Sofa)."),
        ("THE COUCH!", "THE SOFA!"),
        ("a huge zebra", "an enormous zebra"),
        ("An aged zebra", "An elderly zebra"),
        ("Un couch", "Un couch"),
        ("sofás y couch", "sofás y couch"),
        ("a zebra", "a zebra"),
    ],
)
def test_synonyms_keep_letters_and_marks(text: str, expected: str) -> None:
    augmentation = TextAugmentation(synonym=1)
    assert expected in {augmentation.augment(text, random.Random(seed)) for seed in range(50)}


def test_so_many_synonyms_and_exchanges() -> None:
    text = "a man and a woman and a boy and a car"
    augmentation = TextAugmentation(synonym=1, synonym_words=3)
    for seed in range(50):
        words = augmentation.augment(text, random.Random(seed)).split()
        changed = [new for old, new in zip(text.split(), words, strict=True) if new != old]
        # an article may follow its word
        assert len([word for word in changed if word not in ("a", "an")]) == 3
    swapped = {
        TextAugmentation(swap=1, swap_pairs=2).augment("1 2 3", random.Random(seed))
        for seed in range(100)
    }
    # an even number of exchanges never makes an odd permutation
    assert swapped == {"1 2 3", "2 3 1", "3 1 2"}


def test_an_exchange_leaves_marks_in_place() -> None:
    swap = TextAugmentation(swap=1)
    texts = {swap.augment("Dogs, cats.", random.Random(seed)) for seed in range(20)}
    assert texts == {"cats, Dogs."}


def test_words_are_dropped_at_their_rate() -> None:
    words, trials = [f"w{i}" for i in range(50)], 200
    augmentation = TextAugmentation(deletion=1, deletion_rate=0.1)
    kept = 0
    for seed in range(trials):
        rest = augmentation.augment(" ".join(words), random.Random(seed)).split()
        assert rest == [word for word in words if word in set(rest)]
        kept += len(rest)
    assert near(kept, 50 * trials, 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "Ein Hund und eine Katze an dem See",
        "un perro a la orilla",
        "il gatto in casa",
        "собака на диване",
        "हिन्दी में एक वाक्य",
        "一只狗坐在沙发上。",
        "زرافة تأكل الأوراق",
        "แมวสองตัว",
    ],
)
def test_other_languages_keep_every_word(text: str) -> None:
    assert NO_STOP_WORDS.augment(text, random.Random(0)) == text
    assert TextAugmentation(synonym=1).augment(text, random.Random(0)) == text
    for seed in range(20):
        swapped = TextAugmentation(swap=1).augment(text, random.Random(seed))
        marks = str.maketrans("", "", PUNCTUATION)
        assert sorted(swapped.translate(marks).split()) == sorted(text.translate(marks).split())


@pytest.mark.parametrize(
    "text, english",
    [
        ("a dog on a couch", True),
        ("“a dog” … 🐶", True),
        ("a café", False),
        ("der Hund", False),
        ("dog", True),
        ("", True),
    ],
)
def test_english_is_recognized_by_letters_and_small_words(text: str, english: bool) -> None:
    assert looks_english(text) == english


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("  a\n\tdog\u00a0 here ", "a dog here"),
        ("&lt;b&gt;dog&#39;s", "<b>dog's"),
        ("a & b", "a & b"),
        ("&nbsp;", ""),
    ],
)
def test_cleaning(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert TextAugmentation(clean=True).augment(text, random.Random(0)) == (expected or text)


@pytest.mark.parametrize(
    "word, article",
    [
        ("apple", "an"),
        ("dog", "a"),
        ("hour", "an"),
        ("horse", "a"),
        ("honest", "an"),
        ("honey", "a"),
        ("unicorn", "a"),
        ("uniform", "a"),
        ("unusual", "an"),
        ("umbrella", "an"),
        ("used", "a"),
        ("usher", "an"),
        ("one-way", "a"),
        ("onion", "an"),
        ("European", "a"),
        ("SUV", "an"),
        ("8-year-old", "an"),
        ("11", "an"),
        ("118", "a"),
        ("80", "an"),
    ],
)
def test_articles_follow_the_sound(word: str, article: str) -> None:
    assert article_before(word) == article


def test_the_packages_synonyms_are_well_formed() -> None:
    synonyms = common_synonyms()
    # the recipe and the page give the number
    for path in ("fastclip/recipes/rocket.yaml", "docs/data.md"):
        assert f"{len(synonyms)} words" in (ROOT / path).read_text()
    for word, others in synonyms.items():
        assert word == word.lower() and word.isascii() and word not in others
        assert word not in STOP_WORDS
        # one group each, so that a word of two meanings does not lead from one to the other
        assert all(set(synonyms[other]) == {word, *others} - {other} for other in others)
        # number and tense are those of the group
        assert not {word + ending for ending in ("s", "es", "ing", "ed", "er")} & set(others)


def test_synonyms_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# my words\n\nDog hound\nzebra  nag hound\n", encoding="utf-8")
    synonyms = read_synonyms(path)
    assert synonyms == {
        "dog": ("hound",),
        "hound": ("dog", "zebra", "nag"),
        "zebra": ("nag", "hound"),
        "nag": ("zebra", "hound"),
    }
    augmentation = TextAugmentation(synonym=1, synonyms=synonyms)
    assert augmentation.augment("a Dog, couch", random.Random(0)) == "a Hound, couch"
    assert hash(augmentation) == hash(pickle.loads(pickle.dumps(augmentation)))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"dog\n", r"words.txt: 'dog': give two or more words"),
        (b"cat feline\ndog dog\n", r"'dog dog'"),
        (b"couch, sofa\n", r"'couch, sofa': .* only spaces between"),
        (b"# nothing\n", r"holds no synonyms; give a line such as"),
        (b"caf\xe9 bar\n", r"words.txt is not UTF-8 .*; save it as UTF-8"),
    ],
)
def test_files_that_hold_no_synonyms(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_synonyms(tmp_path / "words.txt")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop_words": 1.5}, r"stop_words is 1.5; give a number in \[0, 1\]"),
        ({"deletion_rate": -0.1}, "deletion_rate is -0.1"),
        ({"swap": -1.0}, "swap is -1.0"),
        ({"synonym": float("nan")}, "synonym is nan"),
        ({"identity": float("inf")}, "identity is inf"),
        ({"synonym_words": 0}, r"synonym_words is 0; give a number in \[1"),
        ({"swap_pairs": 0}, "swap_pairs is 0"),
    ],
)
def test_impossible_numbers(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextAugmentation(**options)
