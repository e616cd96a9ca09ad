"""Choosing the true text: rules, means over groups and cases, and what is encoded."""

import math
import random
from pathlib import Path

import pytest
import torch

from fastclip.evaluate.choices import (
    Choice,
    Rule,
    Scores,
    accuracy,
    first,
    score_choices,
    strict,
    tied,
)
from fastclip.evaluate.entries import find_parts, read_entries
from fastclip.evaluate.features import Encoding, ImageFile
from fastclip.evaluate.registry import BENCHMARKS
from tests.evaluate.planned import BLUE, RED, paint, planned_model, write_json

NAN = math.nan


@pytest.mark.parametrize(
    ("scores", "is_strict", "is_first", "is_tied"),
    [
        ((0.5, 0.4, 0.3), True, True, False),
        ((0.4, 0.5, 0.3), False, False, False),
        ((0.5, 0.5, 0.3), False, True, True),
        ((0.5, 0.3, 0.5), False, True, True),
        # equal to one that is not the best
        ((0.4, 0.4, 0.5), False, False, False),
        ((NAN, 0.5), False, False, False),
        ((0.5, NAN), False, False, False),
        ((0.5, NAN, 0.5), False, False, False),
        ((NAN, NAN), False, False, False),
        ((-math.inf, -math.inf), False, True, True),
    ],
)
def test_rules(scores: Scores, is_strict: bool, is_first: bool, is_tied: bool) -> None:
    assert (strict(scores), first(scores), tied(scores)) == (is_strict, is_first, is_tied)


def case(group: str) -> Choice:
    return Choice(ImageFile(Path("x.png")), ("true", "false"), group)


def test_means_by_hand() -> None:
    cases = [case(group) for group in ("b", "a", "b", "b", "a", "c")]
    scores = [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.5), (2.0, 1.0), (0.0, 1.0)]
    found = accuracy(cases, scores)
    assert found.by_group == {"b": 2 / 3, "a": 1 / 2, "c": 0.0}
    assert found.cases == {"b": 3, "a": 2, "c": 1}
    assert found.micro == 3 / 6 and found.ties == 1 / 6
    assert found.macro() == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert found.macro(at_least=2) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.macro(at_least=3) == 2 / 3
    assert found.macro(at_least=4) is None
    # the tie in group a is right where the first of the best wins
    lenient = accuracy(cases, scores, first)
    assert lenient.by_group == {"b": 2 / 3, "a": 1.0, "c": 0.0} and lenient.micro == 4 / 6
    assert lenient.ties == found.ties


@pytest.mark.parametrize("rule", [strict, first])
@pytest.mark.parametrize("seed", range(4))
def test_means_equal_plain_counting(rule: Rule, seed: int) -> None:
    """On few levels, so that ties are many, and with NaN among them."""
    rng = random.Random(seed)
    levels = [0.0, 0.1, 0.2, 0.3, NAN]
    cases = [case(rng.choice("abcde")) for _ in range(60)]
    scores = [tuple(rng.choices(levels, k=rng.choice([2, 5]))) for _ in cases]
    found = accuracy(cases, scores, rule)
    right: dict[str, list[bool]] = {}
    ties = 0
    for own, values in zip(cases, scores, strict=True):
        broken = any(value != value for value in values)
        best = max(values[1:])
        if rule is strict:
            chosen = not broken and values[0] > best
        else:
            chosen = not broken and values.index(max(values)) == 0
        right.setdefault(own.group, []).append(chosen)
        ties += not broken and values[0] == best
    assert ties > 0
    shares = [sum(group) / len(group) for group in right.values()]
    assert list(found.by_group.values()) == shares
    assert found.macro() == pytest.approx(sum(shares) / len(shares))
    assert found.micro == sum(map(sum, right.values())) / 60 and found.ties == ties / 60


def test_images_and_texts_are_encoded_once(tmp_path: Path) -> None:
    red, blue = (ImageFile(paint(tmp_path / f"{c}.png", c)) for c in (RED, BLUE))
    model = planned_model({"warm": (3, 0, 4), "cold": (0, 0, 1), "dark": (0, -2, 0)})
    cases = [
        Choice(red, ("warm", "cold", "dark")),
        Choice(blue, ("cold", "warm", "warm", "cold")),
        Choice(red, ("cold", "dark")),
    ]
    scores = score_choices(model, cases, Encoding(batch_size=2))
    # cosines of 3-4-5 triangles are right to a rounding
    assert scores[0] == pytest.approx((0.6, 0, 0))
    assert scores[1] == pytest.approx((1, 0.8, 0.8, 1))
    assert scores[2] == pytest.approx((0, 0))
    assert scores[1][1] == scores[1][2] and scores[1][0] == scores[1][3]
    assert (model.model.images, model.model.texts) == (2, 3)


@pytest.mark.parametrize("width", [3, 17, 512])
def test_equal_texts_tie_to_the_bit(width: int, tmp_path: Path) -> None:
    """Whatever their place among others: a matrix product differs in the last bits."""
    image = ImageFile(paint(tmp_path / "image.png", (201, 87, 33)))
    rng = random.Random(0)
    table = {str(i): [rng.random() for _ in range(width)] for i in range(9)}
    texts = ("4", *table, "4")
    model = planned_model(table)
    for _ in range(5):
        values = torch.tensor([[rng.gauss(0, 1) for _ in range(width)]])
        model.model.encode_image = lambda images, values=values: values
        (scores,) = score_choices(model, [Choice(image, texts)], Encoding())
        assert scores[0] == scores[5] == scores[-1] and len(set(scores)) == 9


FILES = {"one": "one.json", "two": "deep/two.json"}


def test_parts_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks one\.json, deep/two\.json; get") as message:
        find_parts("aro", tmp_path, FILES)
    assert BENCHMARKS["aro"].source in str(message.value)
    two = write_json(tmp_path / "deep" / "two.json", [])
    assert find_parts("aro", tmp_path, FILES) == find_parts("aro", tmp_path, FILES, ["two"])
    assert find_parts("aro", tmp_path, FILES) == {"two": two}
    # what is asked for must be there
    with pytest.raises(FileNotFoundError, match=r"lacks one\.json; get"):
        find_parts("aro", tmp_path, FILES, ["one", "two"])
    one = write_json(tmp_path / "one.json", [])
    assert list(find_parts("aro", tmp_path, FILES, ["two", "one"]).values()) == [one, two]
    with pytest.raises(ValueError, match="no part 'three'; choose from one, two"):
        find_parts("aro", tmp_path, FILES, ["three"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", '[{"a": "x", "n": 1}, {"a": "y", "n": 2.5}]'),
        ("object.json", '{"0": {"a": "x", "n": 1}, "1": {"a": "y", "n": 2.5}}'),
        ("lines.jsonl", '{"a": "x", "n": 1}\n\n{"a": "y", "n": 2.5}'),
        ("lines.jsonlines", '{"a": "x", "n": 1}\r\n{"a": "y", "n": 2.5}\n'),
    ],
)
def test_entries(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    wanted = [{"a": "x", "n": 1}, {"a": "y", "n": 2.5}]
    assert read_entries(path, {"a": str, "n": (int, float)}) == wanted


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    """U+2028 ends a line for Python's str, but not for JSON lines."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": "one\u2028caption"}\n', encoding="utf-8")
    assert read_entries(path, {"a": str}) == [{"a": "one\u2028caption"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": "x"}', "is not valid JSON"),
        ("[]", "no list of entries"),
        ("{}", "no list of entries"),
        ('"a"', "no list of entries"),
        ("3", "no list of entries"),
        ('[{"a": "x"}, {"b": "x"}]', "entry 1: a is missing"),
        ('[{"a": 3}]', "entry 0: a is missing or of another type; an entry has a"),
        ('["a"]', "entry 0"),
    ],
)
def test_malformed_entries(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_entries(path, {"a": str})
    assert str(path) in str(error.value)
