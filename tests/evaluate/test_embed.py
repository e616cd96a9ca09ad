"""`fastclip embed` and `fastclip data preview`."""

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastclip
from fastclip.cli import main
from fastclip.data.index import Fault
from fastclip.data.shards import ShardSource
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


def test_shards_get_the_features_of_their_samples(
    run: str, make_shard: MakeShard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for first in (0, 4):
        make_shard(f"{first}.tar", samples=4, first=first)
    broken = make_shard("8.tar", [("8.jpg", b"broken"), ("8.txt", b"a"), *sample("9")])
    pattern, out = f"{tmp_path}/{{0..8..4}}.tar", tmp_path / "out"
    command = f"embed shards {pattern} --model {run} -o {out} --batch-size 3 --workers 0".split()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "features of 9 samples in 3 new shards" in said and "1 corrupt image" in said
    scale = re.search(r"--distill-shards --distill-logit-scale ([\d.]+)", said)
    model, preprocess, tokenizer = fastclip.load(run)
    assert scale and float(scale[1]) == pytest.approx(model.logit_scale.exp().item(), rel=1e-5)
    assert json.loads((out / "sizes.json").read_text()) == {"0.tar": 4, "4.tar": 4, "8.tar": 2}

    # the rest is as it was, and the broken image has no features
    assert [name for name in files(out / "8.tar") if name.startswith("8.")] == ["8.jpg", "8.txt"]
    before, after = files(tmp_path / "4.tar"), files(out / "4.tar")
    added = {name: after.pop(name) for name in [*after] if name.endswith(".npy")}
    assert after == before and len(added) == 8
    with Image.open(BytesIO(before["00006.jpg"])) as image:
        want = model.encode_image(preprocess(image)[None], normalize=True)[0]
    got = np.load(BytesIO(added["00006.teacher_image.npy"]))
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-3)
    want = model.encode_text(tokenizer(["caption number 6"]), normalize=True)[0]
    got = np.load(BytesIO(added["00006.teacher_text.npy"]))
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-3)
    assert ShardSource(str(out / "4.tar"), features=True).read(0, 2).features.keys()

    # what is there is passed over; features in shards that have some are refused
    (out / "4.tar").unlink()
    times = (out / "0.tar").stat().st_mtime_ns
    assert main(command) == 0 and (out / "0.tar").stat().st_mtime_ns == times
    assert files(out / "4.tar") == before | added
    assert main([*command[:2], str(out / "0.tar"), *command[3:6], f"{out}2", *command[7:]]) == 1
    assert "00000.teacher_image.npy is there already" in capsys.readouterr().err
    assert main([*command, "--precision", "amp_bf16"]) == 1
    assert "precision was 'fp32' and is 'amp_bf16'" in capsys.readouterr().err
    # shards of the same names elsewhere are of other data
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.tar").write_bytes(broken.read_bytes())
    assert main([*command[:2], str(tmp_path / "other" / "0.tar"), *command[3:]]) == 1
    said = capsys.readouterr().err
    assert f"folders was ['{tmp_path}'] and is ['{tmp_path}/other']" in said
    assert main([*command, "--captions", "txt"]) == 1
    assert "captions was None and is 'txt'" in capsys.readouterr().err


def test_features_depend_on_the_preprocessing(run: str) -> None:
    model = fastclip.load(run)
    identity = embed.features_identity(model, "a", "fp32")
    assert identity == embed.features_identity(model, "a", "fp32")

    def darker(image: Image.Image) -> torch.Tensor:
        return model.preprocess(image) - 0.1

    other = embed.features_identity(model._replace(preprocess=darker), "a", "fp32")
    assert {name for name in identity if identity[name] != other[name]} == {"preprocessing"}


def sample(key: str, **texts: bytes) -> list[tuple[str, bytes]]:
    members = {"jpg": jpeg(), "txt": b"a text", **texts}
    return [(f"{key}.{extension}", content) for extension, content in members.items()]


def files(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def test_several_captions_have_no_one_feature(
    run: str, make_shard: MakeShard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_shard(members=sample("7", json=b'{"captions": ["one", "two"]}'))
    command = f"embed shards {shard} --model {run} -o {tmp_path}/out --workers 0".split()
    assert main(command) == 1
    assert "7 has 2 captions, and a teacher's features are of one text" in capsys.readouterr().err
    assert not (tmp_path / "out" / shard.name).exists()
    assert main([*command[:2], "scenes", *command[3:]]) == 1
    assert "scenes are no shards" in capsys.readouterr().err


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


def test_modes_of_submodules_are_restored() -> None:
    from fastclip.evaluate.features import evaluating

    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("damage", ["shorter", "of other rows"])
def test_a_damaged_file_is_begun_again(damage: str, tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(6, 2)

    def batches(start: int, stop: int = 6) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(start, stop, 2):
            if first == 4 and stop == 5:
                raise KeyboardInterrupt
            yield first, rows[first : first + 2]

    work = embed.Embedding(tmp_path / "a.npy", 6, {})
    work.faults.add([Fault("shard not fetched", "s3://a/0.tar")])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed, "SAVE_EVERY_BATCHES", 1)
        work.run(partial(batches, stop=5), progress=False)
    again = embed.Embedding(tmp_path / "a.npy", 6, {})
    assert again.done() == 4
    whole = again.partial.read_bytes()
    if damage == "shorter":
        again.partial.write_bytes(whole[:-4])
    else:
        np.save(tmp_path / "b.npy", np.zeros((5, 2), np.float32))
        (tmp_path / "b.npy").rename(again.partial)
    assert again.done() == 0
    again.partial.write_bytes(whole)
    # what went wrong before is remembered
    again.run(batches, progress=False)
    assert again.faults.counts == {"shard not fetched": 1}
    assert np.array_equal(np.load(tmp_path / "a.npy"), rows.numpy())
