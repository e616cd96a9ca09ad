"""Small models of the three libraries, random weights, nothing downloaded; and how to run them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.integrations.patch import PatchHandle
from fastclip.ops.gemm import count_products

Outputs = Callable[[nn.Module], Tensor]


@dataclass
class Case:
    """A model, how to patch it, and features of fixed inputs, (N, 2 D) or (N, D)."""

    model: nn.Module
    patch: Callable[..., PatchHandle]
    outputs: Outputs


def as_in(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the dtype of the model's weights."""
    return images.to(next(model.parameters()).dtype)


def open_clip_case(name: str | None = None, batch: int = 3) -> Case:
    import open_clip

    import fastclip

    torch.manual_seed(0)
    if name is None:
        model: Any = open_clip.model.CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 32}
            | {"patch_size": 8},
            text_cfg={
                "context_length": 12,
                "vocab_size": 100,
                "width": 64,
                "heads": 2,
                "layers": 2,
            },
        )
        size, length = 32, 12
    else:
        model = open_clip.create_model(name, pretrained=None)
        size, length = 224, 77
    images = torch.randn(batch, 3, size, size)
    texts = torch.randint(1, 100, (batch, length))

    def outputs(model: Any) -> Tensor:
        return torch.cat([model.encode_image(as_in(model, images)), model.encode_text(texts)], 1)

    return Case(model, lambda m, **o: fastclip.patch_open_clip(m, loss=False, **o), outputs)


def timm_case(batch: int = 3) -> Case:
    from timm.models.vision_transformer import VisionTransformer

    import fastclip

    torch.manual_seed(1)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**shape, num_classes=16)
    images = torch.randn(batch, 3, 32, 32)
    return Case(model, fastclip.patch_timm, lambda model: model(as_in(model, images)))


def transformers_case(kind: str, batch: int = 3, **options: bool) -> Case:
    import transformers

    import fastclip

    torch.manual_seed(2)
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = {**tower, "vocab_size": 100, "max_position_embeddings": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 99, "pad_token_id": 1}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    model: Any
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text, vision_config=vision)
        )
    images, texts = torch.randn(batch, 3, 32, 32), torch.randint(1, 100, (batch, 12))

    def outputs(model: Any) -> Tensor:
        found = model(pixel_values=as_in(model, images), input_ids=texts)
        return torch.cat([found.image_embeds, found.text_embeds], dim=1)

    return Case(model, lambda m, **o: fastclip.patch_transformers(m, **options, **o), outputs)


CASES: dict[str, Callable[[], Case]] = {
    "open_clip": open_clip_case,
    "timm": timm_case,
    "transformers clip": lambda: transformers_case("clip"),
    "transformers siglip": lambda: transformers_case("siglip"),
}


def gradients(model: nn.Module, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Features, and the gradients of a fixed function of them by parameter."""
    model.zero_grad()
    found = outputs(model)
    weight = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weight.to(found.dtype)).sum().backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.detach(), named


def products_of(run: Callable[[], Any]) -> int:
    """Matrix products that went through fastclip's operators."""
    with count_products() as count:
        run()
    return count.calls
