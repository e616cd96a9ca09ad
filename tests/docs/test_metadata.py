"""What citation, changelog and package say of themselves agrees."""

import re

import yaml

import fastclip
from tests.test_repo_shape import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_is_complete() -> None:
    assert {"cff-version", "message", "title", "authors", "license"} <= set(CITATION)
    assert CITATION["authors"] == [{"name": "The fastclip contributors"}]
    assert CITATION["license"] in (ROOT / "pyproject.toml").read_text()
    for paper in CITATION["references"]:
        assert {"type", "title", "authors", "year", "identifiers"} <= set(paper)
        (identifier,) = paper["identifiers"]
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", identifier["value"])


def test_versions_agree() -> None:
    assert CITATION["version"] == fastclip.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == fastclip.__version__


def test_the_changelog_names_what_is_public() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for name in set(fastclip.__all__) - {"__version__", "functional", "load"}:
        assert f"`{name}`" in text, name
