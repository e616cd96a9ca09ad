"""Loss, zero-shot accuracy and retrieval while training."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastclip
from fastclip.cli import main
from fastclip.data.options import parse_sources
from fastclip.data.sources import FirstSamples, open_source
from fastclip.evaluate import imagenet
from fastclip.evaluate.features import embed_images, embed_texts
from fastclip.evaluate.retrieval import evaluate_retrieval
from fastclip.evaluate.zeroshot import classes_of, evaluate_zeroshot
from fastclip.models.build import build
from fastclip.models.clip import create
from fastclip.train import held_out
from fastclip.train.config import parse
from fastclip.train.held_out import Retrieval, Validator, ZeroShot
from fastclip.train.log import read_metrics
from fastclip.train.loop import train
from tests.conftest import jpeg

MakeShard = Callable[..., Path]


@pytest.fixture
def flags(train_flags: list[str]) -> list[str]:
    return [*train_flags, "--train-num-samples", "16", "--name", "a"]


@pytest.fixture
def shard(make_shard: MakeShard) -> Path:
    """Twelve images of three classes, with captions."""
    path = make_shard("val-00000.tar", samples=12)
    (path.parent / "classes.txt").write_text("ant\ncat\ndog\n")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images for each of two classes."""
    for number, name in enumerate(("cup", "sofa")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            color = (40 * i, 100 * number, 50)
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(jpeg(color))
    return tmp_path / "photos"


def evaluations(run: Path, prefix: str) -> dict[int, dict[str, float]]:
    """Step to the metrics whose names begin so."""
    lines = [
        (line["step"], {name: v for name, v in line.items() if name.startswith(prefix)})
        for line in read_metrics(run)
    ]
    return {step: found for step, found in lines if found}


def test_several_sources_are_measured_by_name_and_in_their_turn(
    flags: list[str], shard: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["--zeroshot-data", f"pets={shard}", str(folder), "--retrieval-data", str(shard)]
    every = "--epochs 5 --zeroshot-frequency 2 --val-data scenes --val-frequency 5 --ema 0.5"
    best = ["--best-metric", "retrieval/val-00000/text_retrieval_recall@1", "--save-all"]
    assert main(["train", *flags, *sources, *every.split(), *best]) == 0
    run = Path(capsys.readouterr().out.strip())

    # two steps an epoch; the last has everything
    assert list(evaluations(run, "val/")) == [10]
    for prefix in ("zeroshot/pets/", "zeroshot/photos/", "retrieval/val-00000/"):
        assert list(evaluations(run, prefix)) == [4, 8, 10]
    found = evaluations(run, "")[10]
    assert {"zeroshot/pets/acc1_ema", "retrieval/val-00000/image_retrieval_recall@10"} <= set(found)

    # equal to what the saved model scores afterwards
    model = fastclip.load(run)
    of_shard = embed_images(model, open_source(str(shard), split="val"))
    of_folder = embed_images(model, open_source(str(folder), split="val"))
    classes = (["ant", "cat", "dog"], ["a photo of a {}."])
    expected = {
        **{
            f"zeroshot/pets/{k}": v for k, v in evaluate_zeroshot(model, of_shard, *classes).items()
        },
        **{
            f"zeroshot/photos/{k}": v
            for k, v in evaluate_zeroshot(model, of_folder, ["cup", "sofa"], classes[1]).items()
        },
        **{
            f"retrieval/val-00000/{k}": v
            for k, v in evaluate_retrieval(model, of_shard).items()
            if "recall" in k
        },
    }
    further = {name: v for name, v in found.items() if name.startswith(("zero", "retr"))}
    assert {n: v for n, v in further.items() if not n.endswith("_ema")} == expected


def test_the_summary_has_them_and_the_best_is_chosen_by_one(
    flags: list[str], shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = ["--best-metric", "zeroshot/pets/acc1", "--epochs", "3"]
    assert main(["train", *flags, "--zeroshot-data", f"pets={shard}", *best]) == 0
    said = capsys.readouterr()
    run = Path(said.out.strip())
    scores = {step: v["zeroshot/pets/acc1"] for step, v in evaluations(run, "zero").items()}
    assert list(scores) == [2, 4, 6]
    epoch = 1 + list(scores.values()).index(max(scores.values()))
    kept = {path.name for path in (run / "checkpoints").glob("*.pt")}
    assert kept == {f"epoch_{epoch}.pt", "epoch_3.pt"}
    summary = said.err.partition("\ndone ")[2]
    assert f"scores    zeroshot/pets/acc1 {scores[6]:.4f}" in summary
    assert f"best      epoch_{epoch}.pt by zeroshot/pets/acc1" in summary
    assert "the newest epoch and the best by zeroshot/pets/acc1" in said.err


def test_a_metric_that_is_not_measured(
    flags: list[str], shard: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be known is said at once; the rest after the first epoch, which is not lost."""
    source = ["--retrieval-data", f"pets={shard}"]
    for given, name, says in (
        ([], "val/loss", "needs an evaluation: give --val-data"),
        (source, "val/loss", "whose name begins with retrieval/pets/"),
    ):
        assert main(["train", *flags, *given, "--best-metric", name]) == 1
        assert says in capsys.readouterr().err.replace("\n", " ")
    wrong = ["--best-metric", "retrieval/pets/recall@1"]
    assert main(["train", *flags, *source, *wrong]) == 1
    says = capsys.readouterr().err
    assert "was not measured, but retrieval/pets/image_retrieval_recall@1, " in says
    right = ["--best-metric", "retrieval/pets/image_retrieval_recall@1", "--resume", "latest"]
    assert main(["train", *flags, *source, *right]) == 0
    assert "resuming" in capsys.readouterr().err


def test_imagenet_folders_have_its_names(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wnid in ("n01443537", "n01440764"):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        (tmp_path / "val" / wnid / "a.jpg").write_bytes(jpeg())
    found = classes_of(str(tmp_path / "val"), "imagefolder")
    assert found is not None and found[0] == ["tench", "goldfish"] and len(found[1]) == 80
    # not every name of this form is one of the thousand
    # ImageNetV2's folders, in the order of their names as text
    folders = sorted(map(str, range(1000)))
    names, templates = imagenet.prompts_of(folders) or ([], [])
    everything = imagenet.prompts()
    assert names == [everything[0][int(folder)] for folder in folders]
    assert templates == everything[1] and imagenet.prompts_of(folders[:999]) is None
    assert imagenet.prompts_of(["n00000001"]) is None and imagenet.prompts_of([]) is None
    assert main(["train", *flags, "--imagenet-val", str(tmp_path / "val")]) == 0
    run = Path(capsys.readouterr().out.strip())
    assert len(evaluations(run, "zeroshot/imagenet/acc1")) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--zeroshot-data a=x.tar a=y.tar", "give NAME=DATA with a name of its own for each"),
        ("--zeroshot-data imagenet=x --imagenet-val y", "give NAME=DATA with a name of its own"),
        ("--retrieval-data a=", "give NAME=DATA"),
        ("--retrieval-data missing.json", "missing.json"),
        ("--zeroshot-data {}/shard-00000.tar", "put classes.txt beside it"),
        ("--zeroshot-data scenes --objective simclr --strong-scale 0.5 1", "simclr has no"),
        ("--retrieval-data scenes --objective classify", "a classifier has no texts"),
        ("--zeroshot-frequency -1", "--zeroshot-frequency is -1; give at least 1"),
    ],
)
def test_what_cannot_be_used_is_said_before_training(
    flags: list[str],
    make_shard: MakeShard,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: str,
    says: str,
) -> None:
    make_shard()
    assert main(["train", *flags, *given.format(tmp_path).split()]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "logs" / "a" / "checkpoints").exists()


def test_a_classifier_is_scored_on_its_own_classes(
    flags: list[str], shard: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classify = ["--objective", "classify", "--train-data", str(shard), "--train-num-samples", "12"]
    run = train(parse([*flags, *classify, "--zeroshot-data", f"own={shard}"]))
    assert set(evaluations(run, "zeroshot/own/")) == {1, 2}
    other = ["--name", "b", "--zeroshot-data", str(folder)]
    assert main(["train", *flags, *classify, *other]) == 1
    message = f"--zeroshot-data {folder} has 2 classes, the classifier has 3 classes;"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "data"),
    [
        ("coco=/d/a.json", "coco", "/d/a.json"),
        ("/d/coco-{00000..00004}.tar", "coco", "/d/coco-{00000..00004}.tar"),
        ("scenes:objects=1", "scenes", "scenes:objects=1"),
        ("https://h/x.tar?a=b", "x", "https://h/x.tar?a=b"),
        ("imagenet/val/", "val", "imagenet/val/"),
        ("v2=scenes:objects=1", "v2", "scenes:objects=1"),
    ],
)
def test_names_of_sources(text: str, name: str, data: str) -> None:
    assert parse_sources([text], "--retrieval-data") == {name: data}


@pytest.mark.parametrize("loss", ["--no-siglip", "--siglip"])
def test_the_loss_is_the_mean_over_whole_batches(flags: list[str], loss: str) -> None:
    """Of 20 scenes in batches of 8 the last four are left out."""
    config = parse([*flags, "--val-data", "scenes", "--val-num-samples", "20", loss])
    torch.manual_seed(0)
    model = build(config.model.model, config.model, siglip=config.loss.siglip)
    with torch.no_grad():
        model.model.get_parameter("logit_scale").fill_(math.log(7.0))
        if config.loss.siglip:
            model.model.get_parameter("logit_bias").fill_(-3.0)
    validator = Validator(config, model)
    found = validator()

    images = embed_images(model, validator.source, workers=0)
    texts = embed_texts(model, [own[0] for own in images.texts])
    expected = []
    for rows in (slice(0, 8), slice(8, 16)):
        logits = 7.0 * images.features[rows].double() @ texts[rows].double().T
        if config.loss.siglip:
            signs = 2 * torch.eye(8).double() - 1
            expected.append(-F.logsigmoid(signs * (logits - 3.0)).sum() / 8)
        else:
            lines = (logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()) / 2
            expected.append(-lines.mean())
    assert found["val/loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    chance = None if config.loss.siglip else pytest.approx(math.log(8))
    assert found.get("val/chance_loss") == chance


def test_the_first_samples_alone_are_validated(flags: list[str], shard: Path) -> None:
    few = ["--val-data", f"{shard}::{shard}", "--val-num-samples", "13", "--epochs", "1"]
    validator = Validator(parse([*flags, *few]), create(parse(flags).model.model))
    assert validator.source.counts == (12, 1) and validator.source.parts == (1, 1)
    images = embed_images(validator.model, validator.source, workers=0)
    assert len(images.features) == 13
    twice = embed_images(
        validator.model, open_source(f"{shard}::{shard}", split="val"), workers=0
    ).features
    assert images.features.equal(twice[:13])
    assert FirstSamples(validator.source, 50).counts == (12, 1)
    with pytest.raises(ValueError, match="--val-num-samples is for --val-data"):
        parse([*flags, "--val-num-samples", "3"])
    with pytest.raises(ValueError, match="--val-num-samples is 0; give a positive"):
        parse([*flags, "--val-data", "scenes", "--val-num-samples", "0"])


def test_prompts_are_made_by_the_templates_asked_for(
    flags: list[str], shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def noted(model: object, images: object, *prompts: list[str], **_: object) -> dict:
        asked.append((prompts[0], prompts[1]))
        return {}

    monkeypatch.setattr(held_out, "evaluate_zeroshot", noted)
    (tmp_path / "mine.txt").write_text("one {}\nmy {c}\n")
    model = create(parse(flags).model.model)
    for given in ([], ["--templates", str(tmp_path / "mine.txt")]):
        config = parse([*flags, "--zeroshot-data", f"pets={shard}", *given])
        ZeroShot("pets", str(shard), config, model)()
    classes = ["ant", "cat", "dog"]
    assert asked == [(classes, ["a photo of a {}."]), (classes, ["one {}", "my {c}"])]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("amp_bf16", torch.bfloat16)]
)
def test_the_precision_is_the_runs(
    precision: str,
    dtype: torch.dtype,
    flags: list[str],
    shard: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, noted = create(parse(flags).model.model), list[torch.dtype]()
    for name in ("encode_image", "encode_text"):
        encode = getattr(model.model, name)

        def noting(rows: Tensor, encode: Callable[[Tensor], Tensor] = encode) -> Tensor:
            enabled = torch.is_autocast_enabled("cpu")
            noted.append(torch.get_autocast_dtype("cpu") if enabled else torch.float32)
            return encode(rows)

        monkeypatch.setattr(model.model, name, noting)
    config = parse([*flags, "--val-data", str(shard), "--precision", precision])
    # images, texts for the loss and for retrieval, prompts
    for measured, calls in (
        (Validator(config, model), 4),
        (ZeroShot("pets", str(shard), config, model), 2),
        (Retrieval("pets", str(shard), config, model), 2),
    ):
        noted.clear()
        measured()
        assert noted == [dtype] * calls
