"""`fastclip convert imagenet-captions`: Flickr texts joined to photographs that are there."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fastclip.cli import main
from fastclip.data.imagenet_captions import clean_text
from fastclip.data.shards import ShardSource
from tests.conftest import jpeg

DOG, CAT, FISH = "n02084071", "n02121620", "n01440764"


def entry(name: str, wnid: str = DOG, title: object = "A title", **texts: object) -> dict:
    return {"filename": name, "wnid": wnid, "title": title, "description": "", "tags": [], **texts}


def test_captions_labels_and_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "train", tmp_path / "out"
    # the fish's folder is there without an entry, the cat has one without a folder
    for name in (f"{DOG}/{DOG}_1.JPEG", f"{FISH}/unused.JPEG", "flat.JPEG", f"{DOG}/bad.JPEG"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"broken" if "bad" in name else jpeg((len(name), 0, 0)))
    (root / "not-a-class").mkdir()
    two = BytesIO()
    picture = Image.new("RGB", (16, 16))
    picture.save(two, "MPO", save_all=True, append_images=[picture])
    (root / DOG / "two.JPEG").write_bytes(two.getvalue())
    html = 'See <a href="x">my\n\t dog</a> &amp; me &lt;3<br/>here'
    entries = [
        entry(
            f"{DOG}_1.JPEG", title="Rex ", description=html, tags=["dog", " <b>big</b>\tone ", ""]
        ),
        entry("flat.JPEG", CAT, None, tags=["half\ud800", 7]),
        entry("two.JPEG"),
        entry("bad.JPEG"),
        entry("gone.JPEG"),
        entry("empty.JPEG", title=" <p> ", description=None, tags="no list"),
        entry("../flat.JPEG"),
        entry("x.JPEG", "dog"),
        "no entry",
    ]
    source = tmp_path / "imagenet_captions.json"
    source.write_text(json.dumps(entries))
    words = ["convert", "imagenet-captions", str(source), str(out), "--image-root", str(root)]
    assert main([*words, "--per-shard", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out)
    assert "imagenet_captions: 3 samples in 2 shards" in printed.err
    for message in (
        "1 corrupt image",
        "1 missing image file",
        "1 empty caption",
        "3 entry without image",
        "imagenet_captions.json:n02084071/gone.JPEG",
        "imagenet_captions.json, number 6",
    ):
        assert message in printed.err
    # folders and entries together, in the order of their ids
    assert (out / "classes.txt").read_text().split() == [FISH, DOG, CAT]
    assert json.loads((out / "sizes.json").read_text()) == {
        "imagenet_captions-00000.tar": 2,
        "imagenet_captions-00001.tar": 1,
    }
    with tarfile.open(out / "imagenet_captions-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    first = f"00000000_{DOG}_1"
    assert members[f"{first}.jpg"] == (root / DOG / f"{DOG}_1.JPEG").read_bytes()
    description = "See my dog & me <3 here"
    assert members[f"{first}.txt"].decode() == f"Rex {description} dog big one"
    assert json.loads(members[f"{first}.json"]) == {
        "title": "Rex",
        "description": description,
        "tags": ["dog", "big one"],
        "wnid": DOG,
        "filename": f"{DOG}_1.JPEG",
    }
    assert members[f"{first}.cls"] == b"1" and members["00000001_flat.cls"] == b"2"
    assert members["00000001_flat.txt"] == b"half"
    shards = ShardSource(f"{out}/imagenet_captions-{{00000..00001}}.tar", captions=("tags", "txt"))
    assert shards.read(0, 0).captions["tags"] == ("dog", "big one")
    assert shards.read(1, 0).texts == ("A title",) and shards.read(1, 0).label == 1

    assert main(words) == 1
    assert "exists" in capsys.readouterr().err
    words[3] = str(tmp_path / "out2")
    assert main([*words, "--caption-parts", "tags, title"]) == 0
    assert "2 samples" not in capsys.readouterr().err
    again = ShardSource(f"{tmp_path}/out2/imagenet_captions-00000.tar")
    assert again.read(0, 0).texts == ("dog big one Rex",)
    assert main([*words, "--caption-parts", "title,comments"]) == 1
    assert "--caption-parts title,comments: give some of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "give imagenet_captions.json"),
        ("{}", "(no list): give imagenet_captions.json"),
        ("[]", "holds no sample"),
        (json.dumps([entry("gone.JPEG")]), "relative paths were tried in"),
    ],
)
def test_files_that_are_not_the_data_set(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(content)
    words = ["convert", "imagenet-captions", f"{tmp_path}/c.json", f"{tmp_path}/out"]
    assert main([*words, "--image-root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--image-root", f"{tmp_path}/none"]) == 1
    assert "none does not exist or is not a folder" in capsys.readouterr().err


def test_texts_on_one_line() -> None:
    for text, cleaned in (
        ("a < b > c", "a < b > c"),
        ("<!-- hidden <b> -->x<br>y", "x y"),
        ("&lt;i&gt;so&lt;/i&gt; &#233;t&eacute;", "so été"),
        ("i <3 u", "i <3 u"),
        (None, ""),
        (["x"], ""),
    ):
        assert clean_text(text) == cleaned
