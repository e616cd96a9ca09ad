"""What mypy is shown: every module, under the name it is imported by."""

import sys
from pathlib import Path

import pytest

from tests.test_repo_shape import ROOT, SOURCES, module_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_every_module_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "build_tools")
    import check_types

    check_types.link_package(tmp_path)
    # glob does not follow a link to a folder
    folders = [tmp_path / "fastclip", *(p for p in (tmp_path / "fastclip").iterdir() if p.is_dir())]
    linked = {path for folder in folders for path in folder.rglob("*.py")}
    names = {".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in linked}
    names = {name.removesuffix(".__init__") for name in names}
    assert {module_of(path) for path in SOURCES} == names - {"fastclip"}


def test_the_test_command_checks_types() -> None:
    assert '"$bin/python" build_tools/check_types.py' in (ROOT / "run").read_text()


def test_operators_and_losses_are_checked_strictly() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    (strict,) = [o for o in settings["overrides"] if o.get("disallow_untyped_defs")]
    assert strict["module"] == ["fastclip.functional.*", "fastclip.losses.*", "fastclip.ops.*"]
    assert not any("ignore_errors" in override for override in settings["overrides"])
