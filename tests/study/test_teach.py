"""The tiny language model of a study: it learns, and its states are centered."""

import itertools
import math
from pathlib import Path

import torch
import transformers

from fastclip.study.language_model import teach

COLORS = "red green blue yellow black white gray orange".split()
SHAPES = "circle square star cross ring triangle diamond heart".split()
PLACES = ["above", "below", "left of", "right of"]


def test_it_learns_and_its_states_have_no_mean(tmp_path: Path) -> None:
    pairs = itertools.product(COLORS, SHAPES)
    texts = [
        f"a {color} {shape} {place} a {other} {what}, on a table"
        for (color, shape), place, (other, what) in itertools.product(
            pairs, PLACES, (("green", "star"), ("blue", "ring"))
        )
    ]
    assert len(set(texts)) == 512
    loss = teach(tmp_path / "lm", texts, steps=20)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    model = transformers.AutoModel.from_pretrained(tmp_path / "lm").eval()
    assert loss < math.log(len(tokenizer))
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    # texts differ in length, and padding is left out
    assert encoded["attention_mask"].min() == 0
    with torch.no_grad():
        states = model(**encoded).last_hidden_state
    pooled = torch.stack(
        [
            own[mask.bool()].mean(0)
            for own, mask in zip(states, encoded["attention_mask"], strict=True)
        ]
    )
    assert pooled.std(dim=0).mean() > 0.01
    # sums of float32 in another order
    assert pooled.mean(0).abs().max() < 1e-5


def test_the_seed_decides_weights_and_order(tmp_path: Path) -> None:
    texts = [f"number {number}" for number in range(512)]
    losses = [
        teach(tmp_path / str(place), texts, steps=1, seed=seed)
        for place, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]
