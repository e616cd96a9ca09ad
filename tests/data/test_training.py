"""Flags of data on their way through training and evaluation."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fastclip.cli import main
from fastclip.data.samples import Sample
from fastclip.train import training_data
from fastclip.train.config import parse, to_yaml
from tests.conftest import jpeg
from tests.train.conftest import TINY_MODEL


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Flags of a run of one epoch of a tiny model."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    text = f"--model {tmp_path}/tiny.json --logs {tmp_path}/logs --name a --epochs 1 --workers 0 "
    return (text + "--batch-size 4 --device cpu --report-to none --log-sample-ids").split()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with classes `cat` and `dog` of four images, and a table of the first."""
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "data" / name / f"{i}.jpg").write_bytes(jpeg((60 * i, 0, 0)))
    rows = "".join(f"cat/{i}.jpg,caption {i}\n" for i in range(4))
    (tmp_path / "data" / "table.csv").write_text("image,text\n" + rows)
    return tmp_path / "data"


def keys(tmp_path: Path) -> list[str]:
    lines = (tmp_path / "logs" / "a" / "samples.jsonl").read_text().splitlines()
    return [key for line in lines for key in json.loads(line)["keys"]]


def test_a_table_trains_and_folders_validate(
    flags: list[str], photographs: Path, tmp_path: Path
) -> None:
    table = f"{photographs}/table.csv"
    flags += f"--train-data {table}::{table} --train-data-upsampling-factors 1::2".split()
    flags += "--csv-img-key image --csv-caption-key text --csv-separator ,".split()
    assert main(["train", *flags, "--val-data", str(photographs)]) == 0
    assert sorted(keys(tmp_path)) == sorted([f"cat/{i}.jpg" for i in range(4)] * 3)
    metrics = (tmp_path / "logs" / "a" / "metrics.jsonl").read_text()
    assert "val/acc1" in metrics
    run = str(tmp_path / "logs" / "a")
    assert main(["eval", "zeroshot", "--model", run, "--data", str(photographs)]) == 0
    result = next((tmp_path / "logs" / "a" / "eval").iterdir())
    assert json.loads(result.read_text())["metrics"]["acc5"] == 1


def test_synthetic_data_train(flags: list[str], tmp_path: Path) -> None:
    flags += "--train-data synthetic --train-num-samples 12 --val-data scenes:shift=style".split()
    assert main(["train", *flags, "--val-frequency", "5"]) == 0
    assert len(set(keys(tmp_path))) == 12


def test_wrong_factors_are_reported(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags, "--train-data-upsampling-factors", "1::2"]) == 1
    assert "has 2 factors for the 1 patterns" in capsys.readouterr().err


def test_data_flags_are_saved_and_read_back(tmp_path: Path) -> None:
    text = "--train-data a.csv --csv-separator ; --templates t.txt --image-root /i --cache-bytes 9"
    for flags in ([], text.split()):
        config = parse(flags)
        (tmp_path / "c.yaml").write_text(to_yaml(config))
        assert parse(["--config", str(tmp_path / "c.yaml")]) == config


def test_dali_trains_on_the_same_samples_and_resumes(
    flags: list[str], make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install '.[dali]'")
    shard = str(make_shard(samples=24))
    flags += ["--train-data", shard, "--augment", "strong", "--text-augment", "strong"]
    losses = {}
    for backend in ("cpu", "dali"):
        own = [*flags, "--data-backend", backend, "--logs", f"{tmp_path}/{backend}"]
        assert main(["train", *own, "--save-every-steps", "3"]) == 0
        lines = (tmp_path / backend / "a" / "samples.jsonl").read_text()
        losses[backend] = lines
    assert losses["dali"] == losses["cpu"]

    run = tmp_path / "dali" / "a" / "checkpoints"
    for path in run.glob("epoch_1*"):
        path.unlink()
    own = [*flags, "--data-backend", "dali", "--logs", f"{tmp_path}/dali"]
    assert main(["train", *own, "--resume", "latest", "--save-every-steps", "3"]) == 0
    assert (tmp_path / "dali" / "a" / "samples.jsonl").read_text() == losses["dali"]


@pytest.mark.parametrize("views", [None, "single", "multi"])
def test_texts_are_of_one_caption_or_of_one_each(views: str | None) -> None:
    """By default of one. Words of one caption begin alike, whatever is left of them."""
    sample = Sample("a", Image.new("RGB", (8, 8)), ("qza qzb qzc qzd", "vxa vxb vxc vxd"))
    config = parse("--objective rocket --train-data scenes".split())
    if views:
        data = replace(config.data, caption_views=views)
        config = replace(config, data=data)
    sampling = training_data._captions(config.data, config.model)
    assert len(sampling.views) == 3
    drawn = [sampling.draw(sample, random.Random(seed)).texts for seed in range(40)]
    kinds = [{word[0] for text in texts for word in text.split()} for texts in drawn]
    assert {len(kind) for kind in kinds} == ({1, 2} if views == "multi" else {1})
    # both captions are drawn
    assert set().union(*kinds) == {"q", "v"}


def test_stop_words_and_cleaning_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all augmented texts, the weak one where --text-augment says so."""
    sample = Sample("a", Image.new("RGB", (8, 8)), ("the &amp;  sign",))
    flags = "--objective rocket --train-data scenes --clean-captions --stop-word-rate"
    for rate, weak, words in (("1", "weak", {"& sign"}), ("1", "none", {"the & sign"})):
        config = parse([*flags.split(), rate, "--text-augment", weak])
        sampling = training_data._captions(config.data, config.model)
        drawn = [sampling.draw(sample, random.Random(seed)).texts for seed in range(20)]
        assert {texts[0] for texts in drawn} == words
        assert not any("the" in texts[1].split() for texts in drawn)
    config = parse([*flags.split(), "0"])
    sampling = training_data._captions(config.data, config.model)
    assert [view.stop_words for view in sampling.views] == [0, 0, 0]
    assert main("train --train-data scenes --stop-word-rate 0.5".split()) == 1
    assert "--stop-word-rate is 0.5, but no text is augmented" in capsys.readouterr().err
    assert main("train --text-augment weak --stop-word-rate 1.5".split()) == 1
    assert "--stop-word-rate is 1.5; give one in [0, 1]" in capsys.readouterr().err


def test_the_views_of_flags() -> None:
    """The presets are CLIP-Rocket's (Fini et al. 2023) and the crop that open_clip trains with."""

    def drawn(flags: str) -> list[tuple[tuple[float, float], float, float, float, float]]:
        config = parse(f"--train-data scenes {flags}".split())
        views = training_data._views(config.data, config.model, 64)
        assert all(view.size == 64 and view.ratio == (3 / 4, 4 / 3) for view in views)
        return [(view.scale, view.flip, view.jitter, view.gray, view.blur) for view in views]

    crop = ((0.9, 1.0), 0.0, 0.0, 0.0, 0.0)
    weak = ((0.5, 1.0), 0.0, 0.0, 0.0, 0.0)
    strong = ((0.08, 1.0), 0.5, 0.8, 0.2, 0.5)
    assert drawn("") == [crop]
    assert drawn("--augment weak") == [weak]
    assert drawn("--augment strong") == [strong]
    assert drawn("--objective rocket") == [weak, strong, strong]
    assert drawn("--objective rocket --augment crop") == [crop, strong, strong]
    assert drawn("--aug-scale 0.4 0.8 --aug-flip 0.25") == [((0.4, 0.8), 0.25, *crop[2:])]
    other = ((0.2, 0.7), *strong[1:])
    assert drawn("--objective rocket --strong-scale 0.2 0.7") == [weak, other, other]


def test_the_blur_of_strong_views() -> None:
    """Of those alone: a weak view has none to change."""

    def blurs(flags: str) -> list[float]:
        config = parse(f"--train-data scenes {flags}".split())
        return [view.blur for view in training_data._views(config.data, config.model, 64)]

    assert blurs("--objective rocket") == [0, 0.5, 0.5]
    assert blurs("--objective rocket --aug-blur 0.25") == [0, 0.25, 0.25]
    assert blurs("--augment strong") == [0.5]
    assert blurs("--augment strong --aug-blur 0") == [0]
    assert blurs("--objective simclr --aug-blur 0") == [0, 0]


@pytest.mark.parametrize("wanted, words", [(None, {2, 3, 4}), ("none", {4})])
def test_the_texts_of_strong_views(wanted: str | None, words: set[int]) -> None:
    sample = Sample("a", Image.new("RGB", (8, 8)), ("qza qzb qzc qzd",))
    flags = ["--objective", "rocket", "--train-data", "scenes"]
    config = parse([*flags, *(["--strong-text-augment", wanted] if wanted else [])])
    sampling = training_data._captions(config.data, config.model)
    drawn = [sampling.draw(sample, random.Random(seed)).texts for seed in range(100)]
    # the weak view's is as it was
    assert {texts[0] for texts in drawn} == {"qza qzb qzc qzd"}
    assert {len(text.split()) for _, *strong in drawn for text in strong} == words


@pytest.mark.parametrize(
    "wrong",
    ["--aug-blur 0", "--strong-text-augment none", "--objective slip --strong-text-augment none"],
)
def test_flags_of_strong_views_need_them(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"has no (texts of )?strong views; leave it out"):
        parse(f"--train-data scenes {wrong}".split())


def test_several_captions_need_several_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train --train-data scenes --caption-views multi".split()) == 1
    assert "--caption-views multi: clip has one text" in capsys.readouterr().err


def test_caption_flags(
    flags: list[str], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += "--train-data scenes --train-num-samples 12".split()
    good = ["--captions", "dense=2,alt", "--sentence-sampling", "--text-augment", "weak"]
    # what is trained on says nothing of the data to validate on
    validate = ["--val-data", str(photographs), "--augment", "weak"]
    assert main(["train", *flags, *good, *validate]) == 0
    for wrong, says in (
        ("dense=0", "positive weight"),
        ("long", "scenes have no captions called 'long'; they have short, alt, dense"),
    ):
        assert main(["train", *flags, "--name", "b", "--captions", wrong]) == 1
        assert says in capsys.readouterr().err
