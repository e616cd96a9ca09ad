"""Models of open_clip with a language model as text tower."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastclip.models.clip import CONFIG_FILE, Model, create
from fastclip.models.language_model import with_language_model
from fastclip.models.options import SystemOptions
from tests.models.language import make_language_model
from tests.train.conftest import TINY_MODEL


@pytest.fixture(params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """An open_clip model of each class: 16 pixels, features of 16."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**TINY_MODEL, "custom_text": request.param}))
    return create(str(path), siglip=True)


def test_in_a_model_of_open_clip(tiny: Model, tmp_path: Path) -> None:
    name = make_language_model(tmp_path / "lm", "gpt2")
    options = SystemOptions(text_lm=name, text_lm_unfrozen=2, context_length=10)
    model, preprocess, tokenizer = with_language_model(tiny, options)
    assert preprocess is tiny.preprocess
    images, tokens = torch.randn(2, 3, 16, 16), tokenizer(["a red cube", "two green cones"])
    output = model(images, tokens)
    expected = nn.functional.normalize(tiny.model.encode_image(images), dim=-1)
    torch.testing.assert_close(output["image_features"], expected)
    assert output["text_features"].shape == (2, 16)
    assert output["logit_bias"] is model.logit_bias
    own = {n: v for n, v in tiny.model.state_dict().items() if n.startswith("visual.")}
    state = model.state_dict()
    assert own.keys() | {"logit_scale", "logit_bias"} == {
        name for name in state if not name.startswith("text.")
    }
    model.set_grad_checkpointing()
    model.lock_image_tower()
    assert not any(p.requires_grad for p in model.visual.parameters())


def test_is_rebuilt_without_the_language_model(tiny: Model, tmp_path: Path) -> None:
    name = make_language_model(tmp_path / "lm", "bert")
    options = SystemOptions(text_lm=name, text_lm_unfrozen=2, text_lm_pooling="last")
    built = with_language_model(copy.deepcopy(tiny), options)
    run = tmp_path / "run"
    run.mkdir()
    built.tokenizer.save_pretrained(run)
    config = json.loads(json.dumps(built.model.text.config_dict()))
    assert str(tmp_path) not in json.dumps(config)
    described = {"fastclip_cfg": {"language_model": config}}
    (run / CONFIG_FILE).write_text(json.dumps(described))
    (tmp_path / "lm").rename(tmp_path / "elsewhere")
    again = with_language_model(tiny, options, described=run)
    again.model.load_state_dict(built.model.state_dict())
    texts = ["a red cube", "unseen words"]
    assert torch.equal(again.tokenizer(texts), built.tokenizer(texts))
    features = [m.model.eval().encode_text(m.tokenizer(texts)) for m in (built, again)]
    assert torch.equal(*features)


def test_refuses_other_models(tiny: Model, tmp_path: Path) -> None:
    name = make_language_model(tmp_path / "lm", "gpt2")
    with pytest.raises(ValueError, match="not of a Linear"):
        with_language_model(tiny._replace(model=nn.Linear(1, 1)), SystemOptions(text_lm=name))
    with pytest.raises(ValueError, match=r"is 25; .* takes 1 to 24"):
        options = SystemOptions(text_lm=name, text_lm_unfrozen=1, context_length=25)
        with_language_model(tiny, options)
