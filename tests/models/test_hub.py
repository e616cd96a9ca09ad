"""Runs as folders of the Hub: what open_clip and fastclip make of them, and what is refused."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import fastclip
from fastclip.cli import main
from fastclip.models import checkpoint, hub, sharded
from fastclip.models.build import build, describe
from fastclip.models.clip import CONFIG_FILE, Model, read_description
from fastclip.models.hub import export_hub
from fastclip.models.options import SystemOptions
from fastclip.models.weights import write_safetensors
from fastclip.train.card import model_card
from tests.models.language import make_language_model
from tests.train.conftest import TINY_MODEL
from tests.train.test_checkpoint import Malicious

SHIPPED = sorted(path.stem for path in Path(hub.__file__).with_name("configs").glob("*.json"))
# with few parameters
SMALL = ("RN10t-64", "TinyNet-E-align", "EfficientViT-B0-basic", "ViT-mini-16px")
WORDS = "[PAD] [UNK] [CLS] [SEP] a photo of dog many words".split()
TEXTS = ["a photo of a dog", "many words", "cat"]
RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": TINY_MODEL["text_cfg"],
}


def make_encoder(folder: Path, kind: str = "bert", pad: str | None = "[PAD]") -> str:
    """A language model of two layers that attends in both directions, with a tokenizer."""
    tokenizer = Tokenizer(
        models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        **({} if pad is None else {"pad_token": pad}),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        pad_token_id=0,
        # so large that what tokens do to each other is far from rounding
        initializer_range=0.4,
    )
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def save_run(run: Path, name: str, model: Model, options: SystemOptions, **content: Any) -> Path:
    """A run directory as training leaves it."""
    (run / "checkpoints").mkdir(parents=True)
    (run / CONFIG_FILE).write_text(json.dumps(describe(name, model, options)))
    if save := getattr(model.tokenizer, "save_pretrained", None):
        save(str(run))
    content = {"step": 8, "epoch": 2, "state_dict": model.model.state_dict(), **content}
    checkpoint.write(run / "checkpoints" / "epoch_2.pt", content)
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run with random weights of a model: a shipped name, or a configuration."""

    def make(
        model: str | dict[str, Any] = TINY_MODEL, siglip: bool = False, **options: Any
    ) -> Path:
        if not isinstance(model, str):
            path = tmp_path / "own.json"
            path.write_text(json.dumps(model))
            model = str(path)
        torch.manual_seed(0)
        chosen = SystemOptions(**options)
        built = build(model, chosen, siglip=siglip)
        for norm in built.model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-0.1, 0.1)
        return save_run(tmp_path / "run", model, built, chosen)

    return make


def features(model: nn.Module, preprocess_size: int, tokens: torch.Tensor) -> list[torch.Tensor]:
    images = torch.randn(3, 3, preprocess_size, preprocess_size, generator=torch.manual_seed(3))
    model.eval()
    with torch.no_grad():
        image = model.encode_image(images, normalize=True)
        return [image, model.encode_text(tokens, normalize=True)]


CASES = {
    "resnet": (RESNET, {}),
    "vit": (TINY_MODEL, {}),
    "siglip": (TINY_MODEL, {"siglip": True}),
    "bert": (TINY_MODEL, {"text_lm": "bert", "text_lm_unfrozen": 1}),
    "roberta": (TINY_MODEL, {"text_lm": "roberta", "text_lm_unfrozen": 2, "context_length": 6}),
}


@pytest.mark.parametrize("case", [*CASES, *SMALL])
def test_open_clip_and_load_give_the_features_of_the_run(
    case: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    config, options = CASES.get(case, (case, {}))
    if "text_lm" in options:
        options = {**options, "text_lm": make_encoder(tmp_path / "lm", options["text_lm"])}
    run, folder = make_run(config, **options), tmp_path / "hub"
    assert main(["convert", "to-hub", str(run), str(folder)]) == 0
    ours, transform, tokenizer = fastclip.load(run)
    size = transform.transforms[1].size[0]
    wanted = features(ours, size, tokenizer(TEXTS))

    theirs, _, their_transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert repr(their_transform.transforms) == repr(transform.transforms)
    for found, expected in zip(features(theirs, size, tokens), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert theirs.logit_scale.item() == ours.logit_scale.item()
    assert (theirs.logit_bias is None) == (ours.logit_bias is None)

    for given in (folder, folder / checkpoint.HUB_WEIGHTS):
        again, again_transform, again_tokenizer = fastclip.load(given)
        assert repr(again_transform.transforms) == repr(transform.transforms)
        found = features(again, size, again_tokenizer(TEXTS))
        for value, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - set(SMALL)))
def test_open_clip_builds_the_large_shipped_towers(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        ours = build(name, SystemOptions(), "meta")
        (tmp_path / CONFIG_FILE).write_text(json.dumps(describe(name, ours, SystemOptions())))
        theirs = open_clip.create_model(f"local-dir:{tmp_path}", device="meta").state_dict()
    wanted = ours.model.state_dict()
    assert {n: v.shape for n, v in theirs.items()} == {n: v.shape for n, v in wanted.items()}


@pytest.mark.parametrize("repository", [None, "me/model"])
def test_a_language_model_is_found_in_the_folder_or_where_it_is_published(
    repository: str | None, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(text_lm=make_encoder(tmp_path / "lm"), text_lm_unfrozen=1)
    export_hub(run, tmp_path / "hub", repository=repository)
    text = read_description(tmp_path / "hub")["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == (repository or str(tmp_path / "hub"))
    # a moved one is still whole for fastclip, which looks beside the description
    moved = (tmp_path / "hub").rename(tmp_path / "moved")
    assert fastclip.load(moved).tokenizer(TEXTS).shape == (3, 24)


def test_the_average_and_what_holds_it(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    weights = fastclip.load(run).model.state_dict()
    average = {name: value + 1 for name, value in weights.items()}
    path = run / "checkpoints" / "epoch_2.pt"
    checkpoint.write(path, {"step": 8, "state_dict": weights, checkpoint.AVERAGE: average})
    for kind, target in (("to-hub", "hub"), ("to-open-clip", "o.safetensors")):
        assert main(["convert", kind, str(run), str(tmp_path / target), "--average"]) == 0
    for file in (tmp_path / "hub" / checkpoint.HUB_WEIGHTS, tmp_path / "o.safetensors"):
        found = load_file(file)
        assert found.keys() == average.keys()
        assert all(torch.equal(found[name], average[name]) for name in average)


def test_commands_take_the_folder_and_write_beside(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_hub(make_run(), tmp_path / "hub")
    before = sorted(path.name for path in (tmp_path / "hub").iterdir())
    monkeypatch.chdir(tmp_path)
    few = ["--num-samples", "20", "--workers", "0"]
    assert main(["eval", "zeroshot", "--model", "hub", *few]) == 0
    written = json.loads((tmp_path / "eval" / "hub" / "zeroshot_scenes.json").read_text())
    assert (written["model"], written["pretrained"]) == ("hub", "")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == before


CARD = """\
| architecture | tiny.json |
| image size | 16 |
| tokens of a text | 12 |
| data | a\\|b.csv |
| loss | siglip |
| step | 8 |
| val/loss | 1.5 |
| zeroshot/pets/acc1 | 0.25 |
| weights | apache-2.0 |
| training data | unknown |
| learning rate | unknown |"""


def test_the_card_says_what_the_run_knows(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    settings = "data:\n  train_data: a|b.csv\nmodel: {model: tiny.json}\nloss: {siglip: true}\n"
    (run / "config.yaml").write_text(settings)
    lines = [
        {"step": 4, "val/loss": 2.0, "val/recall": 0.5},
        {"step": 8, "loss": 9.0, "val/loss": 1.5, "val/loss_ema": 1.25},
        {"step": 8, "zeroshot/pets/acc1": 0.25},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"dataset": "own", "model": "m", "task": "retrieval", "metrics": {"acc": 0.75}}
    saved = (run / "checkpoints" / "epoch_2.pt").stat().st_mtime
    (run / "eval").mkdir()
    for name, pretrained, later in (("new", run, 9), ("old", run, -9), ("other", tmp_path, 9)):
        file = run / "eval" / f"{name}.json"
        file.write_text(json.dumps({**result, "task": name, "pretrained": str(pretrained)}))
        os.utime(file, (saved + later, saved + later))
    (run / "eval" / "notes.json").write_text("[]")
    command = ["convert", "to-hub", str(run), str(tmp_path / "hub"), "--license", "apache-2.0"]
    assert main(command) == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert set(CARD.splitlines()) <= set(text.splitlines())
    assert "| new on own: acc | 0.75 |" in text
    for absent in ("0.5 |", "9 |", "1.25", "old on", "other on"):
        assert absent not in text
    # the example is what a reader copies
    example = text.split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    exec(example, found)
    assert found["tokenizer"](["x"]).shape == (1, 12)
    assert "val/loss_ema" in model_card(run, tmp_path / "x", average=True)


@pytest.mark.parametrize("license", ["a: b", "no", "two\nlines"])
def test_any_license_is_a_text(license: str, make_run: Callable[..., Path], tmp_path: Path) -> None:
    card = model_card(make_run(), tmp_path / "hub", license=license)
    assert yaml.safe_load(card.split("---\n")[1])["license"] == license
    assert "None are known." in card


REFUSED = {
    "rocket": ({"objective": "rocket", "head_hidden": 8}, "criterion.heads, .*to-onnx"),
    "slip": ({"objective": "slip", "projector_hidden": 8}, "criterion.projector, .*to-onnx"),
    "simclr": ({"objective": "simclr", "projector_hidden": 8}, "no text tower.*to-onnx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_open_clip_has_not(
    case: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export_hub(make_run(**options), tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.json", "run"]


LANGUAGE = {
    "causal": (lambda folder: make_language_model(folder, "gpt2"), {}, "is a gpt2"),
    "last": (make_encoder, {"text_lm_pooling": "last"}, "pooling is last"),
    "no padding": (lambda folder: make_encoder(folder, pad=None), {}, "pads with None"),
    "padding that is a word": (lambda folder: make_encoder(folder, pad="dog"), {}, "pads with 7"),
}


@pytest.mark.parametrize("case", LANGUAGE)
def test_language_models_that_open_clip_has_not(
    case: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    make, options, message = LANGUAGE[case]
    run = make_run(text_lm=make(tmp_path / "lm"), text_lm_unfrozen=1, **options)
    with pytest.raises(ValueError, match=f"{message}.*to-onnx"):
        export_hub(run, tmp_path / "hub")


def test_what_is_there_stays(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = make_run(), tmp_path / "hub"
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(hub, "write_safetensors", full)
        with pytest.raises(OSError, match="No space left"):
            export_hub(run, folder)
    with monkeypatch.context() as changed:
        changed.setattr(hub, "_check", full)
        with pytest.raises(OSError, match="No space left"):
            export_hub(run, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    folder.mkdir()
    export_hub(run, folder)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    for taken in (folder, run / CONFIG_FILE):
        with pytest.raises(FileExistsError, match="not an empty folder; choose another"):
            export_hub(run, taken)
    assert content == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_weights_are_found_before_anything_appears(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: Any, weights: dict[str, torch.Tensor]) -> None:
        write_safetensors(file, {name: value * 2 for name, value in weights.items()})

    monkeypatch.setattr(hub, "write_safetensors", write)
    with pytest.raises(ValueError, match=r"open_clip's encode_image .* other features"):
        export_hub(make_run(), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_folder_of_deepspeed_is_not_read_untrusted(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    folder = run / "checkpoints" / "epoch_3"
    folder.mkdir()
    torch.save({"step": 12, "epoch": 3}, folder / sharded.TRAINING)
    assert main(["convert", "to-hub", str(folder), str(tmp_path / "hub")]) == 1
    assert "--trust-checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_a_repository_has_a_name(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give ORG/NAME"):
        export_hub(make_run(), tmp_path / "hub", repository="a/b/c")


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    weights = {"a": whole, "b": whole, "column": whole[:, 1], "row": whole[1], "n": torch.tensor(3)}
    with (tmp_path / "w.safetensors").open("wb") as file:
        write_safetensors(file, weights)
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_pickle_under_the_name_of_safetensors(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    export_hub(make_run(), tmp_path / "hub")
    file = tmp_path / "hub" / checkpoint.HUB_WEIGHTS
    torch.save({"state_dict": Malicious(tmp_path / "ran")}, file)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        fastclip.load(tmp_path / "hub")
    assert not (tmp_path / "ran").exists()


def test_a_language_model_beside_the_description_names_no_code(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    export_hub(
        make_run(text_lm=make_encoder(tmp_path / "lm"), text_lm_unfrozen=1), tmp_path / "hub"
    )
    file = tmp_path / "hub" / "config.json"
    plain = json.loads(file.read_text())
    for added in ({"auto_map": {}}, {"parts": [{"attn_implementation": "a/b"}]}):
        file.write_text(json.dumps({**plain, **added}))
        with pytest.raises(ValueError, match=r"config.json has \w+, which may name code"):
            fastclip.load(tmp_path / "hub")
