"""`fastclip embed` and `fastclip data preview`."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastclip
from fastclip.cli import main
from fastclip.evaluate import embed
from fastclip.train.config import parse
from fastclip.train.loop import train
from tests.conftest import jpeg
from tests.train.conftest import TINY_MODEL

MakeShard = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = f"--model {tmp_path}/tiny.json --logs {tmp_path}/logs --name a --epochs 1 --workers 0 "
    flags += "--train-num-samples 32 --batch-size 16 --device cpu --report-to none"
    return str(train(parse(flags.split())))


def test_images_in_order_with_nan_for_unreadable_ones(
    run: str, make_shard: MakeShard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{i}.jpg", jpeg((i * 50, 9, 9)) if i != 2 else b"broken") for i in range(5)]
    shard, output = make_shard(members=members), tmp_path / "out.npy"
    command = f"embed images {shard} --model {run} -o {output} --batch-size 2 --workers 0"
    assert main(command.split()) == 0
    assert "1 corrupt image" in capsys.readouterr().err
    rows = np.load(output)
    assert rows.shape == (5, 16) and rows.dtype == np.float32
    assert np.isnan(rows[2]).all() and np.isfinite(np.delete(rows, 2, axis=0)).all()
    model, preprocess, _ = fastclip.load(run)
    with Image.open(BytesIO(members[3][1])) as image:
        want = model.encode_image(preprocess(image)[None], normalize=True)[0].detach().numpy()
    np.testing.assert_allclose(rows[3], want, atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.npy"]


def test_texts_resume_where_they_stopped(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a line separator inside a caption is no new line
    texts = [f"a text\u2028of number {i}" for i in range(50)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    output = tmp_path / "t.npy"
    command = f"embed texts {tmp_path}/t.txt --model {run} -o {output} --batch-size 4".split()
    monkeypatch.setattr(embed, "SAVE_EVERY_BATCHES", 3)

    class Stop(Exception):
        pass

    calls = []
    original = embed.Embedding._save

    def save_then_stop(self: embed.Embedding, rows: np.memmap, done: int) -> None:
        original(self, rows, done)
        calls.append(done)
        if len(calls) == 2:
            raise Stop

    monkeypatch.setattr(embed.Embedding, "_save", save_then_stop)
    with pytest.raises(Stop):
        main(command)
    assert not output.exists() and calls == [12, 24]
    # a different input does not resume these rows
    (tmp_path / "u.txt").write_text("x\ny")
    assert main([*command[:2], str(tmp_path / "u.txt"), *command[3:]]) == 1
    assert "was begun with" in capsys.readouterr().err
    assert main(command) == 0
    # the second run began at row 24: its saves are at 36, 48 and the end
    assert calls == [12, 24, 36, 48, 50]
    rows = np.load(output)
    model, _, tokenizer = fastclip.load(run)
    want = model.encode_text(tokenizer(texts), normalize=True).detach().numpy()
    np.testing.assert_allclose(rows, want, atol=1e-6)


def test_the_output_must_be_npy(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "images", "scenes", "--model", run, "-o", "x.txt"]) == 1
    assert "must end in .npy" in capsys.readouterr().err


def test_preview_shows_what_training_sees(tmp_path: Path) -> None:
    """With --augment the sheet shows views and false captions, so it is another and longer one."""
    sheets = []
    for flags in ([], ["--augment", "strong"], ["--augment", "strong", "--hard-negatives", "2"]):
        output = tmp_path / f"{len(sheets)}.png"
        assert main(["data", "preview", "-o", str(output), "--count", "3", *flags]) == 0
        sheets.append(Image.open(output))
    plain, strong, negatives = sheets
    assert plain.size[0] == strong.size[0] and plain.tobytes() != strong.tobytes()
    assert negatives.size[1] > strong.size[1]


@pytest.mark.parametrize("data", ["scenes", "scenes:caption=dense,shift=style", "synthetic"])
def test_preview(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sheet.png"
    command = ["data", "preview", data, "-o", str(output), "--count", "5", "--columns", "3"]
    assert main([*command, "--size", "64"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    with Image.open(output) as sheet:
        assert sheet.width == 8 + 3 * 72 and sheet.height > 2 * 64
