"""Tiny language models of several families, with random weights and tokenizers of their own."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor

from fastclip.models.language_model import LanguageModelTower

TEXTS = ["a red cube", "a blue ball on a red cube", "two green cones", "a ball left of a cone"]
LAYERS, WIDTH, CONTEXT = 3, 16, 24

_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    # so large that what tokens do to each other is far from rounding
    "initializer_range": 0.4,
}
_CONFIGS = {
    "gpt2": (transformers.GPT2Config, {"n_inner": 24, "bos_token_id": 1, "eos_token_id": 1}),
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 1, "sliding_window": 3}),
    "gemma2": (transformers.Gemma2Config, {"num_key_value_heads": 1, "head_dim": 8}),
    "bert": (transformers.BertConfig, {}),
    "mpnet": (transformers.MPNetConfig, {}),
}


def make_language_model(folder: Path, family: str) -> str:
    """A folder as `save_pretrained` leaves it; the model draws dropout where its family has it."""
    ends = ["[CLS]", "[SEP]"] if family == "bert" else ["</s>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", *ends]
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    names = {"eos_token": "</s>"}
    if family == "bert":
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        numbered = [(name, tokenizer.token_to_id(name)) for name in ends]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=numbered
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", **names
    ).save_pretrained(folder)
    kind, own = _CONFIGS[family]
    torch.manual_seed(0)
    config = kind(vocab_size=tokenizer.get_vocab_size(), pad_token_id=0, **_SIZES, **own)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def make_tower(
    folder: Path, family: str, dtype: torch.dtype = torch.float64, **options: object
) -> LanguageModelTower:
    """A tower to 8 values with its last layer unfrozen, in evaluation mode."""
    name = make_language_model(folder, family)
    torch.manual_seed(1)
    how = {"unfrozen_layers": 1, **options}
    return LanguageModelTower.from_pretrained(name, 8, **how).to(dtype).eval()


def draw_tokens(*lengths: int) -> Tensor:
    """Texts of so many tokens, padded to the longest."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 10, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = -1
    return tokens
