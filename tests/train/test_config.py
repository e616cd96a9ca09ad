"""Configuration: recipes, files, flags, and what is said of mistakes."""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from fastclip.cli import main
from fastclip.command_line import help_texts
from fastclip.flags import defining, flatten, ordered, sections
from fastclip.train.config import HEADINGS, RECIPES, TrainConfig, parse, to_yaml


def test_flags_are_open_clips() -> None:
    flags = (
        "--train-data /d/{0..1}.tar --batch-size 64 --lr 1e-3 --wd 0.1 --epochs 3 --warmup 10 "
        "--precision amp_bf16 --workers 0 --beta2 0.95 --grad-clip-norm 1 --seed 5 "
        "--lr-scheduler const --save-frequency 2 --name x --logs l --resume latest"
    )
    config = parse(flags.split())
    optim = config.optim
    assert (optim.batch_size, optim.lr, optim.beta2, optim.seed) == (64, 1e-3, 0.95, 5)
    assert (config.checkpoint.resume, optim.grad_clip_norm) == ("latest", 1.0)
    assert (config.data.workers, config.log.name) == (0, "x")


def test_a_file_and_flags_that_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    # 1e-3 without a dot is text to YAML 1.1, and still a number here; dashes are welcome
    path.write_text("lr: 1e-3\nbatch-size: 32\naug_scale: [0.5, 1]\ntorchcompile: true\n")
    config = parse(["--config", str(path), "--batch-size", "16"])
    assert (config.optim.lr, config.optim.batch_size) == (1e-3, 16)
    assert config.data.aug_scale == (0.5, 1.0)
    assert config.model.torchcompile
    assert not parse([f"--config={path}", "--no-torchcompile"]).model.torchcompile


def test_a_file_extends_another(tmp_path: Path) -> None:
    """Its own lines win over those of the file, and a flag given by hand over all."""
    (tmp_path / "mine").mkdir()
    base, middle, last = (tmp_path / "mine" / name for name in ("a.yaml", "b.yaml", "c.yaml"))
    base.write_text("lr: 1e-3\naug_scale: [0.5, 1]\ntorchcompile: true\noptim:\n  wd: 0.3\n")
    # beside the file, not where the run starts
    middle.write_text("extends: a.yaml\naug_scale: [0.2, 0.9]\ntorchcompile: false\n")
    last.write_text("extends: b.yaml\nmodel:\n  model: ViT-B-32\noptim:\n  lr: 2e-3\n")
    config = parse(["--config", str(last), "--wd", "0.4"])
    assert (config.optim.lr, config.optim.wd, config.model.model) == (2e-3, 0.4, "ViT-B-32")
    assert config.data.aug_scale == (0.2, 0.9) and not config.model.torchcompile
    last.write_text("extends: cifar10\nlr: 3e-3\n")
    recipe = parse(["--config", "cifar10"])
    assert parse(["--config", str(last)]) == replace(recipe, optim=replace(recipe.optim, lr=3e-3))


@pytest.mark.parametrize(
    ("extends", "kind", "message"),
    [
        ("nothing", FileNotFoundError, r"c.yaml extends 'nothing', which is neither .*cifar10"),
        ("[a, b]", FileNotFoundError, r"c.yaml extends \['a', 'b'\], which is neither a file"),
        ("c.yaml", ValueError, "c.yaml extends 'c.yaml', which extends it; delete one `extends`"),
        ("b.yaml", ValueError, "b.yaml extends 'c.yaml', which extends it; delete one `extends`"),
    ],
)
def test_mistakes_in_extending(
    extends: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "b.yaml").write_text("extends: c.yaml\n")
    (tmp_path / "c.yaml").write_text(f"extends: {extends}\nlr: 1e-3\n")
    with pytest.raises(kind, match=message):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    flags = "--lr 3e-4 --train-num-samples 100 --aug-scale 0.3 0.9 --torchcompile"
    config = parse(flags.split())
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config
    written = yaml.safe_load(to_yaml(config))
    assert list(written) == list(sections(TrainConfig))
    assert next(iter(written["data"])) == "train_data"
    for name, section in sections(TrainConfig).items():
        assert list(written[name]) == [field.name for field in ordered(section)]


def test_a_file_may_be_flat_or_have_sections(tmp_path: Path) -> None:
    """Files and checkpoints of before are flat."""
    path = tmp_path / "c.yaml"
    forms = (
        "train_data: synthetic\naug_scale: [0.5, 1]\nmodel: ViT-B-32\nlr: 1e-3\n",
        "data:\n  train-data: synthetic\n  aug_scale: [0.5, 1]\nmodel:\n  model: ViT-B-32\n"
        "optim:\n  lr: 1e-3\nlog:\n",
        "data:\n  train_data: synthetic\naug_scale: [0.5, 1]\nmodel: ViT-B-32\nlr: 1e-3\n",
    )
    made = TrainConfig.from_flat(
        train_data="synthetic", aug_scale=(0.5, 1.0), model="ViT-B-32", lr=1e-3
    )
    for form in forms:
        path.write_text(form)
        assert parse(["--config", str(path)]) == made, form
    assert TrainConfig.from_dict(flatten(made)) == made
    # as JSON and YAML have it
    plain = json.loads(json.dumps(asdict(made)))
    assert TrainConfig.from_dict(plain) == made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim:\n  learning_rate: 1\n", "c.yaml: unknown key 'learning_rate'"),
        ("optim:\n  batchsize: 1\n", "'batchsize'; did you mean 'batch_size'"),
        ("optimizr:\n  lr: 1\n", "unknown key 'optimizr'; did you mean 'optim'"),
        ("data:\n  lr: 1\n", "'lr' is not in section 'data' but in 'optim'"),
        ("data: photos\n", "'data' is a section: give its `key: value` lines below it"),
        ("lr: 1\noptim:\n  lr: 2\n", "key 'lr' is given twice; leave one out"),
    ],
)
def test_mistakes_in_sections(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--config", str(path)])


def test_a_flag_is_in_one_section() -> None:
    names = [field.name for part in sections(TrainConfig).values() for field in fields(part)]
    assert len(names) == len(set(names)) == len(flatten(TrainConfig()))
    assert set(defining(TrainConfig)) < set(names)
    with pytest.raises(ValueError, match="unknown key 'learn_rate'"):
        TrainConfig.from_flat(learn_rate=1.0)


# what a recipe leaves to its user
GIVEN = {
    "classify_text": ["--classes", "names.txt"],
    "semantic_scenes": ["--text-lm", "folder"],
    "semantic_negatives_scenes": ["--text-lm", "folder"],
}


@functools.cache
def config_of(recipe: str) -> TrainConfig:
    return parse(["--config", recipe, *GIVEN.get(recipe, [])])


@pytest.mark.parametrize("recipe", [path.stem for path in RECIPES.glob("*.yaml")])
def test_recipes_are_valid(recipe: str) -> None:
    assert config_of(recipe) != TrainConfig()


def test_unknown_keys_are_reported_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("batchsize: 3\n")
    with pytest.raises(ValueError, match=r"unknown key 'batchsize'; did you mean 'batch_size'\?"):
        parse(["--config", str(path)])
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="key: value"):
        parse(["--config", str(path)])
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(["--config", str(path)])
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a recipe .*cifar10"):
        parse(["--config", "cifar11"])


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("train", "--data-backend torchvision", "--data-backend cpu"),
        ("train", "--data_backend=torchvision", "--data-backend cpu"),
        ("bench attention", "--lines 50", "--lengths"),
        ("bench attention", "--lines=50", "--lengths"),
    ],
)
def test_a_renamed_flag_is_refused_with_its_new_name(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), *old.split()]) == 1
    assert f"has been renamed; write {new}\n" in capsys.readouterr().err


def test_files_with_old_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data_backend: torchvision\n")
    assert parse(["--config", str(path)]).data.data_backend == "cpu"
    # as a checkpoint holds it
    old = flatten(TrainConfig()) | {"data_backend": "torchvision"}
    assert TrainConfig.from_dict(old).data.data_backend == "cpu"


def test_unknown_flags_and_wrong_types_end_in_usage_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags in (["--batchsize", "3"], ["--batch-size", "x"], ["--precision", "int4"]):
        with pytest.raises(SystemExit) as stop:
            parse(flags)
        assert stop.value.code == 2
    assert "--batch-size" in capsys.readouterr().err


def test_deepspeeds_file_alone_does_not_pass_for_deepspeed() -> None:
    with pytest.raises(ValueError, match="ds_zero2 is for --deepspeed; add that flag"):
        parse(["--deepspeed_config", "ds_zero2"])
    assert parse(["--deepspeed", "--deepspeed_config", "ds_zero2"]).distributed.deepspeed


@pytest.mark.parametrize("flag", ["--batch-size", "--epochs", "--log-every-n-steps"])
def test_impossible_values(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", flag, "0"]) == 1
    error = f"fastclip train: error: {flag} is 0; give at least 1\n"
    assert capsys.readouterr().err == error
    with pytest.raises(ValueError, match="--save-every-steps is 0; give a positive"):
        TrainConfig.from_flat(save_every_steps=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--deepspeed", "--fsdp and --deepspeed shard the same parameters; leave one out"),
        ("--deepspeed-config ds_zero1", "leave one out, and with --fsdp --deepspeed-config too"),
        (
            "--torchcompile --grad-checkpointing",
            "--torchcompile under --fsdp does not work with --grad-checkpointing; leave one out",
        ),
        ("--optimizer apex-lamb", "--optimizer apex-lamb: ZeRO and FSDP2 shard torch's AdamW"),
        (
            "--text-lm m --text-lm-cache-bytes 9",
            "--text-lm-cache-bytes is 9, but FSDP2's ranks must run all",
        ),
    ],
)
def test_what_does_not_go_with_fsdp(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--fsdp", *flags.split()])


def test_what_is_said_of_data_is_checked_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="--csv-separator is 'ab'; give one character"):
        parse(["--csv-separator", "ab"])
    assert parse(["--csv-separator", "\\t"]).data.csv_separator == "\t"


def test_every_field_is_explained() -> None:
    """The string under a field is its help text; its metadata say the rest."""
    for section in sections(TrainConfig).values():
        texts = help_texts(section)
        for field in fields(section):
            assert texts[field.name].endswith((".", ".'")), field.name
            assert field.metadata["defines_run"] in (True, False), field.name


def test_flags_need_no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("fastclip.command_line.inspect.getsource", missing)
    assert parse(["--batch-size", "3"]).optim.batch_size == 3


def shown(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """`train --help` on a terminal so wide; without one, boxes have no sides."""
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        parse(["--help"])
    return capsys.readouterr().out


def test_help_is_grouped_and_begins_with_data_and_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(80, monkeypatch, capsys)
    parts = re.split(r"(?m)^ (\w+) options *$", text)
    under = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(under) == list(HEADINGS) and len(HEADINGS) == 9
    flags = {
        heading: re.findall(r"^  --([a-z][\w-]*)", part, flags=re.M)
        for heading, part in under.items()
    }
    first = {"data": "train-data", "model": "model", "optimization": "batch-size"}
    first |= {"loss": "loss", "schedule": "epochs", "checkpoint": "resume"}
    first |= {"evaluation": "val-data", "device": "device", "reporting": "name"}
    assert {heading: each[0] for heading, each in flags.items()} == first
    listed = [name.replace("-", "_") for each in flags.values() for name in each]
    assert sorted(listed) == sorted(flatten(TrainConfig()))
    for heading, sentence in HEADINGS.items():
        assert sentence in " ".join(under[heading].split())


def test_help_fits_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(80, monkeypatch, capsys)
    assert "\t" not in text and r"\t is a tab. (default: '\t')" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_file_of_when_data_could_be_commands(tmp_path: Path, logged: Callable[[], str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lr: 0.5\nallow_commands: false\n")
    assert parse(["--config", str(path)]).optim.lr == 0.5
    assert logged() == f"note: {path}: allow_commands is not used any more; delete the key\n"
    path.write_text("allow-commands: true\n")
    with pytest.raises(ValueError, match=r"c\.yaml: allow_commands is true, .* URLs that fsspec"):
        parse(["--config", str(path)])
    # in a checkpoint; what is read now is named anew
    config = parse(["--lr", "0.5"])
    assert TrainConfig.from_dict({**flatten(config), "allow_commands": True}) == config


@pytest.mark.parametrize("value", ["-baseline", "--baseline", "-1", "-a=b", "- half the rate"])
def test_a_value_may_begin_with_a_dash(value: str, tmp_path: Path) -> None:
    assert parse([f"--wandb-notes={value}"]).log.wandb_notes == value
    assert parse([f"--model={value}"]).model.model == value
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"wandb_notes": value, "model": value}))
    config = parse(["--config", str(path)])
    assert (config.log.wandb_notes, config.model.model) == (value, value)
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config
