"""`fastclip search`: what is found, printed and drawn, and when features are computed again."""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastclip
from fastclip.cli import main
from fastclip.cli.search import cut
from fastclip.data.sources import open_source
from fastclip.evaluate import embed, kept
from fastclip.evaluate.features import Encoding
from fastclip.evaluate.kept import keep_features
from fastclip.models.clip import Model, create
from fastclip.models.open import open_model
from tests.conftest import jpeg
from tests.train.conftest import TINY_MODEL

MakeShard = Callable[..., Path]
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a tiny model and a folder of five images."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(TINY_MODEL))
    save_weights(seed=0)
    Path("photos").mkdir()
    for number, color in enumerate(COLORS):
        Path("photos", f"{number}.jpg").write_bytes(jpeg(color))
    return tmp_path


def save_weights(seed: int) -> None:
    torch.manual_seed(seed)
    torch.save(create("tiny.json").model.state_dict(), "w.pt")


def search(*words: str) -> int:
    return main(["search", *words, *"--model tiny.json --pretrained w.pt --workers 0".split()])


def opened() -> Model:
    return open_model("tiny.json", pretrained="w.pt")


@pytest.fixture
def rows_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of every batch of images that is encoded for the features."""
    counted: list[int] = []
    original = kept.image_batches

    def counting(*arguments: object, **options: object) -> object:
        for start, rows in original(*arguments, **options):
            counted.append(start)
            yield start, rows

    monkeypatch.setattr(kept, "image_batches", counting)
    return counted


def test_texts_find_what_their_products_say(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for each text, as wide as a screen, and a row of the picture."""
    texts = ["a red circle", "a large blue star with a small green cross to the left of it " * 3]
    assert search(*texts, "--num-samples", "50", "--top", "10") == 0
    output = capsys.readouterr().out
    *tables, last = output.split("\n\n")
    assert last == "search.png\n" and max(map(len, output.splitlines())) <= 80

    model, preprocess, tokenizer = opened()
    source = open_source("scenes", split="val", count=50)
    pixels = torch.stack([preprocess(source.read(0, i).image) for i in range(50)])
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True).double()
        asked = model.encode_text(tokenizer(texts), normalize=True).double()
    for text, query, shown in zip(texts, asked, tables, strict=True):
        title, header, *lines = shown.splitlines()
        assert text.startswith(title.removesuffix("...")) and header.split()[0] == "score"
        best = sorted(range(50), key=lambda i: -float(images[i] @ query))[:10]
        for place, (row, line) in enumerate(zip(best, lines, strict=True), 1):
            number, score, key, caption = line.split(maxsplit=3)
            assert (number, key) == (str(place), f"val{row:08d}")
            assert abs(float(score) - float(images[row] @ query)) < 6e-4
            assert source.read(0, row).texts[0].startswith(caption.removesuffix("..."))
    with Image.open("search.png") as picture:
        # a text, eight images and two more below, for each of two; a score and two lines of caption
        assert picture.size == (128 * 9 + 64 + 8 * 11, 8 + 4 * (128 + 3 * 15 + 8))


def test_an_image_finds_itself_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert search("--image", "photos/2.jpg", "--image", "photos/4.jpg", "--data", "photos") == 0
    first, second, _ = capsys.readouterr().out.split("\n\n")
    for shown, name in ((first, "2.jpg"), (second, "4.jpg")):
        title, header, best, *others = shown.splitlines()
        assert header.split() == ["score", "image"]
        assert title == f"photos/{name}" and best.split() == ["1", "1.000", name]
        # all five, although eight is the default
        assert len(others) == 4


def test_embed_writes_the_same_features() -> None:
    assert search("red", "--data", "photos") == 0
    model = "--model tiny.json --pretrained w.pt --workers 0"
    assert main(f"embed images photos {model} -o features.npy".split()) == 0
    (file,) = Path("search/tiny.json_w.pt").glob("*.npy")
    assert np.array_equal(np.load("features.npy"), np.load(file))


@pytest.mark.parametrize("kind", ["shard", "table", "classes", "wds"])
def test_kinds_of_data(
    kind: str, make_shard: MakeShard, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, name, caption = {
        "shard": ("shard-00000.tar", "00003", "caption number 3"),
        "table": ("t.csv", "photos/1.jpg", "one caption"),
        "classes": (".", "photos/1.jpg", "a photo of a photos."),
        "wds": ("wds", "00003", "caption number 3"),
    }[kind]
    make_shard()
    Path("t.csv").write_text("filepath,title\nphotos/1.jpg,one caption\nphotos/1.jpg,another\n")
    if kind == "wds":
        (here / "wds" / "test").mkdir(parents=True)
        shutil.move("shard-00000.tar", "wds/test/0.tar")
        Path("wds/test/nshards.txt").write_text("1")
    assert search("a circle", "--data", data) == 0
    found = [line.split(maxsplit=3)[2:] for line in capsys.readouterr().out.splitlines()[2:-2]]
    assert [name, caption] in found


def test_features_are_kept(rows_encoded: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Another query encodes no image; features of other data and models have files of their own."""
    flags = ["--data", "photos", "--batch-size", "2"]
    assert search("red", *flags) == 0 and rows_encoded == [0, 2, 4]
    shown = capsys.readouterr()
    (file,) = Path("search/tiny.json_w.pt").glob("*.npy")
    assert f"features of 5 images: computed now, then kept in {file}" in shown.err
    assert search("red", *flags, "--top", "5") == 0 and rows_encoded == [0, 2, 4]
    again = capsys.readouterr()
    assert again.out == shown.out and again.err == ""
    features = np.load(file)
    assert features.dtype == np.float32 and features.shape == (5, 16)
    assert search("red", "--num-samples", "3") == 0 and rows_encoded == [0, 2, 4, 0]
    assert len(list(file.parent.glob("*.npy"))) == 2


def test_what_has_changed_is_said_and_computed_again(
    rows_encoded: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed() -> str:
        rows_encoded.clear()
        assert search("red", "--data", "photos") == 0
        said = capsys.readouterr().err
        return said.partition(" was made: ")[2].partition(";")[0] if rows_encoded else "nothing"

    assert changed() == ""  # the first time
    assert changed() == "nothing"
    Path("photos/3.jpg").write_bytes(jpeg((1, 2, 3), size=40))
    assert changed() == "data"
    Path("photos/5.jpg").write_bytes(jpeg())
    assert changed() == "data"
    save_weights(seed=1)
    Path("photos/0.jpg").unlink()
    assert changed() == "weights and data"
    monkeypatch.setattr(embed, "__version__", "9.9")
    assert changed() == "version"
    assert changed() == "nothing"


def test_preprocessing_is_known_by_its_pixels(
    rows_encoded: list[int], logged: Callable[[], str]
) -> None:
    source, file = open_source("photos", split="val", required=()), Path("features/p.npy")
    model = opened()
    darker = model._replace(preprocess=lambda image: model.preprocess(image) * 0.99)
    for used, said in ((model, "kept in"), (opened(), ""), (darker, "was made: preprocessing;")):
        features = keep_features(used, source, file, Encoding(), name="tiny").features
        assert said in logged() if said else not logged()
    assert rows_encoded == [0, 0]
    with torch.no_grad():
        pixels = darker.preprocess(source.read(0, 0).image)
        want = model.model.encode_image(pixels[None], normalize=True)[0]
    np.testing.assert_allclose(features[0], want, atol=1e-6)


class Writes:
    """Unpickled it writes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (Path("written"), "text")


@pytest.mark.parametrize(
    "damage", ["cut", "bytes", "undescribed", "description", "other rows", "pickle", "pipe"]
)
def test_damaged_features_are_computed_again(damage: str, rows_encoded: list[int]) -> None:
    assert search("red", "--data", "photos") == 0
    (file,) = Path("search/tiny.json_w.pt").glob("*.npy")
    whole, described = file.read_bytes(), file.with_suffix(".json")
    if damage == "cut":
        file.write_bytes(whole[:-8])
    elif damage == "bytes":
        file.write_bytes(b"no array")
    elif damage == "undescribed":
        described.unlink()
    elif damage == "description":
        described.write_text(described.read_text()[:50])
    elif damage == "other rows":
        np.save(file, np.load(file)[:3])
    elif damage == "pickle":
        np.save(file, np.array([Writes()] * 5, dtype=object), allow_pickle=True)
    else:
        file.unlink()
        os.mkfifo(file)
    assert search("red", "--data", "photos") == 0
    assert len(rows_encoded) == 2 and file.read_bytes() == whole
    assert not Path("written").exists()


def test_stopped_it_resumes(
    rows_encoded: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same images; with others it begins again."""
    monkeypatch.setattr(embed, "SAVE_EVERY_BATCHES", 2)
    original = embed.Embedding._save

    def save_then_stop(self: embed.Embedding, rows: np.memmap, done: int) -> None:
        original(self, rows, done)
        raise KeyboardInterrupt

    flags = ["red", "--data", "photos", "--batch-size", "1"]
    for starts in ([0, 1], [2, 3]):
        with monkeypatch.context() as patch:
            patch.setattr(embed.Embedding, "_save", save_then_stop)
            assert search(*flags) == 1 and rows_encoded == starts
        rows_encoded.clear()
    Path("photos/4.jpg").write_bytes(jpeg((5, 5, 5)))
    assert search(*flags) == 0 and rows_encoded == [0, 1, 2, 3, 4]
    (file,) = Path("search/tiny.json_w.pt").glob("*.npy")
    assert sorted(p.suffix for p in file.parent.iterdir()) == [".json", ".npy"]


def test_a_description_never_stands_beside_other_features(
    rows_encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the new features and before their description, and the old images are back."""
    flags = ["red", "--data", "photos"]
    assert search(*flags) == 0
    (file,) = Path("search/tiny.json_w.pt").glob("*.npy")
    features, image = file.read_bytes(), Path("photos/3.jpg")
    content, state = image.read_bytes(), image.stat()
    image.write_bytes(jpeg((1, 2, 3), size=48))

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kept, "write_text", killed)
        assert search(*flags) == 1 and file.read_bytes() != features
    image.write_bytes(content)
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert search(*flags) == 0 and file.read_bytes() == features
    assert len(rows_encoded) == 3


def test_of_two_at_once_one_computes(rows_encoded: list[int], logged: Callable[[], str]) -> None:
    source = open_source("photos", split="val", required=())
    found: list[np.ndarray] = []
    model = opened()

    def get() -> None:
        file = Path("features/photos.npy")
        found.append(keep_features(model, source, file, Encoding(2), name="tiny").features)

    threads = [threading.Thread(target=get) for _ in range(3)]
    Path("features").mkdir()
    handle = os.open("features", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for thread in threads:
        thread.start()
    said = ""
    while said.count("another process computes features in features: waiting for it") < 3:
        said += logged()
        time.sleep(0.01)
    assert not found
    os.close(handle)
    for thread in threads:
        thread.join()
    assert rows_encoded == [0, 2, 4] and len(found) == 3
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_unreadable_images_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/1.jpg").write_bytes(b"no image")
    assert search("red", "--data", "photos") == 0
    shown = capsys.readouterr()
    assert "left out: 1 corrupt image" in shown.err and "photos:1.jpg" in shown.err
    assert len(shown.out.splitlines()) == 2 + 4 + 2 and "1.jpg" not in shown.out
    assert search("red", "--data", "photos", "--top", "5") == 1
    assert "--top is 5, and photos has 4 readable images; give at most 4" in capsys.readouterr().err
    for path in Path("photos").iterdir():
        path.write_bytes(b"no image")
    assert search("red", "--data", "photos") == 1
    assert "none of 5 images can be read: 5 corrupt image" in capsys.readouterr().err


def test_a_shard_that_was_not_read_is_read_again(
    make_shard: MakeShard, rows_encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may pass, as a network that is away, is not kept."""
    make_shard("a.tar", samples=2)
    make_shard("b.tar", samples=2)
    Path("sizes.json").write_text('{"a.tar": 2, "b.tar": 2}')
    Path("b.tar").chmod(0)
    original = fastclip.data.shards.open_regular

    def refusing(name: str, **options: bool) -> object:
        if name == "b.tar":
            raise PermissionError(name)
        return original(name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fastclip.data.shards, "open_regular", refusing)
        assert search("red", "--data", "{a,b}.tar") == 0
    assert search("red", "--data", "{a,b}.tar") == 0
    assert search("red", "--data", "{a,b}.tar") == 0
    assert rows_encoded == [0, 0]


def test_a_broken_model_is_no_unreadable_image(capsys: pytest.CaptureFixture[str]) -> None:
    weights = torch.load("w.pt")
    weights["visual.proj"] = weights["visual.proj"] * torch.nan
    torch.save(weights, "w.pt")
    assert search("red", "--data", "photos") == 1
    assert "features of 0.jpg are not finite: its weights are broken" in capsys.readouterr().err
    assert not list(Path("search/tiny.json_w.pt").glob("*.json"))
    weights["visual.proj"] = torch.ones(16, 16)
    weights["text_projection"] = weights["text_projection"] * torch.nan
    torch.save(weights, "w.pt")
    assert search("red", "--data", "photos") == 1
    assert "query 0 is not finite" in capsys.readouterr().err


def test_a_picture_is_replaced_by_the_next_alone(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["red", "--data", "photos", "-o", "found.png"]
    assert search(*flags) == search(*flags) == 0
    with Image.open("photos/0.jpg") as image:
        image.save("found.png")
    before = Path("found.png").read_bytes()
    capsys.readouterr()
    assert search(*flags) == 1
    assert "found.png exists and is no picture of fastclip search" in capsys.readouterr().err
    assert Path("found.png").read_bytes() == before


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Writing to memory that is mapped would end in a bus error."""

    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert search("red", "--data", "photos") == 1
    shown = capsys.readouterr()
    assert "npy.partial needs 448 bytes: No space left on device; make room" in shown.err
    assert not list(Path("search/tiny.json_w.pt").iterdir())
    assert search("red", "--data", "photos") == 0


def test_a_folder_that_cannot_be_written_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features that are there already are found all the same."""
    flags = ["red", "--data", "photos", "--features", "kept"]
    access = os.access

    def refusing(path: Path, mode: int) -> bool:
        return Path(path).name != "kept" and access(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", refusing)
        assert search(*flags) == 1
    assert "kept cannot hold features: it is not writable; give another" in capsys.readouterr().err
    assert search(*flags) == 0
    monkeypatch.setattr(os, "access", refusing)
    assert search(*flags) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to look for; give a text, or --image FILE"),
        (["red", " "], "a text to look for is empty"),
        (["red", "--top", "0"], "--top is 0; give at least 1"),
        (["red", "--top", "6"], "--top is 6, and photos has 5 readable images; give at most 5"),
        (["red", "blue", "--top", "1001"], "are 2,002 images, and a picture has at most 2,000"),
        (["red", "--size", "9999"], "--size is 9999"),
        (["--image", "no.jpg"], "--image no.jpg does not exist"),
        (["--image", "tiny.json"], "--image cannot be used: corrupt image"),
        (["--image", "photos"], "--image cannot be used: image path is not a file"),
        (["red", "-o", "found.jpg"], "--output found.jpg must end in .png"),
        (["red", "-o", "no/found.png"], "the folder no does not exist; make it"),
        (["red", "-o", "folder.png"], "folder.png exists and is no picture of fastclip search"),
        (["red", "--data", "empty"], "empty holds no images"),
        (["red", "--data", "nothing"], "cannot recognize 'nothing' as data"),
        (["red", "--features", "tiny.json"], "tiny.json cannot hold features: File exists; give"),
    ],
)
def test_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("folder.png").mkdir()
    assert search(*(["--data", "photos"] if "--data" not in words else []), *words) == 1
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == "" and not Path("search.png").exists()


@pytest.mark.parametrize(
    ("text", "keep_end", "shown"),
    [
        ("short", False, "short"),
        ("two\nlines\tand more", False, "two lin..."),
        ("folder/image.jpg", True, "...age.jpg"),
        ("\u72ac" * 5, False, "\u72ac" * 5),
        ("\u72ac" * 6, False, "\u72ac" * 3 + "..."),
        ("a\x1b[2J", False, r"a\x1b[2J"),
        # one pass: cut letter by letter, this would take hours
        ("x" * (1 << 20), False, "xxxxxxx..."),
        ("x" * (1 << 20), True, "...xxxxxxx"),
    ],
)
def test_names_and_captions_are_cut_by_columns(text: str, keep_end: bool, shown: str) -> None:
    assert cut(text, 10, keep_end=keep_end) == shown


def test_images_of_a_caption_are_framed() -> None:
    """A folder is a class: all five have its prompt."""
    assert search("a photo of a photos.", "a circle", "--data", ".") == 0
    with Image.open("search.png") as picture:
        green = (np.asarray(picture.convert("RGB")) == (44, 160, 44)).all(axis=2)
    second = 8 + 128 + 3 * 15 + 8 - 3
    assert green[:second].sum() == 5 * (134**2 - 128**2) and not green[second:].any()
