"""`patch_transformers()`: Hugging Face's CLIP and SigLIP with fastclip's attention and loss."""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.functional import Exchange, clip_loss, siglip_loss
from fastclip.integrations.patch import MARK, PatchHandle, original_forward, replace_forward
from fastclip.ops.attention import attention
from fastclip.ops.backend import check_backend
from fastclip.ops.collectives import check_exchange

FAMILIES = "clip", "siglip", "metaclip_2"
"""What the model types start with whose attention is replaced."""
NAME = "fastclip"
"""Of the attention among those that transformers knows."""
MAPS = "_fastclip_maps"
"""Attribute of an attention layer: whether the call under way wants its maps."""


def patch_transformers(
    model: nn.Module,
    *,
    loss: bool = True,
    attention: bool = True,
    logits: bool = False,
    dist: Exchange | None = None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> PatchHandle:
    """Give a CLIP or SigLIP of Hugging Face fastclip's attention and memory-linear loss.

    Exchanged whole are CLIPModel, MetaClip2Model, SiglipModel and Siglip2Model. With
    `return_loss=True` the forward computes the loss without ever forming the similarities:
    `logits_per_image` and `logits_per_text` are then None unless asked for. Without, all is as it
    was. Calls with a padding mask, or with dropout of attention while training, take torch's
    attention; calls with `output_attentions=True` form the attention maps and return them.

    Args:
        model: from `transformers`; its weights and its configuration's other entries stay as they
            are.
        loss: whether to exchange the loss; a tower alone (CLIPVisionModel) has none.
        attention: whether to replace the attention of both towers.
        logits: whether to form the logits beside the loss, (N, N) each.
        dist: None: negatives are those of one process, as in transformers. "gather" or "ring":
            those of all, with equally many pairs on each; averaged gradients (DDP) are then the
            full batch's.
        group: the process group of `dist`; None: the default one.
        backend: "auto", "triton" or "reference" for attention and loss; "sdpa" or "flash" for the
            attention, the loss's then chosen as by "auto".

    Returns:
        A handle with `undo()` that is also a context manager.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ImportError: it is older than 5.0, whose towers return their outputs in another form.
        ValueError: the model is not one of Hugging Face's CLIP or SigLIP, or, without
            `loss=False`, has a loss of another's (CLIPSeg, VisionTextDualEncoder); an unknown
            `dist`, or `logits` beside it; or it was patched before with other options, or prepared
            by accelerate.

    Examples:
        >>> import fastclip, torch, transformers
        >>> model = transformers.CLIPModel(
        ...     transformers.CLIPConfig(
        ...         text_config={"num_hidden_layers": 1, "vocab_size": 100, "eos_token_id": 99},
        ...         vision_config={"num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        ...     )
        ... )
        >>> images, texts = torch.zeros(2, 3, 32, 32), torch.tensor([[0, 7, 99], [0, 8, 99]])
        >>> with fastclip.patch_transformers(model):
        ...     found = model(pixel_values=images, input_ids=texts, return_loss=True)
        >>> found.loss.shape, found.logits_per_image is None
        (torch.Size([]), True)
    """
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(
            f"transformers is {transformers.__version__}; patch_transformers needs 5.0 or newer"
        )
    check_exchange(dist)
    if logits and dist is not None:
        raise ValueError("logits=True has one process's logits; leave out dist, or the logits")
    losses = _losses()
    models = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    known = [m for m in models if m.config.model_type.startswith(FAMILIES)]
    names = [kind.__name__ for kind in losses]
    if not known:
        raise ValueError(
            f"{type(model).__name__} is not a CLIP or SigLIP of transformers; give one of "
            f"{', '.join(names)} or one of their towers"
        )
    for part in models if loss else ():
        # a tower alone has none
        if hasattr(part, "logit_scale") and not isinstance(part, tuple(losses)):
            raise ValueError(
                f"the loss of {type(part).__name__} cannot be replaced, only that of "
                f"{', '.join(names)}; loss=False replaces its attention alone"
            )
    handle = PatchHandle()
    if attention:
        _replace_attention(known, backend, handle)
    for part in known if loss else ():
        for kind, of_features in losses.items():
            if isinstance(part, kind):
                options = {"dist": dist, "group": group, "backend": _loss_backend(backend)}
                # what it was before a patch, if it is patched
                original = getattr(type(part), MARK, type(part))
                arguments = (original, of_features, logits, options)
                made_by = (_with_loss, arguments)
                replace_forward(part, _with_loss(*arguments), handle, made_by)
    return handle


def _losses() -> dict[Any, Callable[..., Tensor]]:
    """The classes that are replaced whole, and the loss of each."""
    import transformers

    found = {
        "CLIPModel": _clip,
        "MetaClip2Model": _clip,
        "SiglipModel": _siglip,
        "Siglip2Model": _siglip,
    }
    return {
        getattr(transformers, name): loss
        for name, loss in found.items()
        if hasattr(transformers, name)
    }


def _replace_attention(models: list[Any], backend: str, handle: PatchHandle) -> None:
    check_backend(backend, "attention")
    hook = _Noted(backend)
    new = [model for model in models if model.config._attn_implementation != hook.name]
    # setting it sets that of the towers too: theirs are restored after it
    before = [c for model in new for c in reversed(list(_configs(model.config)))]
    for config in before:
        handle.on_undo(
            partial(setattr, config, "_attn_implementation", config._attn_implementation)
        )
    for model in new:
        model.config._attn_implementation = hook.name
    # a model's modules are those of its towers, too
    for layer in dict.fromkeys(module for model in new for module in model.modules()):
        if hasattr(layer, "is_causal") and hasattr(layer, "config"):
            handle.on_undo(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _configs(config: Any) -> Iterator[Any]:
    """A configuration, and those of its towers."""
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


class _Noted:
    """Before a layer's call: note whether it wants its maps.

    SigLIP's layers do not pass their options on to `_attend`. A process that unpickles a patched
    model makes its hooks, and with them knows the attention that the configuration names.
    """

    def __init__(self, backend: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        self.backend = backend
        self.name = NAME if backend == "auto" else f"{NAME}_{backend}"
        AttentionInterface.register(self.name, partial(_attend, backend=backend))
        # padding and causal masks come as for torch's attention: none where nothing is hidden
        AttentionMaskInterface.register(self.name, sdpa_mask)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Noted, (self.backend,)

    def __call__(self, layer: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
        of_all = getattr(layer.config, "output_attentions", False)
        setattr(layer, MAPS, bool(options.get("output_attentions", of_all)))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    # as transformers calls it: (B, H, S, Dh) in, (B, S, H, Dh) out
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if getattr(module, MAPS, False):
        return _with_maps(query, key, value, attention_mask, scaling, dropout, causal)
    if attention_mask is not None or dropout > 0.0:
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=causal and attention_mask is None,
        )
    else:
        attended = attention(query, key, value, causal=causal, scale=scaling, backend=backend)
    return attended.transpose(1, 2).contiguous(), None


def _with_maps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The attention as transformers' eager code computes it, and its maps (B, H, S, T)."""
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None and causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        # the smallest number, as there: a query that sees nothing attends to all alike
        smallest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, smallest) if mask.dtype == torch.bool else logits + mask
    maps = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    maps = nn.functional.dropout(maps, dropout)
    return (maps @ value).transpose(1, 2).contiguous(), maps


def _with_loss(
    original: Any,
    of_features: Callable[..., Tensor],
    logits: bool,
    loss_options: dict[str, Any],
) -> Callable[..., Any]:
    """The forward of a model whose class was `original`."""
    class_of_outputs = _output_class(original)
    names = list(inspect.signature(original.forward).parameters)[1:]
    of_images, of_texts = (
        set(names) & set(inspect.signature(features).parameters)
        for features in (original.get_image_features, original.get_text_features)
    )

    @wraps(original.forward)
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        options |= dict(zip(names, arguments, strict=False))
        if not options.pop("return_loss", False):
            return original_forward(self, **options)
        seen, read = (
            {name: options[name] for name in side if name in options}
            for side in (of_images - {"kwargs"}, of_texts - {"kwargs"})
        )
        shared = {k: v for k, v in options.items() if k not in seen and k not in read}
        as_dict = shared.pop("return_dict", None)
        as_dict = self.config.return_dict if as_dict is None else as_dict
        vision = self.get_image_features(**seen, **shared)
        text = self.get_text_features(**read, **shared)
        images, texts = vision.pooler_output, text.pooler_output
        images, texts = (nn.functional.normalize(f, dim=-1) for f in (images, texts))
        scale, bias = self.logit_scale.exp(), getattr(self, "logit_bias", None)
        per_text = None
        if logits:
            per_text = texts @ images.T * scale + (0.0 if bias is None else bias)
        outputs = class_of_outputs(
            loss=of_features(images, texts, scale, bias, **loss_options),
            logits_per_image=None if per_text is None else per_text.T,
            logits_per_text=per_text,
            text_embeds=texts,
            image_embeds=images,
            text_model_output=text,
            vision_model_output=vision,
        )
        return outputs if as_dict else outputs.to_tuple()

    return forward


def _output_class(model: type[nn.Module]) -> Any:
    """What a model's forward returns, beside it in its module."""
    module = sys.modules[model.__module__]
    return getattr(module, f"{model.__name__.removesuffix('Model')}Output")


def _clip(images: Tensor, texts: Tensor, scale: Tensor, bias: Any, **options: Any) -> Tensor:
    return clip_loss(images, texts, scale, **options)


def _siglip(images: Tensor, texts: Tensor, scale: Tensor, bias: Any, **options: Any) -> Tensor:
    return siglip_loss(images, texts, scale, bias, **options)


def _loss_backend(backend: str) -> str:
    # attention has implementations of its own
    return "auto" if backend in ("sdpa", "flash") else backend
