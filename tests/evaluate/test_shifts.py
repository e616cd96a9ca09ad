"""Accuracies under shifts against plain loops, and `fastclip eval robustness`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastclip.cli import main
from fastclip.evaluate import shifts
from fastclip.evaluate.effective_robustness import (
    BASELINES,
    OWN_CLASSES_BASELINES,
    Line,
    clopper_pearson,
)
from fastclip.evaluate.features import Encoding
from fastclip.evaluate.imagenet import wordnet_ids
from fastclip.evaluate.results import write_result
from fastclip.evaluate.shifts import (
    baseline_from_results,
    count_correct,
    evaluate_imagenet_shifts,
    evaluate_shifts,
    read_metrics,
    shifts_in,
)
from fastclip.models.classifier import Classifier
from fastclip.models.clip import Model
from fastclip.train.config import parse
from fastclip.train.loop import train
from tests.evaluate.test_evaluations import rounded
from tests.evaluate.test_imagenet import write_image, write_mappings
from tests.train.conftest import TINY_MODEL


def slow_correct(logits: list[float], allowed: set[int], right: frozenset[int]) -> bool:
    """Whether every wrong class that is allowed lies below some right one."""
    best = max(logits[index] for index in right)
    return all(logits[index] < best for index in allowed - right)


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_count_correct(restricted: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifts, "_CHUNK_ROWS", 7)
    rng = np.random.default_rng(seed)
    groups = [frozenset({0, 3}), frozenset({5}), frozenset({7, 8, 9})]
    allowed = {0, 3, 5, 7, 8, 9} if restricted else set(range(12))
    correct = [groups[number] for number in rng.integers(3, size=40)]
    # few values, so that there are ties
    logits = torch.from_numpy(rng.integers(0, 6, (40, 12)).astype(np.float32))
    want = sum(
        slow_correct(row, allowed, right)
        for row, right in zip(logits.tolist(), correct, strict=True)
    )
    assert count_correct(logits, sorted(allowed) if restricted else None, correct) == want
    assert 0 < want < 40


def test_of_classes_of_one_name_the_lowest_is_chosen() -> None:
    names = ["owl", "missile", "cat", "missile", "dog"]
    logits = torch.tensor([[0.0, 9, 1, 9, 2], [0, 9, 1, 9, 2], [0, 9, 9, 9, 2], [9, 9, 1, 9, 2]])
    # of the first two images the one class is right and the other is not; two others tie with it
    correct = [frozenset({1}), frozenset({3}), frozenset({1}), frozenset({0, 1})]
    assert count_correct(logits, None, correct, names) == 2
    assert count_correct(logits, (1, 3), correct[:2] + [frozenset({1})] * 2, names) == 3
    assert count_correct(logits, None, correct) == 0


def test_broken_models_are_never_right() -> None:
    correct = [frozenset({0}), frozenset({1})]
    for value in (math.nan, math.inf, -math.inf, 0.0):
        assert count_correct(torch.full((2, 3), value), None, correct) == 0


def test_metrics_by_hand() -> None:
    metrics = evaluate_shifts(
        (80, 100), {"fog": (50, 100), "snow": (20, 50)}, {"fog": Line(1.0, -math.log(2))}
    )
    low, high = clopper_pearson(50, 100)
    # odds of 4, halved: 2 / 3 is to be expected
    assert metrics["fog"] == {
        **{"acc1": 0.5, "correct": 50, "count": 100, "ci_low": low, "ci_high": high},
        "rho": pytest.approx(0.5 - 2 / 3),
    }
    assert (metrics["acc1"], metrics["correct"], metrics["count"]) == (0.8, 80, 100)
    assert metrics["snow"]["acc1"] == 0.4 and "rho" not in metrics["snow"]
    assert shifts_in(metrics) == ["fog", "snow"]
    same = evaluate_shifts((80, 100), {"fog": (50, 100)}, Line(1.0, -math.log(2)))
    assert same["fog"] == metrics["fog"]
    with pytest.raises(ValueError, match="'count' is the name of a metric"):
        evaluate_shifts((80, 100), {"count": (50, 100)})


def write_model(path: Path, original: int, **shifted: int) -> Path:
    """A result of a model that has so many of 100 right."""
    counts = {name: (correct, 100) for name, correct in shifted.items()}
    metrics = evaluate_shifts((original, 100), counts)
    options = {"dataset": "d", "model": "m", "pretrained": path.stem, "task": "robustness"}
    write_result(path, metrics=metrics, **options)
    return path


def test_baseline_from_results(tmp_path: Path) -> None:
    def log_odds(per_cent: int) -> float:
        return math.log(per_cent / (100 - per_cent))

    models = {"a": (30, 20), "b": (50, 35), "c": (80, 60), "d": (90, 75)}
    paths = [write_model(tmp_path / f"{n}.json", x, fog=y) for n, (x, y) in models.items()]
    write_model(paths[0], 30, fog=20, snow=10)
    slope, intercept = np.polyfit(
        [log_odds(x) for x, _ in models.values()], [log_odds(y) for _, y in models.values()], 1
    )
    with pytest.raises(ValueError, match=r"1 results with different accuracies have the .* 'snow'"):
        baseline_from_results(paths)
    write_model(paths[0], 30, fog=20)
    lines = baseline_from_results(paths)
    assert list(lines) == ["fog"]
    # both solve the same system in double precision
    assert lines["fog"].slope == pytest.approx(slope, rel=1e-9)
    assert lines["fog"].intercept == pytest.approx(intercept, rel=1e-9)


def test_results_that_are_no_baseline(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / f"{n}.json", x, fog=9) for n, x in (("a", 50), ("b", 50))]
    third = write_model(tmp_path / "c.json", 60, fog=9)
    with pytest.raises(ValueError, match="2 results with different accuracies"):
        baseline_from_results([*paths, third])
    perfect = write_model(tmp_path / "d.json", 100, fog=9)
    with pytest.raises(ValueError, match=r"d\.json has the accuracies 1\.0 and 0\.09"):
        baseline_from_results([*paths, third, perfect])
    with pytest.raises(FileNotFoundError):
        baseline_from_results([tmp_path / "none.json"])
    options = {"dataset": "d", "model": "m", "pretrained": "", "task": "zeroshot_classification"}
    write_result(tmp_path / "z.json", metrics={"acc1": 0.5}, **options)
    with pytest.raises(ValueError, match="is a result of zeroshot_classification"):
        read_metrics(tmp_path / "z.json")


class Choices(nn.Module):
    """Sees in a picture's color a first and a second choice of class, as two 12-bit numbers.

    A class's text is its index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Tensor:
        first, second = image.long().unbind(dim=1)
        one_hot = nn.functional.one_hot
        return self.scale * (2.0 * one_hot(first, 1000) + one_hot(second, 1000))

    def encode_image(self, image: Tensor) -> Tensor:
        return self(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot(text[:, 0], 1000)


def color(first: int, second: int) -> tuple[int, int, int]:
    value = first << 12 | second
    return value >> 16, value >> 8 & 255, value & 255


def choices(image) -> Tensor:
    """What `color` wrote in the whole image."""
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all(), "the border was not cut off"
    red, green, blue = pixels[0].tolist()
    value = red << 16 | green << 8 | blue
    return torch.tensor([value >> 12, value & 4095])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(shifts, "prompts", lambda: ([str(i) for i in range(1000)], ["{}"]))
    return Model(Choices(), choices, lambda texts: torch.tensor([[int(text)] for text in texts]))


# Classes 0, 5, ..., 995 are those of ImageNet-R, 2, 7, ..., 997 those of ImageNet-A.
R_CLASSES = set(range(0, 1000, 5))
A_CLASSES = set(range(2, 1000, 5))
OBJECTS = {"clock": ("Clock", [409, 530]), "fruit": ("Fruit", [954]), "pen": ("Pen", [])}

# Each image of a set: its class (or its object), and the model's first and second choice.
Images = list[tuple[int | str, int, int]]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Images]:
    """ImageNet and its shifts below `tmp_path`, with a few images a class."""
    rng = np.random.default_rng(0)

    def look(label: int) -> tuple[int, int, int]:
        # right, right if the first choice is none of the set's, or wrong
        first = label if rng.random() < 0.5 else int(rng.integers(1000))
        return label, first, label if rng.random() < 0.5 else int(rng.integers(1000))

    val = [look(label) for label in (0, 1, 5, 10, 409, 530, 954, 7, 12, 995) for _ in range(3)]
    images: dict[str, Images] = {
        "imagenet": val,
        "imagenetv2": [look(label) for label in range(0, 1000, 50)],
        "imagenet-sketch": [look(label) for label in range(0, 1000, 40)],
        "imagenet-r": [look(label) for label in sorted(R_CLASSES)],
        "imagenet-a": [look(label) for label in sorted(A_CLASSES)],
        # the other class of the object, one that is not ImageNet's at all, one in second place
        "objectnet": [
            *(("clock", 530, 0), ("clock", 954, 409), ("clock", 3, 409), ("fruit", 954, 0)),
            *(("fruit", 8, 409), ("pen", 1, 1)),
        ],
    }
    folders = {
        "imagenet": "imagenet/val",
        "imagenetv2": "imagenetv2-matched-frequency-format-val",
        "imagenet-sketch": "imagenet-sketch/sketch",
        "imagenet-r": "imagenet-r",
        "imagenet-a": "imagenet-a",
        "objectnet": "objectnet-1.0/images",
    }
    for name, looks in images.items():
        for number, (label, first, second) in enumerate(looks):
            folder = label if isinstance(label, str) else wordnet_ids()[label]
            folder = str(label) if name == "imagenetv2" else folder
            path = tmp_path / folders[name] / folder / f"{number}.JPEG"
            if name == "objectnet":
                write_bordered(path.with_suffix(".png"), color(first, second))
            else:
                write_image(path, color(first, second))
    write_mappings(tmp_path / "objectnet-1.0" / "mappings", OBJECTS)
    return images


def write_bordered(path: Path, inside: tuple[int, int, int]) -> None:
    """A picture with ObjectNet's red border of two pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (12, 10), (255, 0, 0))
    image.paste(inside, (2, 2, 10, 8))
    image.save(path)


def choose(first: int, second: int, allowed: set[int]) -> int | None:
    """What the model answers when it may choose among these."""
    return next((choice for choice in (first, second) if choice in allowed), None)


def slow_accuracy(images: Images, allowed: set[int], together: dict) -> float:
    """Of images by class or object, with the classes that are right together with it."""
    answers = [(label, choose(first, second, allowed)) for label, first, second in images]
    right = [answer in together.get(label, {label}) for label, answer in answers]
    return sum(right) / len(right)


def test_imagenet_shifts(model: Model, sets: dict[str, Images], tmp_path: Path) -> None:
    metrics = evaluate_imagenet_shifts(model, tmp_path, Encoding(batch_size=64))
    everything, objects = set(range(1000)), {409, 530, 954}
    clock = {"clock": {409, 530}, 409: {409, 530}, 530: {409, 530}, "fruit": {954}}
    known = [image for image in sets["objectnet"] if image[0] != "pen"]
    accuracy = slow_accuracy(sets["imagenet"], everything, {})
    want = {
        "imagenetv2": slow_accuracy(sets["imagenetv2"], everything, {}),
        "imagenet-sketch": slow_accuracy(sets["imagenet-sketch"], everything, {}),
        "imagenet-r": slow_accuracy(sets["imagenet-r"], R_CLASSES, {}),
        "imagenet-a": slow_accuracy(sets["imagenet-a"], A_CLASSES, {}),
        "objectnet": slow_accuracy(known, objects, clock),
    }
    # by hand: the other clock, no clock, a clock in second place, the fruit, no fruit
    assert want["objectnet"] == 3 / 5
    assert metrics["acc1"] == accuracy and metrics["count"] == 30
    assert {name: metrics[name]["acc1"] for name in want} == want
    assert [metrics[name]["count"] for name in want] == [20, 25, 200, 200, 5]
    assert shifts_in(metrics) == list(want)
    low, high = clopper_pearson(metrics["imagenet-r"]["correct"], 200)
    assert (metrics["imagenet-r"]["ci_low"], metrics["imagenet-r"]["ci_high"]) == (low, high)

    own_classes = {"imagenet-r": R_CLASSES, "imagenet-a": A_CLASSES, "objectnet": objects}
    for name, classes in own_classes.items():
        rows = [image for image in sets["imagenet"] if image[0] in classes]
        own = slow_accuracy(rows, classes, clock if name == "objectnet" else {})
        assert metrics[name]["own_classes_acc1"] == own
        assert metrics[name]["own_classes_count"] == len(rows) > 0
        foretold = OWN_CLASSES_BASELINES[name].predict(own)
        assert metrics[name]["rho_own_classes"] == pytest.approx(want[name] - foretold)

    four = [name for name in want if name != "imagenet-a"]
    for name in four:
        for fit in ("standard", "low"):
            foretold = BASELINES[fit][name].predict(accuracy)
            assert metrics[name][f"rho_{fit}"] == pytest.approx(want[name] - foretold)
    mean = sum(want[name] for name in four) / 4
    average = metrics["average"]
    assert average["acc1"] == pytest.approx(mean)
    foretold = BASELINES["standard"]["average"].predict(accuracy)
    assert average["rho_standard"] == pytest.approx(mean - foretold)
    low_mean = sum(metrics[name]["rho_low"] for name in four) / 4
    assert average["rho_low"] == pytest.approx(low_mean)

    suited = "rho_standard" if accuracy >= 0.55 else "rho_low"
    assert all(metrics[name]["rho"] == metrics[name][suited] for name in (*four, "average"))
    assert "rho" not in metrics["imagenet-a"]


def test_absent_shifts_are_left_out(model: Model, sets: dict[str, Images], tmp_path: Path) -> None:
    (tmp_path / "imagenet-r").rename(tmp_path / "elsewhere")
    metrics = evaluate_imagenet_shifts(model, tmp_path, Encoding())
    assert shifts_in(metrics) == ["imagenetv2", "imagenet-sketch", "imagenet-a", "objectnet"]
    assert "average" not in metrics


def test_classifiers_of_imagenet(model: Model, sets: dict[str, Images], tmp_path: Path) -> None:
    classifier = Classifier(Choices(), 1000, 1000, weight=torch.eye(1000))
    as_towers = evaluate_imagenet_shifts(model, tmp_path, Encoding())
    found = evaluate_imagenet_shifts(model._replace(model=classifier), tmp_path, Encoding())
    assert found == as_towers
    other = Classifier(Choices(), 1000, 10)
    with pytest.raises(ValueError, match="has 10 classes; ImageNet has 1000"):
        evaluate_imagenet_shifts(model._replace(model=other), tmp_path, Encoding())


@pytest.mark.parametrize("present", ["", "imagenet/val/n01440764/a.JPEG"])
def test_validation_images_and_a_shift_are_needed(
    present: str, model: Model, tmp_path: Path
) -> None:
    if present:
        write_image(tmp_path / present)
    with pytest.raises(FileNotFoundError, match="get the files from"):
        evaluate_imagenet_shifts(model, tmp_path, Encoding())


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = f"--model {tmp_path}/tiny.json --logs {tmp_path}/logs --name a --epochs 1 --workers 0 "
    flags += "--train-num-samples 32 --batch-size 16 --device cpu --report-to none"
    return str(train(parse(flags.split())))


def test_command_line(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = [
        str(write_model(tmp_path / f"{n}.json", x, style=y, more=y))
        for n, x, y in (("a", 30, 20), ("b", 50, 35), ("c", 80, 60))
    ]
    command = f"eval robustness --model {run} --workers 0 --num-samples 40 --device cpu --data "
    command += "scenes --shifts style=scenes:shift=style more=scenes:split=compositional "
    plot, output = tmp_path / "plot.png", tmp_path / "result.json"
    command += f"--plot {plot} --output {output} --compare {baseline[2]} --baseline "
    assert main([*command.split(), *baseline]) == 0
    printed = capsys.readouterr()
    metrics = json.loads(printed.out)
    assert shifts_in(metrics) == ["style", "more"]
    foretold = baseline_from_results(list(map(Path, baseline)))["style"].predict(metrics["acc1"])
    rho = metrics["style"]["acc1"] - foretold
    # printed with four digits
    assert metrics["style"]["rho"] == pytest.approx(rho, abs=1e-4)
    assert f"{100 * metrics['style']['rho']:+.1f} points" in printed.err
    assert rounded(read_metrics(output)) == metrics
    assert (tmp_path / "plot_style.png").is_file() and (tmp_path / "plot_more.png").is_file()


def test_imagenet_on_the_command_line(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # one template is enough here
    names, templates = shifts.prompts()
    monkeypatch.setattr(shifts, "prompts", lambda: (names, templates[:1]))
    write_image(tmp_path / "imagenet" / "val" / wordnet_ids()[3] / "a.JPEG", (9, 200, 40))
    write_image(tmp_path / "imagenetv2-matched-frequency-format-val" / "3" / "a.jpeg", (9, 9, 40))
    plot, output = tmp_path / "plot.png", tmp_path / "result.json"
    command = f"eval robustness --model {run} --workers 0 --device cpu --root {tmp_path} "
    assert main((command + f"--plot {plot} --output {output}").split()) == 0
    printed = capsys.readouterr()
    assert "left out: imagenet-sketch, imagenet-r, imagenet-a, objectnet" in printed.err
    assert shifts_in(json.loads(printed.out)) == ["imagenetv2"] and plot.is_file()
    assert json.loads(output.read_text())["dataset"] == "imagenet"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --root with ImageNet's sets, or --data"),
        ("--root DIR --shifts a=scenes", "give --root with ImageNet's sets, or --data"),
        ("--root DIR --baseline a.json", "--baseline cannot be given with --root"),
        ("--root DIR --classes a.txt --data scenes:objects=1", "--classes and --data cannot be"),
        ("--shifts a=scenes --compare a.json", "--compare draws further models; give --plot"),
        ("--shifts a=scenes --plot DIR/a.pdf", "give a file that ends in .png"),
        ("--shifts a=scenes --output DIR", "is a folder; give a file in it"),
        ("--shifts a/b=scenes", "give a name of letters"),
        ("--shifts ci_low=scenes", "this is the name of a metric"),
        ("--root DIR", "robustness: "),
        ("--shifts scenes", "give NAME=DATA"),
        ("--shifts a=scenes a=scenes:shift=style", "give NAME=DATA"),
        ("--shifts a=scenes --baseline DIR/none.json", "none.json"),
        ("--shifts a=DIR/folder", "folder has 1 class; give data of the same classes"),
    ],
)
def test_mistakes(
    flags: str, message: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "folder" / "cat" / "a.png")
    command = f"eval robustness --model {run} --workers 0 --num-samples 8 --device cpu "
    assert main((command + flags.replace("DIR", str(tmp_path))).split()) == 1
    assert message in capsys.readouterr().err
