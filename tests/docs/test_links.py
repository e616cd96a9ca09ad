"""Links within the repository lead somewhere, pages are found from the index, nothing is local."""

import re

import pytest

from tests.docs.pages import ALL, READ, Page
from tests.test_repo_shape import ROOT

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
README = Page(ROOT / "README.md")


def anchors(text: str) -> set[str]:
    """Those of its headings, as GitHub names them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (candidate := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(candidate)
    return found


def test_anchors_are_githubs() -> None:
    text = "# What it does, in figures\n## `fastclip eval`\n## Same\n## Same\n"
    assert anchors(text) == {"what-it-does-in-figures", "fastclip-eval", "same", "same-1"}


@pytest.mark.parametrize("page", ALL, ids=str)
def test_its_links_lead_somewhere(page: Page) -> None:
    for target in _LINK.findall(page.prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page}: {target}"


def test_the_index_has_every_page() -> None:
    linked = {
        (README.path.parent / target.partition("#")[0]).resolve()
        for target in _LINK.findall(README.prose)
    }
    missing = [str(page) for page in READ if page.path not in linked and page != README]
    assert not missing, f"README.md links to none of {missing}"


@pytest.mark.parametrize("page", READ, ids=str)
def test_it_names_no_machine_and_leaves_nothing_to_fill_in(page: Page) -> None:
    for pattern in (r"(?<![\w.])/(?:home|root|tmp|Users|work)/", r"@@", r"\bTODO\b", r"\bTBD\b"):
        assert not re.search(pattern, page.text), f"{page}: {pattern}"
