"""Improved semantic guidance: a language model as the text tower.

Stone et al. 2024, "Learning Visual Composition through Improved Semantic Guidance": a language
model that is frozen but for its last layers, which attend in both directions. Not known of the
paper, and open here: how states are pooled, the projection, the length of the context.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models import description
from fastclip.models.clip import Model, system_of
from fastclip.models.lm_tokenizer import LanguageModelTokenizer, import_transformers
from fastclip.models.options import SystemOptions
from fastclip.models.split_model import SplitModel
from fastclip.models.state_cache import StateCache
from fastclip.nn.heads import linear_head

Pooling = Literal["mean", "last"]


class LanguageModelTower(nn.Module):
    """A language model whose pooled states are projected into the common space.

    Args:
        model: see `SplitModel`.
        output: width of the common space.
        unfrozen_layers: trained, from the last.
        pooling: "mean" of all tokens' states, or the "last" token's.
        cache_bytes: most bytes of the frozen layers' states kept on the host, by text.

    Attributes:
        cache: `StateCache`, with counts of hits and misses.
        max_length: most tokens of a text; None where the model does not say.

    Raises:
        ValueError: another pooling, or see `SplitModel` and `StateCache`.
    """

    def __init__(
        self,
        model: nn.Module,
        output: int,
        *,
        unfrozen_layers: int = 4,
        pooling: Pooling = "mean",
        cache_bytes: int = 0,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is {pooling!r}; give 'mean' or 'last'")
        self.pooling = pooling
        self.cache = StateCache(cache_bytes)
        self.language_model = SplitModel(model, unfrozen_layers)
        config = self.language_model.model.config
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.projection = linear_head(self.language_model.width, output)

    @classmethod
    def from_pretrained(cls, name: str | Path, output: int, **options: Any) -> "LanguageModelTower":
        """With the weights of a model on the Hugging Face Hub, or in a folder, in float32.

        Args:
            output, options: see the class.

        Raises:
            ValueError, OSError: there is no such model, or see the class.
            ModuleNotFoundError: transformers is not installed.
        """
        transformers = import_transformers()
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        load = transformers.AutoModel.from_pretrained
        return cls(
            load(name, config=config, trust_remote_code=False, **_precision(config)),
            output,
            **options,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], output: int, **options: Any
    ) -> "LanguageModelTower":
        """With random weights, by what `config_dict` gave; arguments and errors as there."""
        transformers = import_transformers()
        made = transformers.AutoConfig.for_model(**description.harmless(dict(config)))
        build = transformers.AutoModel.from_config
        return cls(build(made, trust_remote_code=False, **_precision(made)), output, **options)

    def config_dict(self) -> dict[str, Any]:
        """The language model's configuration, in JSON's types."""
        config = json.loads(self.language_model.model.config.to_json_string(use_diff=False))
        # where it was on the machine that trained it
        config.pop("_name_or_path", None)
        return config

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L) int64, below 0 at padding after a text, to (N, output).

        Raises:
            ValueError: a text is longer than the model takes, or there is a cache under ZeRO-3.
        """
        # DeepSpeed's mark: a rank whose texts are all there would leave the others waiting
        if self.cache.limit and hasattr(self.projection.weight, "ds_id"):
            raise ValueError(
                f"--text-lm-cache-bytes is {self.cache.limit}, but ZeRO-3's ranks must run all "
                "layers together; leave it out, or use --deepspeed-config ds_zero2"
            )
        real = tokens >= 0
        if torch.compiler.is_exporting():
            # a graph for texts of any length
            states = self.language_model.states(tokens)
        else:
            # one read by the host; most texts are far shorter than the context
            longest = int(real.sum(1).max())
            if self.max_length is not None and longest > self.max_length:
                raise ValueError(
                    f"a text has {longest} tokens and the language model takes {self.max_length}; "
                    "cut it by a shorter --context-length"
                )
            tokens, real = tokens[:, :longest], real[:, :longest]
            states = self.cache.fetch(tokens, self.language_model.states)
        states = self.language_model(tokens, states)
        if self.pooling == "mean":
            pooled = states.masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True)
        else:
            pooled = states[torch.arange(states.shape[0], device=states.device), real.sum(1) - 1]
        return self.projection(pooled)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `SplitModel.set_grad_checkpointing`."""
        self.language_model.set_grad_checkpointing(enable)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LanguageModelTower":
        # of another dtype or device
        self.cache.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.cache.clear()
        super()._load_from_state_dict(*args)


class LanguageModelCLIP(nn.Module):
    """An open_clip image tower with a language model, used as other open_clip models are.

    Args:
        model: the open_clip model, whose image tower, scale and bias are taken over.
        text: (N, L) tokens to features of the image tower's width.
    """

    def __init__(self, model: nn.Module, text: LanguageModelTower) -> None:
        super().__init__()
        # open_clip's towers share no base class
        self.visual: Any = model.visual
        self.text = text
        self.logit_scale: nn.Parameter = model.logit_scale  # type: ignore[assignment]
        self.logit_bias = getattr(model, "logit_bias", None)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(N, 3, S, S) to (N, D)."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(N, L) tokens to (N, D)."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Any]:
        """Normalized image_features and text_features, (N, D) or None, logit_scale, logit_bias."""
        output: dict[str, Any] = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            output["logit_bias"] = self.logit_bias
        return output

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the towers' activations in the backward pass instead of keeping them."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def lock_image_tower(self, unlocked_groups: int = 0) -> None:
        """Freeze the image tower but for its last groups of layers."""
        self.visual.lock(unlocked_groups=unlocked_groups)


def with_language_model(
    model: Model, options: SystemOptions, described: Path | None = None
) -> Model:
    """The model with the language model of the options in place of its text tower.

    Args:
        described: a run directory, whose description and tokenizer are taken: random weights.

    Raises:
        ValueError: the model is not of open_clip's two-tower classes, or see `LanguageModelTower`
            and `LanguageModelTokenizer`.
        ModuleNotFoundError: transformers is not installed.
    """
    import open_clip

    towers = model.model
    if not isinstance(towers, open_clip.CLIP | open_clip.CustomTextCLIP):
        raise ValueError(
            f"--text-lm replaces the text tower of CLIP models, not of a {type(towers).__name__}; "
            "give another --model"
        )
    with torch.no_grad():
        device = towers.logit_scale.device
        width = towers.encode_text(model.tokenizer([""]).to(device)).shape[1]
    how: dict[str, Any] = {
        "unfrozen_layers": options.text_lm_unfrozen,
        "pooling": options.text_lm_pooling,
        "cache_bytes": options.text_lm_cache_bytes,
    }
    assert options.text_lm is not None
    if described is None:
        text = LanguageModelTower.from_pretrained(options.text_lm, width, **how)
    else:
        config = system_of(described)["language_model"]
        text = LanguageModelTower.from_config(config, width, **how)
    tokenizer = LanguageModelTokenizer(
        described or options.text_lm, options.context_length, text.max_length
    )
    return model._replace(model=LanguageModelCLIP(towers, text.to(device)), tokenizer=tokenizer)


def _precision(config: Any) -> dict[str, Any]:
    """What a model is made with, for its weights to be trained and its logits to be all there."""
    # of those that a model is made with by default, SDPA leaves Gemma 2's caps out
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return {"dtype": torch.float32, **({"attn_implementation": "eager"} if capped else {})}
