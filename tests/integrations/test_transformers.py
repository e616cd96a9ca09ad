"""Hugging Face's CLIP and SigLIP with fastclip's loss."""

import contextlib
import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastclip
from fastclip.ops.gemm import count_products
from tests.integrations.towers import transformers_case

KINDS = ["clip", "siglip"]


def inputs(batch: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(1, 100, (batch, 12), generator=generator),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str) -> None:
    model = transformers_case(kind).model
    given = inputs()
    want = model(**given, return_loss=True)
    want.loss.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with fastclip.patch_transformers(model), count_products() as count:
        got = model(**given, return_loss=True)
        got.loss.backward()
    assert got.logits_per_image is None and got.logits_per_text is None
    assert count.products_of(5, 5, got.image_embeds.shape[1]) == 3
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.text_embeds, want.text_embeds, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_on_request_and_without_a_loss(kind: str) -> None:
    model = transformers_case(kind).model
    given = inputs()
    want = model(**given, return_loss=True)
    with fastclip.patch_transformers(model, logits=True):
        got = model(**given, return_loss=True)
        torch.testing.assert_close(got.logits_per_image, want.logits_per_image)
        torch.testing.assert_close(got.logits_per_text, want.logits_per_text)
    with fastclip.patch_transformers(model):
        got = model(**given)
        assert got.loss is None
        torch.testing.assert_close(got.logits_per_image, want.logits_per_image)
        as_tuple = model(**given, return_loss=True, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple[0], want.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_signature_stays_and_undo_restores(kind: str) -> None:
    """The trainer of transformers drops columns that forward does not name."""
    model = transformers_case(kind).model
    signature = inspect.signature(model.forward)
    implementation, original = model.config._attn_implementation, type(model)
    handle = fastclip.patch_transformers(model)
    assert inspect.signature(model.forward) == signature
    assert type(model).__name__ == original.__name__ and isinstance(model, original)
    inside = fastclip.patch_transformers(model)
    inside.undo()
    with count_products() as count:
        model(**inputs(), return_loss=True)
    assert count.calls > 0
    handle.undo()
    assert type(model) is original
    assert model.config._attn_implementation == implementation
    assert model.text_model.config._attn_implementation == implementation
    with count_products() as count:
        model(**inputs(), return_loss=True)
    assert count.calls == 0


def test_a_copy_and_a_saved_model_are_whole(tmp_path) -> None:
    import transformers

    model = transformers_case("clip").model
    with fastclip.patch_transformers(model):
        again = copy.deepcopy(model)
        assert torch.equal(again(**inputs()).text_embeds, model(**inputs()).text_embeds)
        model.save_pretrained(tmp_path)
    loaded = transformers.CLIPModel.from_pretrained(tmp_path)
    assert type(loaded) is transformers.CLIPModel
    torch.testing.assert_close(loaded(**inputs()).text_embeds, model(**inputs()).text_embeds)


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def by_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [by_pickle, by_file, copy.deepcopy])
def test_a_patched_model_is_saved_whole(copied: Callable[[Any], Any], kind: str) -> None:
    """With its handle, which takes the copy's patch back and leaves the model's."""
    model = transformers_case(kind).model
    original, implementation = type(model), model.config._attn_implementation
    want = model(**inputs(), return_loss=True)
    handle = fastclip.patch_transformers(model)
    here = model(**inputs(), return_loss=True)
    other, others_handle = copied((model, handle))
    again = copied(other)
    for one in (other, again):
        assert isinstance(one, original) and type(one) is not original
        got = one(**inputs(), return_loss=True)
        assert got.logits_per_image is None and torch.equal(got.loss, here.loss)
    others_handle.undo()
    assert type(other) is original
    assert other.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert torch.equal(other(**inputs(), return_loss=True).logits_per_image, want.logits_per_image)
    for one in (model, again):
        assert one(**inputs(), return_loss=True).logits_per_image is None
        assert one.config._attn_implementation == "fastclip"


def losses_there(_: int, models: list[Any], folder: str) -> None:
    """In a process that has patched nothing."""
    outputs = [model(**inputs(), return_loss=True) for model in models]
    torch.save([(o.loss, o.text_embeds) for o in outputs], f"{folder}/found.pt")


def test_a_patched_model_goes_to_another_process(tmp_path: Path) -> None:
    """With loss and attention, and with either alone."""
    models = [transformers_case(kind).model.requires_grad_(False) for kind in ("clip", "siglip")]
    models.append(transformers_case("clip").model.requires_grad_(False))
    fastclip.patch_transformers(models[0])
    fastclip.patch_transformers(models[1], attention=False)
    fastclip.patch_transformers(models[2], loss=False, backend="reference")
    torch.multiprocessing.spawn(losses_there, (models, str(tmp_path)))
    for model, (loss, texts) in zip(models, torch.load(tmp_path / "found.pt"), strict=True):
        want = model(**inputs(), return_loss=True)
        torch.testing.assert_close(loss, want.loss)
        torch.testing.assert_close(texts, want.text_embeds)


def small(kind: str) -> Any:
    """A model of one layer a tower, by the name of its family."""
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    text = {**tower, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config={**tower, "image_size": 16, "num_patches": 16, "patch_size": 4},
    )
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.parametrize("kind", ["Siglip2", "MetaClip2"])
def test_families_beside_clip_and_siglip_are_exchanged_whole(kind: str) -> None:
    """Loss, gradients, embeddings and attention maps; by position as by name."""
    generator = torch.Generator().manual_seed(3)
    model = small(kind)
    model.set_attn_implementation("eager")
    texts = torch.randint(1, 98, (3, 8), generator=generator)
    texts[:, -1] = 98
    given: dict[str, Any] = {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    if kind == "Siglip2":
        given = {
            "pixel_values": torch.randn(3, 16, 48, generator=generator),
            "pixel_attention_mask": torch.ones(3, 16, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4], [4, 2]]),
        }
        given["pixel_attention_mask"][2, 8:] = 0
    options = {"return_loss": True, "output_attentions": True}
    found = []
    for handle in (contextlib.nullcontext(), fastclip.patch_transformers(model)):
        model.zero_grad()
        with handle, count_products() as count:
            output = model(texts, **given, **options)
            output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((output, gradients))
    (want, theirs), (got, ours) = found
    assert count.calls > 0 and got.logits_per_image is None and type(got) is type(want)
    for name in ("loss", "text_embeds", "image_embeds"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
    for part in ("text_model_output", "vision_model_output"):
        pairs = zip(getattr(got, part).attentions, getattr(want, part).attentions, strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_dual_encoder_around_a_clip_tower_is_refused() -> None:
    """Its loss would stay what it was."""
    import transformers

    clip = transformers_case("clip").model
    bert = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.VisionTextDualEncoderModel(
        vision_model=clip.vision_model,
        text_model=transformers.BertModel(bert),
    )
    with pytest.raises(ValueError, match="loss of VisionTextDualEncoderModel cannot be replaced"):
        fastclip.patch_transformers(model)


def test_options_of_processes_are_checked() -> None:
    model = transformers_case("clip").model
    with pytest.raises(ValueError, match="leave out dist, or the logits"):
        fastclip.patch_transformers(model, dist="gather", logits=True)
    with pytest.raises(ValueError, match="dist is 'all'"):
        fastclip.patch_transformers(model, dist="all")
    with (
        fastclip.patch_transformers(model, dist="gather"),
        pytest.raises(ValueError, match="init_process_group first"),
    ):
        model(**inputs(), return_loss=True)


@pytest.mark.parametrize("kind", ["CLIPSeg"])
def test_a_loss_that_would_stay_is_refused(kind: str) -> None:
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    config = getattr(transformers, f"{kind}Config")(
        text_config={**tower, "vocab_size": 99, "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 16, "num_patches": 16, "patch_size": 4},
    )
    model = getattr(transformers, f"{kind}Model")(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="loss=False replaces its attention alone"):
        fastclip.patch_transformers(model)
    assert model.config._attn_implementation == before
    with fastclip.patch_transformers(model, loss=False):
        assert model.config._attn_implementation == "fastclip"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("return_loss", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_maps_are_those_of_the_model(kind: str, return_loss: bool, padded: bool) -> None:
    model = transformers_case(kind).model.eval()
    model.set_attn_implementation("eager")
    given = inputs()
    if padded:
        mask = torch.ones_like(given["input_ids"])
        mask[1, 7:] = 0
        given["attention_mask"] = mask
    options = {"return_loss": return_loss, "output_attentions": True}
    want = model(**given, **options)
    with fastclip.patch_transformers(model):
        got = model(**given, **options)
        # of this call alone
        without = model(**given, return_loss=return_loss)
    assert not without.text_model_output.attentions
    for part in ("text_model_output", "vision_model_output"):
        mine, theirs = (getattr(output, part).attentions for output in (got, want))
        assert len(mine) == len(theirs) == 2
        for ours, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.text_embeds, want.text_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.image_embeds, want.image_embeds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_asked_for_in_the_configuration(kind: str) -> None:
    """Of a tower alone; the maps of a text tower hide what comes later."""
    model = transformers_case(kind).model.eval()
    model.set_attn_implementation("eager")
    tower = model.text_model
    tower.config.output_attentions = True
    texts = inputs()["input_ids"]
    want = tower(texts).attentions
    with fastclip.patch_transformers(model):
        got = tower(texts).attentions
    assert len(got) == len(want) == 2
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        if kind == "clip":
            assert (ours.triu(1) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_with_dropout(kind: str) -> None:
    """In training the maps are the dropped ones, as eager code returns them."""
    model = transformers_case(kind).model.train()
    model.set_attn_implementation("eager")
    layers = [m for m in model.modules() if hasattr(m, "q_proj")]
    for layer in layers:
        layer.dropout = 0.5
    texts = inputs()["input_ids"]
    maps = []
    for patched in (False, True):
        handle = fastclip.patch_transformers(model) if patched else None
        torch.manual_seed(5)
        maps.append(model.text_model(texts, output_attentions=True).attentions)
        if handle:
            handle.undo()
    for want, got in zip(*maps, strict=True):
        assert (want == 0).any()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_undo_restores_towers_that_differ() -> None:
    model = transformers_case("clip").model
    configs = model.config, model.text_model.config, model.vision_model.config
    configs[1]._attn_implementation, configs[2]._attn_implementation = "eager", "sdpa"
    before = [config._attn_implementation for config in configs]
    assert before[1:] == ["eager", "sdpa"]
    with fastclip.patch_transformers(model):
        assert {config._attn_implementation for config in configs} == {"fastclip"}
    assert [config._attn_implementation for config in configs] == before


def test_other_options_of_a_second_patch_are_refused() -> None:
    """They would be lost: negatives of one process, say, where those of all are asked for."""
    model = transformers_case("clip").model
    with fastclip.patch_transformers(model):
        fastclip.patch_transformers(model).undo()
        with pytest.raises(ValueError, match="CLIPModel was patched before with other options"):
            fastclip.patch_transformers(model, dist="gather")
    with fastclip.patch_transformers(model, dist="gather"):
        pass


def test_a_model_that_accelerate_has_prepared_is_refused() -> None:
    """Its own forward would hide the patched one."""
    model = transformers_case("clip").model
    model.forward = model.forward
    with pytest.raises(ValueError, match="has a forward of its own, as accelerate gives one"):
        fastclip.patch_transformers(model)


def test_a_forward_that_accelerate_kept_runs_after_the_patch_is_undone() -> None:
    model = transformers_case("clip").model
    given = inputs()
    want = model(**given).logits_per_image
    handle = fastclip.patch_transformers(model)
    model.forward = model.forward
    handle.undo()
    torch.testing.assert_close(model(**given).logits_per_image, want)
