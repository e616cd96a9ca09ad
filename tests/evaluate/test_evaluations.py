"""Features of image files; CLIP_benchmark's layout and image folders from the command line."""

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastclip.cli import main
from fastclip.evaluate.features import Encoding, ImageFile, embed_files, embed_texts
from fastclip.evaluate.wds import expand_wds, is_wds, wds_classes
from fastclip.models.clip import Model, create
from tests.conftest import jpeg, write_tar
from tests.train.conftest import tiny_model

__all__ = ["tiny_model"]  # fixtures

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


@pytest.fixture
def model(tiny_model: str) -> Model:
    torch.manual_seed(1)
    return create(tiny_model)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A PNG whose left half is red and whose right half is blue, and two JPEGs."""
    halves = Image.new("RGB", (64, 32), RED)
    ImageDraw.Draw(halves).rectangle((32, 0, 63, 31), BLUE)
    paths = [tmp_path / name for name in ("halves.png", "green.jpg", "red.jpg")]
    halves.save(paths[0])
    paths[1].write_bytes(jpeg(GREEN))
    paths[2].write_bytes(jpeg(RED))
    return paths


def encoded(model: Model, image: Image.Image) -> Tensor:
    """One image's normalized feature, without any of fastclip's evaluation."""
    model.model.eval()
    with torch.no_grad():
        feature = model.model.encode_image(model.preprocess(image)[None])[0]
    return feature / feature.norm()


@pytest.mark.parametrize("encoding", [Encoding(batch_size=2), Encoding(batch_size=1, workers=1)])
def test_files_with_boxes_in_the_order_asked_for(
    model: Model, files: list[Path], encoding: Encoding
) -> None:
    halves, green, _ = files
    asked = [
        ImageFile(halves, (32, 0, 64, 32)),
        ImageFile(green),
        ImageFile(halves, (0, 0, 32, 32)),
        ImageFile(green),
        ImageFile(halves),
    ]
    features = embed_files(model, asked, encoding)
    assert features.dtype == torch.float32 and features.shape == (5, 16)
    with Image.open(halves) as whole, Image.open(green) as other:
        images = [
            Image.new("RGB", (32, 32), BLUE),
            other.convert("RGB"),
            Image.new("RGB", (32, 32), RED),
            other.convert("RGB"),
            whole.convert("RGB"),
        ]
    want = torch.stack([encoded(model, image) for image in images])
    # products of other batch sizes round differently
    torch.testing.assert_close(features, want, rtol=0, atol=1e-6)
    assert (features[0] - features[2]).abs().max() > 1e-3


def test_equal_files_are_encoded_once(
    model: Model, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode = model.model.encode_image
    monkeypatch.setattr(model.model, "encode_image", lambda x: seen.append(len(x)) or encode(x))
    features = embed_files(model, [ImageFile(files[1]), ImageFile(files[2])] * 20, Encoding())
    assert seen == [2] and features.shape == (40, 16)
    assert torch.equal(features[0::2], features[:1].expand(20, -1))


def test_files_that_are_missing_or_unreadable_are_named(model: Model, files: list[Path]) -> None:
    absent = [ImageFile(Path(f"/nowhere/{i}.jpg")) for i in range(5)]
    with pytest.raises(
        ValueError, match=r"5 of 6 image files are missing: /nowhere/0.jpg, .*, \.\.\."
    ):
        embed_files(model, [ImageFile(files[0]), *absent, absent[0]], Encoding())
    files[1].write_bytes(b"no image")
    boxes = [ImageFile(files[0], (9, 0, 9, 5)), ImageFile(files[1]), ImageFile(files[2])]
    with pytest.raises(ValueError, match="2 of 3 image files are unreadable") as written:
        embed_files(model, boxes, Encoding())
    assert "green.jpg" in str(written.value) and "(9, 0, 9, 5)" in str(written.value)
    with pytest.raises(ValueError, match="no image files"):
        embed_files(model, [], Encoding())


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size is 0; give a positive number"):
        Encoding(batch_size=0)


def test_texts_in_batches_are_in_order(model: Model) -> None:
    texts = [f"text number {i}" for i in range(7)]
    together, apart = (embed_texts(model, texts, batch_size=size) for size in (7, 3))
    # products of other batch sizes round differently
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


COLORS = [RED, GREEN, BLUE, GREEN, RED]
CAPTIONS = ["red\na red square\n", "green", "blue\r\n\n it is blue ", "green", "also red"]


def encoded_as(kind: str, color: tuple[int, int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (24, 24), color).save(buffer, kind, lossless=True)
    return buffer.getvalue()


@pytest.fixture
def wds(tmp_path: Path) -> Path:
    """Five WebP images in two shards of the split test, two in train, as CLIP_benchmark has it."""
    folder = tmp_path / "wds_colors"
    (folder / "test").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} image.\n{c}.\n")
    members: list[tuple[str, bytes]] = []
    for i, (color, caption) in enumerate(zip(COLORS, CAPTIONS, strict=True)):
        label = (RED, GREEN, BLUE).index(color)
        members += [
            (f"s{i:07d}.webp", encoded_as("WEBP", color)),
            (f"s{i:07d}.cls", str(label).encode()),
            (f"s{i:07d}.txt", caption.encode()),
        ]
    write_tar(folder / "test" / "0.tar", members[:9])
    write_tar(folder / "test" / "1.tar", members[9:])
    (folder / "test" / "nshards.txt").write_text("2\n")
    write_tar(folder / "train" / "0.tar", members[:6])
    (folder / "train" / "nshards.txt").write_text("1")
    return folder


def test_the_layout_is_distinguished_from_others(wds: Path, tmp_path: Path) -> None:
    assert expand_wds(str(wds)) == f"{wds}/test/{{0..1}}.tar"
    assert expand_wds(f"{wds}/", "train") == f"{wds}/train/{{0..0}}.tar"
    assert wds_classes(str(wds)) == (["red", "green", "blue"], ["a {c} image.", "{c}."])
    with pytest.raises(ValueError, match=r"no split 'val'; give --split, one of: test, train"):
        expand_wds(str(wds), "val")
    shards = "::".join(f"/data/shard-{i}.tar" for i in range(500))
    for others in ("scenes", "a-{0..3}.tar", shards, str(wds / "test"), str(tmp_path / "no")):
        assert not is_wds(others) and expand_wds(others) == others
    for wrong in ("", "0", "-1", "two"):
        (wds / "test" / "nshards.txt").write_text(wrong)
        with pytest.raises(ValueError, match="must be the number of shards"):
            expand_wds(str(wds))


@pytest.fixture
def opened(
    model: Model, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Flags that name the model, in a folder of its own."""
    torch.save(model.model.state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    yield ["--model", tiny_model, "--pretrained", str(tmp_path / "weights.pt"), "--workers", "0"]


def run(flags: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    status, printed = main(["eval", *flags]), capsys.readouterr()
    assert status == 0, printed.err
    _, _, file = printed.err.strip().rpartition("written to ")
    metrics: dict[str, Any] = json.loads(Path(file).read_text())["metrics"]
    # all digits are in the file
    assert json.loads(printed.out) == rounded(metrics)
    return metrics


def rounded(metrics: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(metrics), parse_float=lambda text: round(float(text), 4))


def own_scores(model: Model, images: list[tuple[int, int, int]], texts: list[str]) -> Tensor:
    """Cosines (images, texts) of plain colors, without any of fastclip's evaluation."""
    pixels = torch.stack([encoded(model, Image.new("RGB", (24, 24), color)) for color in images])
    with torch.no_grad():
        features = model.model.encode_text(model.tokenizer(texts))
    return pixels @ (features / features.norm(dim=-1, keepdim=True)).T


def test_zeroshot_in_clip_benchmarks_layout(
    model: Model, wds: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(["zeroshot", "--data", str(wds), *opened], capsys)
    prompts = [
        f"{p}{name}{s}"
        for name in ("red", "green", "blue")
        for p, s in (("a ", " image."), ("", "."))
    ]
    with torch.no_grad():
        texts = model.model.encode_text(model.tokenizer(prompts))
    classes = []
    for i in range(3):
        mean = sum(texts[2 * i + j] / texts[2 * i + j].norm() for j in range(2))
        classes.append(mean / mean.norm())
    right = {0: [], 1: [], 2: []}
    for color in COLORS:
        image = encoded(model, Image.new("RGB", (24, 24), color))
        scores = [float(image @ text) for text in classes]
        label = (RED, GREEN, BLUE).index(color)
        right[label].append(scores.index(max(scores)) == label)
    hits = [hit for of_class in right.values() for hit in of_class]
    assert metrics["acc1"] == pytest.approx(sum(hits) / 5, abs=1e-12)
    recall = sum(sum(of_class) / len(of_class) for of_class in right.values()) / 3
    assert metrics["mean_per_class_recall"] == pytest.approx(recall, abs=1e-12)
    written = json.loads(next(Path("eval").glob("*/zeroshot_wds_colors.json")).read_text())
    assert written["dataset"] == "wds_colors" and written["metrics"] == metrics


def test_each_line_is_a_caption_in_clip_benchmarks_layout(
    model: Model, wds: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(["retrieval", "--data", str(wds), "--recall-k", "1", "2", *opened], capsys)
    # the two green images share their one caption
    texts = ["red", "a red square", "green", "blue", "it is blue", "also red"]
    matches = {(0, 0), (0, 1), (1, 2), (3, 2), (2, 3), (2, 4), (4, 5)}
    scores = own_scores(model, COLORS, texts)
    assert metrics["images"] == 5 and metrics["texts"] == 6
    # of six texts an image has one or two, of five images a text has one or two
    assert metrics["chance"]["text_retrieval_recall@1"] == pytest.approx(7 / 5 / 6)
    assert metrics["chance"]["image_retrieval_recall@1"] == pytest.approx(7 / 6 / 5)

    def recall(scores: Tensor, matches: set[tuple[int, int]], k: int) -> float:
        """Of queries in rows; keys that score the same come before a match."""
        found = 0
        for query, row in enumerate(scores.tolist()):
            own = [key for key in range(len(row)) if (query, key) in matches]
            best = max(row[key] for key in own)
            # the same image twice may round differently in another batch
            ahead = [key for key in range(len(row)) if key not in own and row[key] > best - 1e-6]
            found += len(ahead) < k
        return found / len(scores)

    turned = {(text, image) for image, text in matches}
    for k in (1, 2):
        assert metrics[f"text_retrieval_recall@{k}"] == recall(scores, matches, k)
        assert metrics[f"image_retrieval_recall@{k}"] == recall(scores.T, turned, k)


def test_lines_elsewhere_stay_one_caption(
    wds: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(["retrieval", "--data", f"{wds}/test/{{0..1}}.tar", *opened], capsys)
    assert metrics["texts"] == 4


def test_an_image_folder_names_its_classes(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "colors"
    for name, color in {"red": RED, "green": GREEN, "blue": BLUE}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "1.jpg").write_bytes(jpeg(color))
    metrics = run(["zeroshot", "--data", str(folder), *opened], capsys)
    assert metrics["acc1"] in [pytest.approx(n / 3) for n in range(4)]
    # of each class one image
    assert metrics["mean_per_class_recall"] == pytest.approx(metrics["acc1"])
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    assert main(["eval", "zeroshot", "--data", str(folder), "--classes", str(names), *opened]) == 1
    assert "the 2 classes given are 0..1" in capsys.readouterr().err


def test_what_no_data_says_of_classes_is_asked_for(
    wds: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (wds / "classnames.txt").unlink()
    assert main(["eval", "zeroshot", "--data", str(wds), *opened]) == 1
    assert "no class names: give --classes FILE" in capsys.readouterr().err


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Image folders of three colors to train and to test on: six images a class, and two."""
    for split, shades in (("train", range(0, 60, 10)), ("test", (5, 25))):
        for name, color in {"red": RED, "green": GREEN, "blue": BLUE}.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for shade in shades:
                (folder / f"{shade}.jpg").write_bytes(jpeg(tuple(max(c - shade, 0) for c in color)))
    return f"{tmp_path}/train", f"{tmp_path}/test"


def test_linear_probe_on_the_command_line(
    folders: tuple[str, str], opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = folders
    metrics = run(["linear-probe", "--train-data", train, "--data", test, *opened], capsys)
    written = json.loads(next(Path("eval").glob("*/linear_probe_test.json")).read_text())
    assert written["task"] == "linear_probe" and written["dataset"] == "test"
    assert written["metrics"] == metrics


def test_a_linear_probe_is_not_tested_on_what_it_was_trained_on(
    wds: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(wds), "--train-data", str(wds), "--train-split", "test", *opened]
    assert main(["eval", "linear-probe", *flags]) == 1
    assert "has the images of --data" in capsys.readouterr().err
    # a world without a split is that of "val"
    flags = ["--data", "scenes", "--train-data", "scenes:split=val", "--num-samples", "8", *opened]
    assert main(["eval", "linear-probe", *flags]) == 1
    assert "has the images of --data" in capsys.readouterr().err


def test_labels_of_both_sides_of_a_probe_are_of_the_same_classes(
    tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders are numbered by their names: without one, all that follow have other numbers."""
    for place, classes in (("train", ("cat", "cow", "dog")), ("test", ("cat", "dog"))):
        for name in classes:
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "0.jpg").write_bytes(jpeg())
    flags = ["--train-data", str(tmp_path / "train"), "--data", str(tmp_path / "test"), *opened]
    assert main(["eval", "linear-probe", *flags]) == 1
    assert (
        "test has 2 classes, " in (error := capsys.readouterr().err) and "has 3 classes;" in error
    )


def test_a_result_replaces_only_one_of_the_same_settings(
    wds: Path, opened: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(*more: str) -> set[str]:
        run(["zeroshot", "--data", str(wds), *opened, *more], capsys)
        return {path.name for path in Path("eval").glob("*/*.json")}

    first = written()
    assert first == {"zeroshot_wds_colors.json"}
    # how fast or where says nothing of what is measured
    assert written("--batch-size", "2", "--device", "cpu") == first
    (other,) = written("--split", "train") - first
    assert re.fullmatch(r"zeroshot_wds_colors_[0-9a-f]{6}\.json", other)
    assert written("--split", "train") == first | {other}
    names = tmp_path / "names.txt"
    names.write_text("red\nlime\nblue\n")
    assert len(written("--classes", str(names))) == 3
    (settings,) = (
        json.loads(path.read_text())["settings"] for path in Path("eval").glob(f"*/{other}")
    )
    assert settings["split"] == "train" and settings["data"] == str(wds)
    assert not {"model", "batch_size", "device", "output", "cache_bytes"} & settings.keys()


def test_a_mistake_in_the_output_shows_before_the_work(
    wds: Path, opened: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(wds), *opened]
    assert main(["eval", "retrieval", *flags, "--output", str(tmp_path)]) == 1
    assert "is a folder; give a file in it" in capsys.readouterr().err
    # this model's weights cannot be read: nothing was opened before the ranks were looked at
    (tmp_path / "weights.pt").write_bytes(b"")
    assert main(["eval", "retrieval", *flags, "--recall-k", "0"]) == 1
    assert "recall at 0" in capsys.readouterr().err
