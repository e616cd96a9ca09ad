"""`fastclip convert recaption`: shards copied with captions by tiny models of transformers."""

import fcntl
import json
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.cli import main
from fastclip.data.editing import folders_of
from fastclip.data.recaption import (
    CHAT_PROMPT,
    Captioner,
    CaptionOptions,
    fill_prompt,
    recaption_shards,
)
from fastclip.data.shards import ShardSource
from tests.conftest import jpeg
from tests.processes import Forked

transformers = pytest.importorskip("transformers")

WORDS = "a photo of the red green blue dog cat title alt text caption number on it . : - one two"
LENGTH = 8


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A captioner of two layers and random weights, that continues a text."""
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS.split()]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    # large weights, so that what an image or a text makes of them differs from the next
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 1.0,
    }
    text = {
        **tower,
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {**tower, "image_size": 32, "patch_size": 16}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    model = transformers.BlipForConditionalGeneration(config)
    for name, parameter in model.text_decoder.cls.named_parameters():
        if name.endswith("bias") and len(parameter) == len(words):
            # no caption ends before its time
            parameter.data[:6] = -1e4
    model.save_pretrained(folder)
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model of two layers and random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [*special, "USER", "ASSISTANT", *WORDS.split(), "The", "Describe", "image"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    tower = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = transformers.CLIPVisionConfig(
        **tower, image_size=32, patch_size=16, initializer_factor=5.0
    )
    text = transformers.LlamaConfig(
        **tower, vocab_size=len(words), bos_token_id=1, eos_token_id=2, initializer_range=1.0
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }} : "
        "{% for part in message['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT :{% endif %}"
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def noise(number: int) -> bytes:
    """A JPEG unlike any other number's."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(file, "JPEG")
    return file.getvalue()


def samples(count: int) -> list[tuple[str, bytes]]:
    """Members of samples with prompts of several lengths."""
    members = []
    for i in range(count):
        words = " ".join(WORDS.split()[i % 5 : 2 * (i % 5) + 1])
        described = {"title": "red cat" if i % 2 else None, "width": 1.10}
        members += [(f"{i:04d}.jpg", noise(i)), (f"{i:04d}.txt", words.encode())]
        members.append((f"{i:04d}.json", json.dumps(described).encode()))
    return members


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def options(model: str, **changes) -> CaptionOptions:
    return CaptionOptions(**{"model": model, "batch_size": 4, "max_new_tokens": LENGTH, **changes})


def run(*words: object) -> int:
    flags = ["--batch-size", "4", "--max-new-tokens", str(LENGTH), "--device", "cpu"]
    return main(["convert", "recaption", *map(str, words), *flags])


def test_all_members_are_kept_and_every_fault_is_reported(
    blip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 9)).save(png, "PNG")
    # not as json.dumps would write it, with a number that a float does not hold
    spaced = b'{\n "title" : "cat",\n "exact": 0.10000000000000000001, "ugly": "\\ud800" \n}\n'
    members = [
        ("__notes.json", b'{"of": "the whole shard"}'),
        ("a/0000.jpg", noise(0)),
        ("a/0000.txt", b"red dog"),
        ("a/0000.json", spaced),
        ("a/0000.cls", b"7"),
        ("1.seg.png", b"a mask"),
        ("1.png", png.getvalue()),
        ("2.jpg", noise(2)),
        ("2.json", b'{"title": "cut off'),
        ("2.txt", b"dog"),
        ("3.jpg", noise(3)[:200]),
        ("3.json", b"{}"),
        ("4.jpg", jpeg(size=2)),
        ("5.jpg", noise(5)),
        ("5.json", b'{"recaption": "by hand"}'),
        ("6.txt", b"without image"),
        ("7.jpg", noise(7)),
        ("7.txt", b"\xff\xfe"),
        ("7.json", b"{}"),
        ("8.jpg", noise(8)),
        ("8.json", b"[1]"),
        ("long" * 60 + "ü.jpg", noise(9)),
    ]
    source, out = tmp_path / "in" / "s.tar", tmp_path / "out"
    source.parent.mkdir()
    with tarfile.open(source, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            # which takes an extended header, as webdataset's writer makes them
            info.mtime = 1.5
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    before = source.read_bytes()
    assert run(source, out, "--model", blip) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out)
    assert "4 captions for 9 samples in 1 shard" in printed.err
    for reported in (
        "2 damaged JSON",
        "1 corrupt image",
        "1 image too small",
        "1 has the key already",
        "1 sample without image",
        f"{source}:2.json",
    ):
        assert reported in printed.err
    assert source.read_bytes() == before
    written = members_of(out / "s.tar")
    captioned = ["a/0000.json", "1.json", "7.json", "long" * 60 + "ü.json"]
    made = {name: json.loads(content) for name, content in written if name in captioned}
    assert list(made) == captioned
    assert [m for m in written if m[0] not in made] == [m for m in members if m[0] not in made]
    # where there was none, it comes after the sample's last member
    order = [name for name, _ in written]
    assert order.index("1.json") == order.index("1.png") + 1 and order[-1] == captioned[-1]
    text = made["a/0000.json"]["recaption"]
    assert text and text == " ".join(text.split()) and not text.startswith("title")
    added = b', "recaption": ' + json.dumps(text).encode() + b"}"
    assert dict(written)["a/0000.json"] == spaced.rstrip()[:-1].rstrip() + added
    assert list(made["1.json"]) == list(made["7.json"]) == ["recaption"]
    with tarfile.open(out / "s.tar") as tar:
        assert tar.getmember("a/0000.json").mtime == 1.5
    # samples without KEY.txt are no samples to who needs it, so that there is no one count
    assert sorted(os.listdir(out)) == ["recaption.json", "s.tar"]
    assert ShardSource(str(out / "s.tar")).counts == (3,)
    trained = ShardSource(str(out / "s.tar"), captions=("recaption",))
    assert trained.read(0, 0).texts == (text,)


def run_slowly(*words: str) -> None:
    """It might else be done before the kill comes."""
    original = Captioner.captions

    def captions(*given: Any) -> Any:
        time.sleep(0.1)
        return original(*given)

    Captioner.captions = captions  # type: ignore[method-assign]
    run(*words)


def test_killed_and_taken_up_again_gives_the_same_bytes(
    blip: str, make_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard("s.tar", samples(240))
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert run(shard, straight, "--model", blip) == 0
    journal = out / "s.tar.journal"
    process = Forked(run_slowly, str(shard), str(out), "--model", blip)
    try:
        until = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "s.tar").exists()
    kept = journal.read_bytes().splitlines(keepends=True)
    # as if the kill had come in the midst of a line
    journal.write_bytes(b"".join(kept[:-1]) + kept[-1][:9])
    done_before = {key for line in kept[1:-1] for key in json.loads(line)["captions"]}
    assert 0 < len(done_before) < 240
    captioned = []
    original = Captioner.captions

    def counted(self, images, *arguments):
        captioned.extend(images)
        return original(self, images, *arguments)

    monkeypatch.setattr(Captioner, "captions", counted)
    assert run(shard, out, "--model", blip) == 0
    assert len(captioned) == 240 - len(done_before)
    assert (out / "s.tar").read_bytes() == (straight / "s.tar").read_bytes()
    texts = {json.loads(c)["recaption"] for n, c in members_of(out / "s.tar") if "json" in n}
    assert len(texts) > 20
    # a shard that is there is not touched again
    stamp = (out / "s.tar").stat().st_mtime_ns
    assert run(shard, out, "--model", blip) == 0
    assert len(captioned) == 240 - len(done_before)
    assert (out / "s.tar").stat().st_mtime_ns == stamp
    # a kill may come between the two as well
    journal.write_bytes(kept[0])
    assert run(shard, out, "--model", blip) == 0 and not journal.exists()


def test_changed_settings_are_noticed(
    blip: str,
    make_shard: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard, out = make_shard("s.tar", samples(9)), tmp_path / "out"

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # stopped before the first caption
        patch.setattr(Captioner, "captions", stop)
        assert run(shard, out, "--model", blip) == 1
    assert run(shard, out, "--model", blip, "--prompt", "{alt_text} is") == 1
    error = capsys.readouterr().err
    assert "prompt was 'Title: {title}." in error and "is '{alt_text} is'" in error
    # the journal is bound to the shard it was begun from
    other = make_shard("s.tar", samples(10))
    assert run(other, out, "--model", blip) == 1
    error = capsys.readouterr().err
    assert "sha256 of 64 KiB was" in error and "delete it to begin the shard anew" in error
    (out / "s.tar.journal").unlink()
    # what only rounds otherwise may change
    assert recaption_shards(str(other), out, options(blip, batch_size=2), device="cpu").shards == 1


def test_nothing_is_overwritten(
    blip: str, make_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_shard("s.tar", samples(2))
    content = shard.read_bytes()
    assert run(shard, tmp_path, "--model", blip) == 1
    assert f"{shard} exists and is not overwritten" in capsys.readouterr().err
    assert shard.read_bytes() == content
    (tmp_path / "b").mkdir()
    make_shard("b/s.tar", samples(3))
    assert run(f"{tmp_path}/s.tar::{tmp_path}/b/s.tar", tmp_path / "out", "--model", blip) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "two shards of" in error and "two commands, with a folder for each" in error
    assert not (tmp_path / "out").exists()
    # nor is one taken for the other where they come one after the other
    assert run(shard, tmp_path / "out", "--model", blip) == 0
    written = (tmp_path / "out" / "s.tar").read_bytes()
    assert run(tmp_path / "b" / "s.tar", tmp_path / "out", "--model", blip) == 1
    assert f"folders was ['{tmp_path}'] and is ['{tmp_path}/b']" in capsys.readouterr().err
    assert (tmp_path / "out" / "s.tar").read_bytes() == written


def test_folders_of_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["b/1.tar", f"{tmp_path}/b/2.tar", "../x.tar", "s3://bucket/deep/1.tar"]
    names += ["https://user:secret@h:80/d/1.tar?Signature=secret", "https://h:80/d/2.tar"]
    assert folders_of(names) == sorted(
        [f"{tmp_path}/b", str(tmp_path.parent), "https://h:80/d", "s3://bucket/deep"]
    )


def test_processes_share_the_shards(
    blip: str, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    for i in range(3):
        make_shard(f"{i}.tar", samples(3))
    pattern, out = f"{tmp_path}/{{0..2}}.tar", tmp_path / "out"
    recaption_shards(str(tmp_path / "0.tar"), out, options(blip), device="cpu")
    with (out / "1.tar.journal").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = recaption_shards(pattern, out, options(blip), device="cpu")
    assert (done.finished, done.busy, done.shards, done.captions) == (1, 1, 1, 3)
    done = recaption_shards(pattern, out, options(blip), device="cpu")
    assert (done.finished, done.busy, done.shards) == (2, 0, 1)
    sizes = json.loads((out / "sizes.json").read_text())
    assert sizes == {"0.tar": 3, "1.tar": 3, "2.tar": 3}


def test_an_empty_answer_is_counted_and_left_out(
    blip: str, make_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard("s.tar", samples(3))
    monkeypatch.setattr(Captioner, "captions", lambda self, images, *rest: [""] * len(images))
    done = recaption_shards(str(shard), tmp_path / "out", options(blip), device="cpu")
    assert done.captions == 0 and done.faults.summary() == "3 empty answer"
    assert members_of(tmp_path / "out" / "s.tar") == members_of(shard)


def test_prompts_leave_out_what_is_not_there() -> None:
    template = 'It is called "{title}." Alt-text: {alt_text}!\nDescribe it, please.'
    full = 'It is called "a. b." Alt-text: {title}!\nDescribe it, please.'
    assert fill_prompt(template, {"title": "a. b", "alt_text": "{title}"}) == full
    assert fill_prompt(template, {"title": "", "alt_text": "x"}).startswith("Alt-text: x!\n")
    assert fill_prompt(template, {"title": "", "alt_text": ""}) == "Describe it, please."
    assert fill_prompt("{alt_text}", {"title": "", "alt_text": ""}) == ""
    assert fill_prompt(CHAT_PROMPT, {"title": "", "alt_text": ""}).startswith("Describe the image")


def test_options_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    for name, value, reported in (
        ("batch_size", 0, "give at least 1"),
        ("temperature", -1.0, "give 0 or more"),
        ("prompt", "{caption}", "--prompt names {caption}"),
    ):
        with pytest.raises(ValueError, match=re.escape(reported)):
            CaptionOptions(**{"model": "m", name: value})
    with pytest.raises(SystemExit):
        main(["convert", "recaption", "--help"])
    shown = capsys.readouterr().out
    assert "SHARDS" in shown and "{alt_text} stands for KEY.txt" in shown


def test_a_batch_gives_what_single_images_give(blip: str) -> None:
    """BLIP takes padding for text, so prompts of one length must not change by company."""
    captioner = Captioner(options(blip), torch.device("cpu"))
    images = [Image.open(BytesIO(noise(i))).convert("RGB") for i in range(3)]
    prompts = [captioner.prompt(text, "") for text in ("red dog", "blue cat", "the title")]
    together = captioner.captions(images, prompts, 0)
    alone = [
        captioner.captions([image], [prompt], 0)[0]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert together == alone and len(set(together)) == 3
    # the model repeats the prompt, which is no part of the caption
    output = captioner.model.generate(**captioner._inputs(images, prompts), max_new_tokens=LENGTH)
    for text, prompt, caption in zip(
        captioner.tokenizer.batch_decode(output, skip_special_tokens=True),
        ("red dog", "blue cat", "the title"),
        together,
        strict=True,
    ):
        assert text.removeprefix("[DEC] ").startswith("alt - text") and text.endswith(
            f"{prompt}. a photo of {caption}"
        )


def test_web_texts_cannot_pass_for_tokens(blip: str) -> None:
    captioner = Captioner(options(blip, prompt="{alt_text} {title}"), torch.device("cpu"))
    assert (
        captioner.prompt("a [SEP] b <image>\n\tc", "\ud800 x" + "y" * 999) == "a b c x" + "y" * 199
    )


def test_a_chat_model_is_asked(llava: str, make_shard: Callable[..., Path], tmp_path: Path) -> None:
    captioner = Captioner(options(llava), torch.device("cpu"))
    images = [Image.open(BytesIO(noise(i))).convert("RGB") for i in range(2)]
    prompts = [captioner.prompt("red dog", "<image> cat"), captioner.prompt("", "")]
    inputs = captioner._inputs(images, prompts)
    asked = captioner.tokenizer.batch_decode(inputs["input_ids"])
    # one beginning each, four patches, padding before and an answer to be given behind
    assert all(text.count("<s>") == 1 and text.count("<image>") == 4 for text in asked)
    assert asked[1].startswith("<pad>") and "red dog" in asked[0] and "cat" in asked[0]
    assert all(text.endswith("ASSISTANT :") for text in asked)
    together = captioner.captions(images, prompts, 0)
    alone = [captioner.captions([images[i]], [prompts[i]], 0)[0] for i in range(2)]
    output = captioner.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
    answers = output[:, inputs["input_ids"].shape[1] :]
    decoded = captioner.tokenizer.batch_decode(answers, skip_special_tokens=True)
    assert together == alone == [text.strip() for text in decoded]
    done = recaption_shards(
        str(make_shard("s.tar", samples(7))), tmp_path / "out", options(llava), device="cpu"
    )
    assert 0 < done.captions == 7 - done.faults.counts["empty answer"]


def test_drawn_captions_depend_on_the_seed_and_the_batches(
    blip: str, make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    shard = make_shard("s.tar", samples(8))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        chosen = options(blip, temperature=1.0, seed=seed)
        recaption_shards(str(shard), tmp_path / name, chosen, device="cpu")
    a, b, c = ((tmp_path / name / "s.tar").read_bytes() for name in "abc")
    assert a == b != c
    # and on which images are captioned together
    other = options(blip, temperature=1.0, seed=1, batch_size=2)
    with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
        recaption_shards(str(shard), tmp_path / "a", other, device="cpu")


def test_models_that_do_not_fit(
    blip: str,
    make_shard: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = make_shard("s.tar", samples(1))
    assert run(shard, tmp_path / "out", "--model", tmp_path / "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(shard, tmp_path / "out", "--model", blip) == 1
    assert "needs the package 'transformers'" in capsys.readouterr().err
