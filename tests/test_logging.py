"""Messages go through one logger, which belongs to the program that imports the package."""

import ast
import logging
import multiprocessing
import multiprocessing.forkserver
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastclip.cli import main
from fastclip.messages import logger, note, shown
from tests.test_repo_shape import ROOT, SOURCES

# a rank that hangs may hold the logger's lock: its watch, which ends it, prints its last words
EXCEPTIONS = {"fastclip/train/watch.py": 1}


def prints_to_stderr(path: Path) -> int:
    """The calls of print with a file, and of writing methods of sys.stderr."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id == "print"
            to_stderr = any("stderr" in ast.unparse(k.value) for k in node.keywords)
            written = ast.unparse(node.func).startswith("sys.stderr.write")
            count += (named and to_stderr) or written
    return count


def test_nothing_is_printed_on_standard_error() -> None:
    found = {str(path.relative_to(ROOT)): prints_to_stderr(path) for path in SOURCES}
    assert {name: count for name, count in found.items() if count} == EXCEPTIONS


def test_the_library_configures_nothing_and_says_nothing(tmp_path: Path) -> None:
    code = """
import logging, pkgutil, fastclip
before = logging.root.level, list(logging.root.handlers)
import fastclip.data.sources, fastclip.evaluate.features, fastclip.losses, fastclip.train.loop
logger = logging.getLogger("fastclip")
assert not logger.handlers and logger.level == logging.NOTSET and logger.propagate
assert before == (logging.root.level, list(logging.root.handlers))
from fastclip.messages import note
note("seen without a handler")
logger.info("progress is not")
logger.setLevel(logging.ERROR)
note("silenced")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("W", "  warn"))]
    assert lines == ["note: seen without a handler"]


def test_the_command_line_shows_messages_as_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(options: list[str]) -> int:
        logger.info("50 % done")
        note("a\x1b[2J, https://user:secret@host/a.tar")
        print("result")
        raise ValueError("bad input")

    monkeypatch.setattr("fastclip.cli.info.main", command)
    assert main(["info"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert captured.err.splitlines() == [
        "50 % done",
        r"note: a\x1b[2J, https://***@host/a.tar",
        "fastclip info: error: bad input",
    ]
    assert not logger.handlers and logger.propagate and logger.level == logging.NOTSET


def test_a_programs_own_handler_receives_everything(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with shown():
            note("once")
    finally:
        logger.removeHandler(handler)
    assert [(r.levelno, r.getMessage()) for r in records] == [(logging.WARNING, "note: once")]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_what_all_ranks_know_the_first_says(
    rank: str, count: int, monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    note("the same on all ranks")
    logger.warning("this rank's own")
    assert logged().splitlines() == ["note: the same on all ranks"] * count + ["this rank's own"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_is_heard(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    # one that was started by another test has that test's standard error
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    context = multiprocessing.get_context(method)
    with shown():
        worker = context.Process(target=note, args=("from a worker",))
        worker.start()
        worker.join()
    assert worker.exitcode == 0
    assert "note: from a worker" in capfd.readouterr().err.splitlines()
