"""The list of seeded faults fits the sources: each can be put in, and its tests are there."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_repo_shape import ROOT

FOLDER = ROOT / "tests" / "mutants"


@pytest.fixture
def run() -> Iterator[Any]:
    """The script, which imports its neighbors by their names."""
    before = {*sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(FOLDER))
        for name in {path.stem for path in FOLDER.glob("*.py")} - before:
            sys.modules.pop(name, None)


def test_each_fault_can_be_put_in(run: Any) -> None:
    assert len(run.MUTANTS) > 300
    assert len({mutant[:3] for mutant in run.MUTANTS}) == len(run.MUTANTS)
    for mutant in run.MUTANTS:
        # once, or it raises
        text = run.mutated(mutant, ROOT)
        assert text != (ROOT / mutant.file).read_text(), mutant


def test_their_tests_are_there(run: Any) -> None:
    for tests in {mutant.tests for mutant in run.MUTANTS}:
        files = tests.split(" -k ")[0].split()
        assert files and all((ROOT / file).is_file() for file in files), tests


def test_a_fault_that_fits_no_more_is_refused(run: Any, tmp_path: Path) -> None:
    mutant = next(iter(run.MUTANTS))._replace(file="a.py", old="old", new="new")
    for text in ("", "old old"):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(ValueError, match=f"occurs {text.count('old')} times; it must once"):
            run.mutated(mutant, tmp_path)
