"""Descriptions shape a model, and never make a library run code that comes with them."""

import copy
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import pytest

from fastclip.models import description
from fastclip.models.build import load
from fastclip.models.clip import build_described, create
from fastclip.models.language_model import LanguageModelTower
from fastclip.models.open import open_model

TINY: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 8,
        "head_width": 8,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 49408,
        "width": 8,
        "heads": 1,
        "layers": 1,
        "hf_tokenizer_name": "x",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
}


def as_json(folder: Path) -> None:
    (folder / "tiny.json").write_text(json.dumps(TINY))
    create(str(folder / "tiny.json"))


@pytest.mark.parametrize(
    "reader", [load, lambda folder: open_model(f"local-dir:{folder}"), as_json]
)
def test_no_description_makes_a_tokenizer_run_code(
    tmp_path: Path, reader: Callable[[Path], Any]
) -> None:
    from fastclip.models import checkpoint

    (tmp_path / "checkpoints").mkdir()
    checkpoint.write(tmp_path / "checkpoints" / "epoch_1.pt", {"step": 1, "state_dict": {}})
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    marker = tmp_path / "ran"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"text_cfg\.tokenizer_kwargs\.trust_remote_code"):
        reader(tmp_path)
    assert not marker.exists()


def test_a_hub_description_is_checked_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import open_clip

    (tmp_path / "c.json").write_text(json.dumps({"model_cfg": TINY}))
    download = lambda *arguments: str(tmp_path / "c.json")  # noqa: E731
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
    with pytest.raises(ValueError, match=r"hf-hub:a/b has .*trust_remote_code"):
        open_model("hf-hub:a/b")


@pytest.mark.parametrize("part", ["tokenizer", "tower"])
def test_code_beside_a_named_tokenizer_or_tower_is_refused_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    pytest.importorskip("transformers")
    marker = tmp_path / "ran"
    named = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": named})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": named}))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = copy.deepcopy(TINY)
    del config["text_cfg"]["tokenizer_kwargs"]
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path)
    if part == "tower":
        config["text_cfg"]["hf_model_name"] = str(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    # a user at the terminal who says yes to everything
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(ValueError, match="custom code"):
        create(str(tmp_path / "tiny.json"))
    assert not asked and not marker.exists()


@pytest.mark.parametrize("reader", ["run", "local-dir", "file"])
def test_what_is_built_is_what_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """Someone exchanges the description after the check."""
    import torch

    from fastclip.models import checkpoint

    config = copy.deepcopy(TINY)
    del config["text_cfg"]["tokenizer_kwargs"], config["text_cfg"]["hf_tokenizer_name"]
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    weights = create(str(tmp_path / "tiny.json")).model.state_dict()
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "epoch_1.pt"
    checkpoint.write(path, {"step": 1, "state_dict": weights})
    torch.save(weights, tmp_path / "model.bin")
    described = tmp_path / "open_clip_config.json"
    described.write_text(json.dumps({"model_cfg": config}))
    file = tmp_path / "tiny.json" if reader == "file" else described
    check = description.check

    def then_exchanged(*arguments: Any) -> Any:
        result = check(*arguments)
        file.write_text(json.dumps(TINY if reader == "file" else {"model_cfg": TINY}))
        return result

    monkeypatch.setattr(description, "check", then_exchanged)
    if reader == "file":
        built = create(str(file))
    else:
        # a run reads its description twice, once for the system
        monkeypatch.setattr("fastclip.models.build.system_of", lambda run: {})
        built = load(tmp_path) if reader == "run" else open_model(f"local-dir:{tmp_path}")
    assert built.tokenizer(["x"]).shape == (1, TINY["text_cfg"]["context_length"])


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "cache_dir", "x"),
        ("vision_cfg", "trust_remote_code", True),
        ("vision_cfg", "norm_kwargs", {"device": "x"}),
        ("text_cfg", "width", {"a": 1}),
    ],
)
def test_unknown_keys_and_forms_are_refused(part: str | None, key: str, value: Any) -> None:
    config = copy.deepcopy(TINY)
    del config["text_cfg"]["tokenizer_kwargs"]
    description.check(config, "f")
    (config[part] if part else config)[key] = value
    with pytest.raises(ValueError, match=f"f.*{key}"):
        description.check(config, "f")


def test_all_models_of_open_clip_and_those_shipped_pass() -> None:
    import open_clip

    from fastclip.models.clip import _CONFIGS

    open_clip.add_model_config(_CONFIGS)
    for name in open_clip.list_models():
        description.check(open_clip.get_model_config(name), name)


def test_a_language_models_config_names_no_code() -> None:
    pytest.importorskip("transformers")
    made = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 1, "vocab_size": 16}
    evil = {"attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "evil.Evil"}}
    tower = LanguageModelTower.from_config({**made, **evil}, 4, unfrozen_layers=1)
    config = tower.language_model.model.config
    assert not hasattr(config, "auto_map")
    assert config._attn_implementation in ("sdpa", "eager")


def test_threads_build_their_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the process is between them; a study evaluates in threads."""
    build = open_clip.create_model

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return build(*arguments, **options)

    monkeypatch.setattr(open_clip, "create_model", slowly)
    folders: list[Path] = []
    for width in (8, 16):
        config = copy.deepcopy(TINY) | {"embed_dim": width}
        del config["text_cfg"]["tokenizer_kwargs"], config["text_cfg"]["hf_tokenizer_name"]
        folders.append(tmp_path / str(width))
        folders[-1].mkdir()
        (folders[-1] / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    before = logging.root.manager.disable
    with ThreadPoolExecutor(2) as threads:
        built = list(threads.map(lambda folder: build_described(folder, "cpu").model, folders))
    assert [model.text_projection.shape[-1] for model in built] == [8, 16]
    assert logging.root.manager.disable == before
