"""The tokenizer of a language model's tower."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers

from fastclip.data.tokens import tokenize
from fastclip.models.lm_tokenizer import LanguageModelTokenizer
from tests.models.language import make_language_model

# as the helper's word list numbers its special tokens
UNK, END, CLS, SEP = 0, 1, 1, 2


def words(folder: str, text: str) -> list[int]:
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return [vocabulary.get(word, UNK) for word in text.split()]


def test_ends_pads_and_cuts(tmp_path: Path) -> None:
    name = make_language_model(tmp_path, "gpt2")
    tokenizer = LanguageModelTokenizer(name, 5)
    tokens = tokenizer(["a red cube", "a ball on a red cube", "", "a ball on a"])
    assert tokens.dtype == torch.int64 and tokens.shape == (4, tokenizer.context_length)
    ball = words(name, "a ball on a")
    assert tokens.tolist() == [
        [*words(name, "a red cube"), END, -1],
        [*ball, END],
        [END, -1, -1, -1, -1],
        [*ball, END],
    ]
    assert tokenizer.truncated == 1
    assert tokenizer("a red cube").tolist() == tokens[:1].tolist()
    assert tokenizer([]).shape == (0, 5)
    # half a surrogate pair
    assert tokenizer("a red \ud83d cube").tolist() == tokens[:1].tolist()
    assert tokenize(tokenizer, ["a " * 9, "a"])[1] == 1
    tokenizer.truncated = 0
    tokenizer("a " * 5)
    assert tokenizer.truncated == 1


def test_keeps_special_tokens_of_encoders(tmp_path: Path) -> None:
    name = make_language_model(tmp_path, "bert")
    tokens = LanguageModelTokenizer(name, 4)(["a", "a red cube on a cube"])
    assert tokens.tolist() == [
        [CLS, *words(name, "a"), SEP, -1],
        [CLS, *words(name, "a red"), SEP],
    ]


def test_a_text_has_a_token_even_without_an_end(tmp_path: Path) -> None:
    name = make_language_model(tmp_path, "gpt2")
    plain = transformers.AutoTokenizer.from_pretrained(name)
    plain.eos_token = None
    plain.save_pretrained(tmp_path)
    tokenizer = LanguageModelTokenizer(name, 2)
    assert tokenizer(["", "a", "a red cube"]).tolist() == [
        [0, -1],
        [*words(name, "a"), -1],
        words(name, "a red"),
    ]


def test_is_pickled_and_saved(tmp_path: Path) -> None:
    name = make_language_model(tmp_path / "lm", "bert")
    tokenizer = LanguageModelTokenizer(name, 6)
    texts = ["a red cube", "a blue ball on a red cube"]
    tokens = tokenizer(texts)
    tokenizer.save_pretrained(tmp_path / "run")
    for again in (
        pickle.loads(pickle.dumps(tokenizer)),
        LanguageModelTokenizer(tmp_path / "run", 6),
    ):
        assert torch.equal(again(texts), tokens)


def test_context_length(tmp_path: Path) -> None:
    name = make_language_model(tmp_path, "gpt2")
    assert LanguageModelTokenizer(name).context_length == 128
    assert LanguageModelTokenizer(name, most=24).context_length == 24
    for length in (0, 25):
        with pytest.raises(ValueError, match=f"is {length}; .* takes 1 to 24"):
            LanguageModelTokenizer(name, length, most=24)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastclip-kernels\[recaption\]") as found:
        LanguageModelTokenizer("gpt2")
    assert found.value.name == "transformers"
