"""DOCCI in its published layout: the test split, both directions, and what the tokenizer cuts."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from fastclip.evaluate.docci import count_truncated, evaluate_docci
from fastclip.evaluate.features import Encoding
from fastclip.models.clip import Model
from tests.evaluate.planned import BLUE, GREEN, RED, WHITE, paint, planned_model, write_json

TEXTS = {
    "A red wall.": (9, 1, 1),
    "A green wall.": (1, 9, 1),
    "A blue wall.": (5, 9, 1),
    "": (0, 0, 1),
}


def lay_out(root: Path, rows: list[tuple[str, str, str, tuple[int, int, int]]]) -> Model:
    """Descriptions of (split, id, text) with an image of a color."""
    entries = []
    for split, name, text, color in rows:
        image = paint(root / "images" / f"{name}.jpg", color)
        entries.append(
            {"split": split, "image_file": image.name, "description": text, "example_id": name}
        )
    write_json(root / "docci_descriptions.jsonlines", entries)
    return planned_model(TEXTS)


def test_by_hand(tmp_path: Path) -> None:
    rows = [
        ("train", "train_0", "not even tokenized", WHITE),
        ("test", "test_0", "A red wall.", RED),
        ("test", "test_1", "A green wall.", GREEN),
        ("qual_test", "qual_test_0", "nor this", WHITE),
        ("test", "test_2", "A blue wall.", BLUE),
    ]
    metrics = evaluate_docci(lay_out(tmp_path, rows), tmp_path, Encoding(), k=(1, 2, 3))
    # cosines of the three texts with red are 0.99, 0.11, 0.48; green 0.11, 0.99, 0.87;
    # blue 0.11, 0.11, 0.10: image 2 finds its text last, and text 2 its image last
    assert {name: metrics[name] for name in metrics if "@1" in name} == {
        "image_retrieval_recall@1": pytest.approx(2 / 3),
        "text_retrieval_recall@1": pytest.approx(2 / 3),
    }
    assert metrics["image_retrieval_recall@2"] == metrics["text_retrieval_recall@2"]
    assert metrics["text_retrieval_recall@2"] == pytest.approx(2 / 3)
    assert metrics["image_retrieval_recall@3"] == metrics["text_retrieval_recall@3"] == 1
    assert metrics["images"] == metrics["texts"] == 3
    assert metrics["context_length"] == 1


def test_equal_descriptions_belong_to_all_their_images(tmp_path: Path) -> None:
    rows = [
        ("test", "test_0", "A red wall.", RED),
        ("test", "test_1", "A red wall.", (250, 20, 20)),
        ("test", "test_2", "A green wall.", GREEN),
    ]
    metrics = evaluate_docci(lay_out(tmp_path, rows), tmp_path, Encoding(), k=(1,))
    assert metrics["images"] == 3 and metrics["texts"] == 2
    assert metrics["image_retrieval_recall@1"] == metrics["text_retrieval_recall@1"] == 1


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks docci_descriptions\.jsonlines"):
        evaluate_docci(planned_model(TEXTS), tmp_path, Encoding())
    model = lay_out(tmp_path, [("train", "train_0", "A red wall.", RED)])
    with pytest.raises(ValueError, match="no entry of the split 'test'"):
        evaluate_docci(model, tmp_path, Encoding())


class Words:
    """Cuts at `context_length` words, ends a text with 1 and pads with `padding`."""

    def __init__(self, context_length: int, padding: int = 0, end: tuple[int, ...] = (1,)) -> None:
        self.length, self.padding, self.end = context_length, padding, end

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        length = context_length or self.length
        rows = torch.full((len(texts), length), self.padding)
        for row, text in zip(rows, texts, strict=True):
            tokens = [len(word) + 1 for word in text.split()][: length - len(self.end)]
            row[: len(tokens) + len(self.end)] = torch.tensor([*tokens, *self.end])
        return rows


class Counting:
    """Counts for itself, as the language models' tokenizers do."""

    truncated = 7

    def __call__(self, texts: list[str]) -> Tensor:
        self.truncated += sum(len(text.split()) > 6 for text in texts)
        return torch.zeros(len(texts), 6, dtype=torch.int64)


SIX = "a dog on the red sofa"
# 5, 6, 7 and 30 words, and none
LENGTHS = ["a dog on the sofa", SIX, f"{SIX} there", "dog " * 30, ""]


@pytest.mark.parametrize(
    ("tokenizer", "cut", "length"),
    [
        # with an end token in the context 6 words just fit into 7
        (Words(7), 2, 7),
        (Words(7, padding=-1), 2, 7),
        (Words(6, end=()), 2, 6),
        (Words(31), 0, 31),
        # a begin and an end token
        (open_clip.SimpleTokenizer(context_length=8), 2, 8),
        (open_clip.SimpleTokenizer(context_length=7), 3, 7),
        (open_clip.SimpleTokenizer(), 0, 77),
        (Counting(), 2, 6),
        # cannot be asked for more: what just fits counts too
        (lambda texts: Words(7)(texts), 3, 7),
    ],
)
def test_truncated(tokenizer: Any, cut: int, length: int) -> None:
    assert count_truncated(tokenizer, LENGTHS) == (cut, length)


def test_exclamation_marks_are_no_padding() -> None:
    """Token 0 of open_clip's tokenizer is both."""
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    assert count_truncated(tokenizer, ["! " * n for n in (5, 6, 7, 9)])[0] == 2


def test_share_of_truncated_descriptions(tmp_path: Path) -> None:
    rows = [("test", f"test_{i}", text, RED) for i, text in enumerate(LENGTHS[:4])]
    model = lay_out(tmp_path, rows)
    model.model.encode_text = lambda tokens: tokens[:, :3].float()
    metrics = evaluate_docci(model._replace(tokenizer=Words(7)), tmp_path, Encoding(), k=(1,))
    assert metrics["truncated"] == 0.5 and metrics["context_length"] == 7
