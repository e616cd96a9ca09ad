"""Captions with their words out of order, with tags written by hand."""

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastclip.cli.convert_order import AroOrder
from fastclip.data.order_perturbations import (
    Tagged,
    perturb,
    pre_caption,
    spacy_tagger,
    write_order_cases,
)
from fastclip.evaluate.aro import order_cases

# A small black cat and an old dog sleep on the red sofa
TAGS = dict(
    zip(
        "A small black cat and an old dog sleep on the red sofa".split(),
        "DT JJ JJ NN CC DT JJ NN VBP IN DT JJ NN".split(),
        strict=True,
    )
)
CAPTION = " ".join(TAGS)
NOUNS = ("cat", "dog", "sofa")
ADJECTIVES = ("small", "black", "old", "red")


def tag(caption: str) -> Tagged:
    return [
        (word, TAGS.get(word, "NNS" if word.endswith("s") else "RB")) for word in caption.split()
    ]


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("A Cat. On a sofa!", "a cat on a sofa"),
        ('  "Hello" (he said) #1: a*b; c~d ', "hello he said 1 a b c d"),
        ("a well-known, red dog's toy?", "a well-known, red dog's toy?"),
        ("line\nbreaks\tand   blanks", "line breaks and blanks"),
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
        # marks are taken out before words are counted
        ("a . " * 30, " ".join(["a"] * 30)),
        ("...", ""),
    ],
)
def test_pre_caption(caption: str, wanted: str) -> None:
    assert pre_caption(caption) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_perturbations_keep_what_they_must(seed: int) -> None:
    words = CAPTION.split()
    content, others, within, trigrams = (
        text.split() for text in perturb(tag(CAPTION), np.random.default_rng(seed))
    )
    assert all(sorted(text) == sorted(words) for text in (content, others, within, trigrams))
    for place, word in enumerate(words):
        # nouns stay where nouns were, adjectives where adjectives were, all others in place
        kind = next((kind for kind in (NOUNS, ADJECTIVES) if word in kind), (word,))
        assert content[place] in kind
        is_content = word in NOUNS + ADJECTIVES
        assert others[place] == word if is_content else others[place] not in NOUNS + ADJECTIVES
    for start in range(0, len(words), 3):
        assert sorted(within[start : start + 3]) == sorted(words[start : start + 3])
    threes = [tuple(words[start : start + 3]) for start in range(0, len(words), 3)]
    orders = {tuple(itertools.chain(*order)) for order in itertools.permutations(threes)}
    assert tuple(trigrams) in orders


def test_all_permutations_occur_equally_often() -> None:
    """Of a caption of 3 words, of which 2 are nouns: 2, 1, 6 and 1 orders."""
    draws = 1200
    counts: list[dict[str, int]] = [{}, {}, {}, {}]
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        texts = perturb([("cat", "NN"), ("chases", "VBZ"), ("dogs", "NNS")], rng)
        for count, text in zip(counts, texts, strict=True):
            count[text] = count.get(text, 0) + 1
    assert counts[0].keys() == {"cat chases dogs", "dogs chases cat"}
    assert counts[1].keys() == counts[3].keys() == {"cat chases dogs"}
    assert len(counts[2]) == 6
    for count in (counts[0], counts[2]):
        chance = 1 / len(count)
        # five standard deviations
        limit = 5 * (draws * chance * (1 - chance)) ** 0.5
        assert all(abs(found - draws * chance) < limit for found in count.values())


@pytest.mark.parametrize("tokens", [[], [("cat", "NN")], [("very", "RB"), ("old", "JJ")]])
def test_captions_with_little_to_shuffle(tokens: Tagged) -> None:
    texts = perturb(tokens, np.random.default_rng(0))
    assert len(texts) == 4
    assert all(sorted(text.split()) == sorted(word for word, _ in tokens) for text in texts)


def karpathy(path: Path, *images: tuple[str, str, list[str]], folder: str = "val2014") -> Path:
    """Images of (split, filename, captions) in the published layout."""
    entries: list[dict[str, Any]] = [
        {
            **({"filepath": folder} if folder else {}),
            "filename": name,
            "split": split,
            "sentences": [{"raw": caption, "tokens": []} for caption in captions],
        }
        for split, name, captions in images
    ]
    path.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return path


LONG = f"{CAPTION} , and sleep and sleep " * 3


def test_cases(tmp_path: Path) -> None:
    source = karpathy(
        tmp_path / "dataset_coco.json",
        ("train", "1.jpg", ["a train image"]),
        ("test", "2.jpg", [CAPTION, LONG]),
        ("restval", "3.jpg", ["another"]),
        ("test", "4.jpg", [CAPTION]),
    )
    target = tmp_path / "made" / "coco_order.json"
    assert write_order_cases(source, target, tag) == 3
    cases = json.loads(target.read_text())
    assert [case["image_path"] for case in cases] == ["val2014/2.jpg"] * 2 + ["val2014/4.jpg"]
    for case, caption in zip(cases, (CAPTION, LONG, CAPTION), strict=True):
        options = case["caption_options"]
        assert len(options) == 5 and options[0] == pre_caption(caption)
        assert all(len(option.split()) == min(30, len(caption.split())) for option in options)
        assert len(set(options)) > 1
    # the whole caption is shuffled before it is cut: words of its end come to the front
    assert any(sorted(o.split()) != sorted(pre_caption(LONG).split()) for o in options_of(cases, 1))
    # one caption of two images is shuffled in two ways
    assert options_of(cases, 0) != options_of(cases, 2)
    # and what is written can be evaluated
    read = order_cases(target)
    assert [case.texts for case in read] == [tuple(case["caption_options"]) for case in cases]


def options_of(cases: list[Any], number: int) -> list[str]:
    return list(cases[number]["caption_options"])


def test_other_captions_have_no_part_in_a_case(tmp_path: Path) -> None:
    rows = [("test", f"{i}.jpg", [CAPTION, f"{CAPTION} sleep {i}"]) for i in range(4)]

    def made(name: str, images: list[tuple[str, str, list[str]]], seed: int = 0) -> set[Any]:
        source = karpathy(tmp_path / f"{name}_source.json", *images)
        write_order_cases(source, tmp_path / name, tag, seed)
        cases = json.loads((tmp_path / name).read_text())
        return {(case["image_path"], *case["caption_options"]) for case in cases}

    whole = made("a.json", rows)
    assert whole == made("b.json", rows[::-1]) and len(whole) == 8
    assert made("c.json", rows[:2]) < whole
    assert not whole & made("d.json", rows, seed=1)


def test_images_without_folder(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "flickr.json", ("test", "1.jpg", [CAPTION]), folder="")
    write_order_cases(source, tmp_path / "flickr30k_order.json", tag)
    (case,) = json.loads((tmp_path / "flickr30k_order.json").read_text())
    assert case["image_path"] == "1.jpg"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "Karpathy's format"),
        ("{", "Karpathy's format"),
        ('{"images": [{"split": "test"}]}', "it has no 'filename'"),
        ('{"images": [{"split": "val"}]}', "no captions of the split 'test'"),
        ('{"annotations": []}', "it has no 'images'"),
    ],
)
def test_malformed_captions(content: str, message: str, tmp_path: Path) -> None:
    source = tmp_path / "dataset.json"
    source.write_text(content)
    with pytest.raises(ValueError, match=message):
        write_order_cases(source, tmp_path / "out.json", tag)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_without_spacy(tmp_path: Path) -> None:
    source = karpathy(tmp_path / "dataset_coco.json", ("test", "1.jpg", [CAPTION]))
    with pytest.raises(ModuleNotFoundError, match=r"fastclip-kernels\[tagger\]") as message:
        AroOrder(source, tmp_path / "coco_order.json").run()
    assert message.value.name == "spacy" and "spacy download en_core_web_sm" in str(message.value)


class _Token:
    def __init__(self, text: str, tag_: str) -> None:
        self.text, self.tag_ = text, tag_


def test_spacy_is_asked_for_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    """With a stand-in for the package; a model that is not there is reported."""

    class Spacy:
        @staticmethod
        def load(name: str) -> Any:
            if name != "en_core_web_sm":
                raise OSError(f"[E050] Can't find model {name!r}")
            return lambda text: [_Token(*pair) for pair in tag(text)]

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    assert spacy_tagger()(CAPTION) == tag(CAPTION)
    with pytest.raises(ValueError, match="spacy download en_core_web_lg"):
        spacy_tagger("en_core_web_lg")
    source = karpathy(tmp_path / "dataset_coco.json", ("test", "1.jpg", [CAPTION]))
    AroOrder(source, tmp_path / "coco_order.json").run()
    write_order_cases(source, tmp_path / "same.json", tag)
    assert (tmp_path / "coco_order.json").read_text() == (tmp_path / "same.json").read_text()
    assert "coco_order.json: 1 cases" in logged()
