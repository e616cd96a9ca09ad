"""Writing never goes through a link that lay there before."""

import ast
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fastclip.atomic import append, partial_of, write_folder, write_text, writing
from fastclip.cli import main
from fastclip.data.corrupt import _copy_beside
from fastclip.data.editing import Journal, claim_folder
from fastclip.data.imagenet_captions import convert_imagenet_captions
from fastclip.data.remote import ShardCache
from fastclip.evaluate.embed import Embedding
from fastclip.evaluate.results import read_result, write_result
from fastclip.models import checkpoint
from fastclip.models.convert import export_open_clip
from fastclip.study import report, runs
from fastclip.train.config import TrainConfig
from fastclip.train.log import RunLog, plot_loss
from tests.conftest import jpeg, write_tar

PACKAGE = Path(__file__).parents[1] / "fastclip"
# what writes otherwise than through fastclip.atomic, and why that is safe
WRITE_THEMSELVES = {
    "atomic.py": "it is what the others write through",
    "data/corrupt.py": "a tar inside a file of fastclip.atomic's",
    "data/remote.py": "files that mkstemp has just made",
    "data/writing.py": "shards are opened with x, which makes new files only",
    "models/lm_tokenizer.py": "its caller gives a folder that was just made",
    "models/sharded.py": "a folder that was just made",
    "study/recipe.py": "a tar inside a file of fastclip.atomic's",
}


def log_metrics(folder: Path) -> None:
    log = RunLog(folder, 0, TrainConfig.from_flat(report_to="none", log_sample_ids=True))
    for step in (1, 2):
        log.metrics(step, {"loss": 1.0})
        log.samples(step, ["a"])
    log.close()
    plot_loss(folder)


def convert_entries(folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source"
    (source / "n00000001").mkdir(parents=True)
    (source / "n00000001" / "a.jpg").write_bytes(jpeg())
    entry = '[{"filename": "a.jpg", "wnid": "n00000001", "title": "a", "tags": []}]'
    (source / "a.json").write_text(entry)
    convert_imagenet_captions(source / "a.json", folder, source)


def copy_beside(folder: Path) -> None:
    source = folder.parent / f"{folder.name}-source"
    source.mkdir()
    (source / "classes.txt").write_text("a\n")
    _copy_beside(str(source / "s.tar"), folder)


def export(folder: Path) -> None:
    run = folder.parent / f"{folder.name}-run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint.write(run / "checkpoints" / "a.pt", {"step": 1, "state_dict": {}})
    (run / "open_clip_config.json").write_text("{}")
    export_open_clip(run, folder / "a.pt")


def check_data(folder: Path) -> None:
    main(["check-data", str(write_tar(folder / "s.tar", [("a.jpg", jpeg()), ("a.txt", b"a")]))])


def study(folder: Path) -> None:
    outcome = runs.Outcome("a", (), 1.0, 1.0, 1.0, {"accuracy": 0.5}, {})
    report.write(folder, "title", [("a", [outcome])], {"accuracy": "accuracy"}, [])


def result(path: Path, named: bool = False) -> None:
    about = {"dataset": "d", "model": "m", "pretrained": "p", "task": "t"}
    write_result(path, **about, metrics={}, named=named)


WRITERS: dict[str, Callable[[Path], object]] = {
    "result": lambda folder: result(folder / "a.json"),
    "log": log_metrics,
    "journal": lambda folder: Journal(folder / "a.tar").begin({"a": 1}),
    "folder's identity": lambda folder: claim_folder(folder, "a.json", {"a": 1}, []),
    "classes": convert_entries,
    "beside": copy_beside,
    "export": export,
    "check-data": check_data,
    "study": study,
    "study's run": lambda folder: runs.train("a", (), folder),
    "foreign": lambda folder: write_folder(folder, lambda made: (made / "a").write_text("new")),
}


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_no_file_is_written_through_a_link(
    name: str, dangling: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the process that a study starts writes nothing here
    monkeypatch.setattr(sys, "executable", "/bin/true")
    first, second, precious = (tmp_path / part for part in ("first", "second", "precious"))
    for folder in (first, second, precious):
        folder.mkdir()
    WRITERS[name](first)
    written = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert written
    for number, path in enumerate(written):
        target = precious / str(number)
        if not dangling:
            target.write_text("kept")
        (second / path).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".tar":
            (second / path).symlink_to(target)
    # what refuses a link is as good as what replaces it
    with suppress(ValueError, OSError):
        WRITERS[name](second)
    found = {path.name: path.read_text() for path in precious.iterdir()}
    assert found == ({} if dangling else {str(i): "kept" for i in range(len(written))})


def test_a_link_under_a_name_that_the_user_gave_is_followed(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg()), ("a.txt", b"a")])
    output, link = tmp_path / "output", tmp_path / "link.png"
    link.symlink_to(output)
    result(link, named=True)
    assert read_result(output)["dataset"] == "d"
    assert main(["check-data", str(shard), "--json", str(link)]) == 0
    assert '"good": 1' in output.read_text()
    assert main(["data", "preview", "scenes", "--count", "1", "-o", str(link)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert link.is_symlink()


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    log_metrics(tmp_path / "run")
    checkpoint.write(tmp_path / "run" / "a.pt", {"step": 1, "state_dict": {}})
    assert checkpoint.find_latest(tmp_path / "disk") == tmp_path / "disk" / "a.pt"
    assert (tmp_path / "disk" / "loss.png").is_file() and (tmp_path / "run").is_symlink()


def test_what_is_no_regular_file_is_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "link", Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{path} is not a regular file"):
            append(path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_could_not_be_written_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("kept")
    with pytest.raises(OSError, match="full"), writing(path) as file:
        file.write(b"new")
        raise OSError("full")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "kept"}


def test_nothing_in_the_package_writes_otherwise() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _writes(node)
    }
    assert found == set(WRITE_THEMSELVES)


def _writes(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("write_bytes", "copyfile", "copy2", "copytree", "save_pretrained"):
        return True
    # a method of Path, not the function of this name
    if name == "write_text":
        return isinstance(call.func, ast.Attribute)
    # the first argument is the file's name, or that of fastclip.atomic.writing
    if name == "savefig":
        return getattr(call.args[0], "id", "") != "file"
    texts = [a.value for a in [*call.args, *(k.value for k in call.keywords)] if _is_text(a)]
    return name == "open" and any(set(text) <= set("wax+bt") for text in texts if text)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_texts_and_checkpoints(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("a.txt", "b.pt", "b.json"):
        partial_of(tmp_path / name).symlink_to(precious)
    write_text(tmp_path / "a.txt", "new")
    checkpoint.write(tmp_path / "b.pt", {"step": 1, "state_dict": {}})
    assert precious.read_text() == "kept"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not any((tmp_path / name).is_symlink() for name in ("a.txt", "b.pt", "b.json"))
    assert checkpoint.find_latest(tmp_path) == tmp_path / "b.pt"


def test_features(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    work = Embedding(tmp_path / "a.npy", 1, {})
    work.partial.symlink_to(precious)
    with pytest.raises(ValueError, match="is a link"):
        work.run(lambda start: iter(()), progress=False)
    assert precious.read_text() == "kept"


def test_locks_and_the_cache_folder(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg())])
    precious = tmp_path / "precious"
    precious.write_text("kept")
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    cache.open(f"file://{source}").close()
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for file in list(cache.folder.iterdir()):
        file.unlink()
        if file.name.startswith(".lock"):
            file.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        cache.open(f"file://{source}")
    assert precious.read_text() == "kept"
