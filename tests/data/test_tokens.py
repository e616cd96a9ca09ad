"""Counting texts that are too long for a tokenizer."""

import pickle
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from fastclip.data import tokens
from fastclip.data.augment import Augmentation
from fastclip.data.captions import CaptionSampling
from fastclip.data.loader import TrainingLoader
from fastclip.data.order import Order
from fastclip.data.shards import ShardSource
from fastclip.data.tokens import LEAST_BYTES, tokenize
from fastclip.data.training_samples import TrainingSamples
from tests.conftest import jpeg

CONTEXT = 8


class Counting:
    """Cuts at three letters and counts, as the language models' tokenizers do."""

    truncated = 5

    def __call__(self, texts: list[str]) -> Tensor:
        self.truncated += sum(len(text) > 3 for text in texts)
        return torch.tensor([[*map(ord, text[:3]), *[0] * (3 - len(text[:3]))] for text in texts])


def simple(**options: Any) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT, **options)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("dog " * (CONTEXT - 3), 0),
        # exactly full: with the tokens of begin and end
        ("dog " * (CONTEXT - 2), 0),
        ("dog " * (CONTEXT - 1), 1),
        ("dog " * 99, 1),
        ("supercalifragilistic" * 3, 1),
        # token 0 is an exclamation mark's: a row may look padded in the middle
        ("! " * (CONTEXT - 2), 0),
        ("! " * (CONTEXT - 1), 1),
        ("", 0),
    ],
)
@pytest.mark.parametrize("mask", ["", "random"])
def test_full_is_not_cut(text: str, cut: int, mask: str) -> None:
    tokenizer = simple(reduction_mask=mask)
    torch.manual_seed(0)
    plain = tokenizer(["a", text, "b"])
    torch.manual_seed(0)
    tokens, found = tokenize(tokenizer, ["a", text, "b"])
    assert torch.equal(tokens, plain) and found == cut


@pytest.mark.parametrize("context", [8, 77, 256])
def test_long_texts_have_the_tokens_they_had(context: int) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    rng = random.Random(0)
    letters = "".join(rng.choices(string.ascii_lowercase, k=2500))
    texts = [
        letters,
        "antidisestablishmentarianism " * 500,
        "ab" * 2000,
        "\N{GRINNING FACE}" * 900,
        "\u72d7" * 900,
        # what is cleaned away takes no room
        " " * 50_000 + "a dog " + "&amp;amp;" * 3000 + " and a cat",
        "a dog",
    ]
    tokens, cut = tokenize(tokenizer, texts)
    assert torch.equal(tokens, tokenizer(texts))
    assert cut == sum(len(tokenizer.encode(text)) + 2 > context for text in texts)


def test_a_word_of_a_mebibyte_stalls_nothing() -> None:
    tokenizer = open_clip.SimpleTokenizer()
    seen: list[int] = []
    plain = tokenizer.bpe
    tokenizer.bpe = lambda token: seen.append(len(token)) or plain(token)
    letters = "".join(random.Random(0).choices(string.ascii_lowercase, k=1 << 20))
    assert tokenize(tokenizer, [letters])[1] == 1
    # the time grows with the square of these
    assert max(seen) <= LEAST_BYTES


def test_words_without_end_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_WORDS", 50)
    tokenizer, plain = simple(), simple()
    rng = random.Random(0)
    for _ in range(100):
        words = ["".join(rng.choices(string.ascii_lowercase, k=9)) for _ in range(10)]
        texts = [*words, "<start_of_text> a dog"]
        assert torch.equal(tokenize(tokenizer, texts)[0], plain(texts))
        # and what one call adds
        assert len(tokenizer.cache) <= 50 + 13
    assert len(plain.cache) > 900


def test_texts_are_counted_one_by_one() -> None:
    assert tokenize(simple(), ["dog " * 9, "dog", "cat " * 7, "cat " * 6])[1] == 2


def test_other_tokenizers() -> None:
    counting = Counting()
    assert [tokenize(counting, texts)[1] for texts in (["abc"], ["abcd", "ab", "abcde"])] == [0, 2]
    assert tokenize(lambda texts: torch.ones(len(texts), 2), ["a long text"] * 3)[1] == 0


@pytest.mark.parametrize("make", [simple, Counting])
def test_batches_say_how_many_texts_were_cut(
    make: Callable[[], Any], make_shard: Callable[..., Path]
) -> None:
    lengths = [1, 3, 6, 7, 30, 2, 40, 6]
    members = []
    for i, length in enumerate(lengths):
        members += [(f"{i}.jpg", jpeg()), (f"{i}.txt", ("a " * length).strip().encode())]
    source = ShardSource(str(make_shard(members=members)))
    # the false caption, with a "no" before it, is longer by a token
    captions = CaptionSampling(negatives=1)
    cuts = []
    for workers in (0, 2):
        samples = TrainingSamples(
            source, Order(source.counts, 0), Augmentation(16), make(), captions
        )
        loader = TrainingLoader(pickle.loads(pickle.dumps(samples)), 4, workers=workers)
        found: dict[str, int] = {}
        for batch in loader.batches(0):
            found |= zip(batch["key"], batch["cut"], strict=True)
        cuts.append([found[str(i)] for i in range(len(lengths))])
    if make is simple:
        wanted = [(n > CONTEXT - 2) + (n + 1 > CONTEXT - 2) for n in lengths]
    else:
        wanted = [(2 * n - 1 > 3) + (2 * n + 2 > 3) for n in lengths]
    assert cuts == [wanted, wanted]
