"""The site: it builds without a warning, has every page, and asks no other host for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tests.test_repo_shape import tracked

FOREIGN = re.compile(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//[^"]*"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_in_it(site: Path) -> None:
    pages = [path for path in tracked("docs/*.md") if path.parent.name == "docs"]
    assert len(pages) > 10
    for page in pages:
        assert (site / page.stem / "index.html").is_file(), (
            f"{page.name} is not in mkdocs.yml's nav"
        )


def test_the_readme_is_its_first_page(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert 'href="quickstart/"' in home and 'src="performance.svg"' in home
    assert "docs/quickstart" not in home


def test_what_pages_link_to_outside_the_folder_comes_along(site: Path) -> None:
    assert (site / "examples" / "distributed.py").is_file()
    page = (site / "troubleshooting" / "index.html").read_text()
    assert 'href="../examples/distributed.py"' in page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not FOREIGN.findall(page.read_text()), page
