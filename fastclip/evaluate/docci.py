"""DOCCI: images found by long descriptions, 136 words on average (Onoe et al. 2024)."""

import inspect
from pathlib import Path
from typing import Any

from fastclip.data.tokens import tokenize
from fastclip.evaluate.entries import read_entries
from fastclip.evaluate.features import Encoding, ImageFile, embed_files, embed_texts
from fastclip.evaluate.registry import require
from fastclip.evaluate.retrieval import caption_pairs, chance_of_retrieval, retrieval_metrics
from fastclip.evaluate.table import CHANCE
from fastclip.models.clip import Model

SPLIT = "test"

_FIELDS = dict.fromkeys(("split", "image_file", "description"), str)


def evaluate_docci(
    model: Model, root: Path, encoding: Encoding, k: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Any]:
    """Recall between the test images and their descriptions, in both directions.

    Where the tokenizer cuts most descriptions, recall shows that as much as the model.

    Args:
        root: folder with docci_descriptions.jsonlines and images/.
        k: the ranks asked for.

    Returns:
        What `retrieval_metrics` gives; "chance", what guessing scores in the same; "images" and
        "texts", their numbers; "truncated", the share of descriptions that the tokenizer cuts to
        its "context_length".

    Raises:
        ValueError: a description is malformed, there is none of the split, or images are missing
            or cannot be read.
        FileNotFoundError: the files are not there.
    """
    root = require("docci", root)
    path = root / "docci_descriptions.jsonlines"
    entries = [entry for entry in read_entries(path, _FIELDS) if entry["split"] == SPLIT]
    if not entries:
        raise ValueError(f"{path} has no entry of the split {SPLIT!r}; download the file again")
    texts, pairs = caption_pairs([(entry["description"],) for entry in entries])
    files = [ImageFile(root / "images" / entry["image_file"]) for entry in entries]
    image_features = embed_files(model, files, encoding)
    text_features = embed_texts(
        model, texts, batch_size=encoding.batch_size, precision=encoding.precision
    )
    cut, context_length = count_truncated(model.tokenizer, texts)
    return {
        **retrieval_metrics(image_features, text_features, pairs, k),
        CHANCE: chance_of_retrieval(pairs, k),
        "images": len(files),
        "texts": len(texts),
        "truncated": cut / len(texts),
        "context_length": context_length,
    }


def count_truncated(tokenizer: Any, texts: list[str]) -> tuple[int, int]:
    """How many of the texts the tokenizer cuts, and its context length.

    Of a tokenizer that neither counts them itself nor takes a context_length, texts that just fit
    count too.

    Args:
        tokenizer: makes (n, L) int64 of n texts; padding comes last.
    """
    tokens, counted = tokenize(tokenizer, texts)
    length = tokens.shape[1]
    if hasattr(tokenizer, "truncated") or hasattr(tokenizer, "eot_token_id"):
        return counted, length
    padding = tokenizer([""])[0, -1]
    if "context_length" not in inspect.signature(tokenizer).parameters:
        return int((tokens[:, -1] != padding).sum()), length
    # with one place more, a text that was cut has another token in the last place, or one after it
    longer = tokenizer(texts, context_length=length + 1)
    cut = (longer[:, :-1] != tokens).any(dim=1) | (longer[:, -1] != padding)
    return int(cut.sum()), length
