"""What comes from files and URLs moves no cursor and reveals no secret."""

import json
from pathlib import Path

import pytest

from fastclip.cli import main
from fastclip.data.index import Fault
from fastclip.messages import note
from fastclip.printable import printable
from tests.conftest import jpeg

TITLE = "\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (TITLE, r"\x1b]0;owned\x07\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("two\n\tlines", "two\n\tlines"),
        ("a\rb", r"a\rb"),
        ("gpj.\u202etxt", r"gpj.\u202etxt"),
        ("\udcff.jpg", r"\udcff.jpg"),
        ("Müller’s 狗.jpg", "Müller’s 狗.jpg"),
        ("https://user:se@cret@host/a@b.tar", "https://***@host/a@b.tar"),
        ("s3://token@bucket/x, ftp://u:p@h", "s3://***@bucket/x, ftp://***@h"),
        ("a 'https://h/0.tar?X-Signature=ab&c=d' b?", "a 'https://h/0.tar?***' b?"),
        ("https://host/a@b.tar", "https://host/a@b.tar"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_faults_and_notes_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    assert str(Fault(TITLE, TITLE, TITLE)).isprintable()
    # a file's name begins no line of its own
    assert str(Fault("corrupt image", "a\nepoch 3: done")) == r"corrupt image: a\nepoch 3: done"
    note(TITLE)
    assert caplog.messages == [r"note: \x1b]0;owned\x07\x1b[2J"]


def hostile(kind: str, folder: Path) -> str:
    """Data of which every second image is missing, under a name that sets a terminal's title."""
    (folder / "a.jpg").write_bytes(jpeg())
    missing = f"gone{TITLE}.jpg"
    if kind == "csv":
        path = folder / "t.csv"
        path.write_text(f"filepath\ttitle\na.jpg\tx\n{missing}\ty\n")
        return str(path)
    if kind == "coco":
        path = folder / "c.json"
        names = enumerate(["a.jpg", missing])
        images = [{"id": number, "file_name": name} for number, name in names]
        texts = [{"image_id": number, "caption": "x"} for number in range(2)]
        path.write_text(json.dumps({"images": images, "annotations": texts}))
        return str(path)
    classes = folder / "classes"
    (classes / f"dog{TITLE}").mkdir(parents=True)
    (classes / f"dog{TITLE}" / "a.jpg").write_bytes(jpeg())
    (classes / f"dog{TITLE}" / "b.jpg").write_bytes(b"no image")
    return str(classes)


@pytest.mark.parametrize(
    ("command", "kind"),
    [(c, k) for c in ("preview", "convert") for k in ("csv", "coco", "folders")][:-1],
)
def test_names_in_data_reach_no_terminal_raw(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = hostile(kind, tmp_path)
    if command == "preview":
        main(["data", "preview", data, "-o", str(tmp_path / "sheet.png")])
    else:
        main(["convert", kind, data, str(tmp_path / "out")])
    message = capsys.readouterr()
    assert r"\x1b]0;owned" in message.err
    assert "\x1b]" not in message.out + message.err and "\x07" not in message.out + message.err


def test_an_error_is_printable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text(f"filepath{TITLE}\nx\n" + "a\tb\n")
    assert main(["data", "preview", str(tmp_path / f"{TITLE}.csv")]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert main(["data", "preview", "nosuch://user:secret@host/a.tar"]) == 1
    message = capsys.readouterr().err
    assert "secret" not in message and "***@host" in message
