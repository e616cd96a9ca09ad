"""Every Python block of a page runs, in order, in one namespace, in an empty folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.integrations.patch import PatchHandle
from tests.docs.pages import READ, Page

RUN = [page for page in READ if page.blocks("python")]
MOST_NOT_RUN = 2


@pytest.fixture
def given(make_shard: Callable[..., Path]) -> dict[str, Any]:
    """Names that the pages take for granted: features of a batch, shards, a tokenizer."""
    torch.manual_seed(0)
    image_features, text_features = (
        torch.nn.functional.normalize(torch.randn(8, 16), dim=-1).requires_grad_() for _ in range(2)
    )
    return {
        "image_features": image_features,
        "text_features": text_features,
        "logit_scale": torch.tensor(10.0, requires_grad=True),
        "shards": str(make_shard(samples=8)),
        "tokenizer": lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64),
        "batch_size": 4,
    }


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages show how libraries are patched; no test after them shall find them so."""
    made: list[PatchHandle] = []
    begin = PatchHandle.__init__

    def remember(handle: PatchHandle) -> None:
        begin(handle)
        made.append(handle)

    monkeypatch.setattr(PatchHandle, "__init__", remember)
    yield
    for handle in reversed(made):
        handle.undo()


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("page", RUN, ids=str)
def test_the_page_runs(
    page: Page, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("all_pairs.csv").write_text("filepath,title\n1.jpg,a dog\n2.jpg,a cat\n1.jpg,a pet\n")
    names = {**given, "__name__": "page"}
    for block in page.blocks("python"):
        if block.not_run is None:
            # errors have the page's own line numbers
            code = compile("\n" * block.line + block.text, str(page.path), "exec")
            exec(code, names)


def test_few_blocks_are_not_run() -> None:
    reasons = [
        f"{page}:{block.line}: {block.not_run}"
        for page in RUN
        for block in page.blocks("python")
        if block.not_run
    ]
    assert len(reasons) <= MOST_NOT_RUN, reasons


def test_no_python_hides_in_another_block() -> None:
    for page in READ:
        for block in page.blocks(""):
            assert "import " not in block.text, f"{page}:{block.line}: name its language"
