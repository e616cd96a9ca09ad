"""The workflows call the scripts that are here, for the versions that the package supports."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_repo_shape import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read(name: str) -> dict[str, Any]:
    # YAML 1.1 reads the key "on" as true
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def commands(workflow: dict[str, Any]) -> list[str]:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def test_each_kind_is_there() -> None:
    assert [path.stem for path in WORKFLOWS] == ["nightly", "pages", "release", "tests"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_can_be_run(path: Path) -> None:
    workflow = read(path.name)
    assert set(workflow) == {"name", True, "permissions", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    for command in commands(workflow):
        program = command.split()[0]
        if "/" in program:
            assert (ROOT / program).stat().st_mode & 0o100, f"{program} is no program here"


def test_the_scripts_of_the_checkout_are_called() -> None:
    assert ".ci/run --fast" in commands(read("tests.yml"))
    assert commands(read("nightly.yml")) == [".ci/run"]
    text = (ROOT / ".ci" / "run").read_text()
    assert 'exec ./run test "$@"' in text


def test_the_least_versions_are_tried() -> None:
    matrix = read("tests.yml")["jobs"]["fast"]["strategy"]["matrix"]
    (torch,) = PROJECT["project"]["dependencies"]
    assert matrix["torch"] == [torch.replace("torch>=", "") + ".*", "*"]
    assert matrix["python"][0] == PROJECT["project"]["requires-python"].removeprefix(">=")
    versions = [tuple(map(int, version.split("."))) for version in matrix["python"]]
    assert versions == [(3, minor) for minor in range(versions[0][1], versions[-1][1] + 1)]


def test_wheels_are_built_with_the_library_and_without() -> None:
    jobs = read("release.yml")["jobs"]
    assert PROJECT["tool"]["cibuildwheel"]["environment"] == {"FASTCLIP_NATIVE": "cpu"}
    assert {"FASTCLIP_NATIVE": "off"} in [step.get("env") for step in jobs["pure"]["steps"]]
    assert set(jobs["publish"]["needs"]) == {"native", "pure"}
    assert "refs/tags/v" in jobs["publish"]["if"]
