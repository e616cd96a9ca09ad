"""Tables on the pages agree with the code."""

import importlib
import re
from typing import Any, get_args

import pytest
import torch

import fastclip
from fastclip.cli.bench import Config as Bench
from fastclip.cli.eval import Command
from fastclip.data import index, samples
from fastclip.data.sources import ENDINGS, guess_type
from fastclip.models.options import Objective
from fastclip.ops.backend import IMPLEMENTATIONS
from fastclip.train import stop, watch
from fastclip.train.config import RECIPES, parse
from tests.docs.pages import READ, Page, names, table
from tests.ops.test_contracts import PRODUCTS
from tests.test_repo_shape import ROOT, tracked

README = Page(ROOT / "README.md")


@pytest.mark.parametrize("page", READ, ids=str)
def test_lines_of_a_table_have_one_number_of_cells(page: Page) -> None:
    for part in re.findall(r"(?:^\|.*\n)+", page.prose, flags=re.MULTILINE):
        cells = {
            len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
            for line in part.splitlines()
        }
        assert len(cells) == 1, f"{page}: {part[:120]}"


NUMBERS = {"½": 0.5, "1½": 1.5}


def test_losses() -> None:
    """Its modules and functions exist, and its products are those that the tests count."""
    for modules, function, _, products in table("| module | function"):
        for module in names(modules):
            assert issubclass(getattr(fastclip, module), torch.nn.Module)
        (name,) = re.findall(r"`(\w+)_loss`", function)
        assert callable(getattr(fastclip.functional, f"{name}_loss"))
        # a global loss's are counted beside its definition
        forward, again, once = PRODUCTS["clip" if name == "global_contrastive" else name]
        listed = [NUMBERS.get(n) or int(n) for n in re.findall(r"[\d½]+", products.split("(")[0])]
        assert listed == sorted({forward + once, forward + again})


def test_products_of_the_mathematics() -> None:
    counted = {"CLIP": "clip", "SigLIP": "siglip", "InfoNCE": "info_nce", "NT-Xent": "nt_xent"}
    seen = set()
    for row in table("| loss | forward | backward |"):
        name = row[0].split(",")[0]
        if name in counted and "reduction" not in row[0]:
            cells = [re.split("[:;]", cell) for cell in row[1:3]]
            forward, once = (NUMBERS.get(cell[0]) or float(cell[0]) for cell in cells)
            again = once
            if "again" in cells[1][-1]:
                number = cells[1][-1].split()[0]
                again = NUMBERS.get(number) or float(number)
            assert (forward, again, once) == PRODUCTS[counted[name]], name
            seen.add(name)
    assert seen == set(counted)


def test_the_front_pages_names() -> None:
    for _, take in table("| instead of | use |"):
        for name in re.findall(r"\b([A-Z]\w+Loss|patch_\w+)\b", take):
            assert hasattr(fastclip, name), name


def test_systems() -> None:
    """Its objectives exist, and its recipes train what they stand beside."""
    listed = set()
    for cells in table("| `--objective` | what |"):
        objectives, _, recipes = (re.findall(r"`(\w+)`", cell) for cell in cells)
        listed |= set(objectives)
        for recipe in recipes:
            flags = ["--classes", "names.txt"] if recipe == "classify_text" else []
            assert parse(["--config", recipe, *flags]).model.objective in objectives, recipe
    assert listed == set(get_args(Objective))


def test_recipes() -> None:
    listed = [name for cells in table("| recipe | what |") for name in names(cells[0])]
    assert sorted(listed) == sorted(path.stem for path in RECIPES.glob("*.yaml"))


def test_evaluations() -> None:
    """It has all commands that measure a model."""
    listed = {
        name.replace("-", "") for row in table("| `fastclip eval` |") for name in names(row[0])
    }
    kinds = {get_args(one)[0].__name__.lower() for one in get_args(Command)} - {"list", "table"}
    assert listed == kinds


def test_benchmarks() -> None:
    listed = {name for row in table("| `fastclip bench` |") for name in names(row[0])}
    assert listed <= {one.__metadata__[0].name for one in get_args(Bench)}


def test_exit_statuses() -> None:
    listed = {
        status: row[0]
        for row in table("| what happens | what the run does | exit status |")
        for status in re.findall(r"\d+", row[2])
    }
    assert "SIGTERM" in listed[str(stop.EXIT_STATUS)]
    assert set(listed) == {"0", "1", "2", "3", str(watch.EXIT_STATUS), str(stop.EXIT_STATUS)}


def test_implementations() -> None:
    listed = [names(row[0])[0] for row in table("| `backend` | runs on | how |")]
    assert listed == [implementation.name for implementation in IMPLEMENTATIONS["similarity"]]


def test_environment_variables() -> None:
    """All of fastclip's own that the code reads, and none that it does not."""
    listed = [names(row[0])[0] for row in table("| variable | read | what |")]
    sources = [
        path.read_text()
        for pattern in ("fastclip/*.py", "benchmarks/*.py", "kernels/*.py", "build_tools/*.py")
        for path in tracked(pattern)
    ]
    read = set(re.findall(r'"(FASTCLIP_[A-Z_]+)"', "\n".join(sources)))
    options = {f"FASTCLIP_{name}" for name in ("CUDA", "MODULE", "TESTS", "VERSION")}
    assert read - options <= set(listed)
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    for name in set(listed) - read:
        if name.startswith("FASTCLIP_"):
            assert name in conftest, f"{name} is read nowhere"


def test_extras() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(
        re.findall(
            r"^(\w+) = \[", text.split("optional-dependencies]")[1].split("\n[")[0], re.MULTILINE
        )
    )
    shown = set(re.findall(r"'\.\[(\w+)\]'", Page(ROOT / "docs" / "platforms.md").text))
    assert shown <= extras and extras - shown <= {"tagger", "all", "dev"}


def test_notices_name_every_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = text.split("[project.scripts]")[0].split("dependencies = [", 1)[1]
    wanted = set(re.findall(r'"([A-Za-z][\w-]*)(?:[<>=]|\[)', project)) - {"fastclip-kernels"}
    rows = table("| package | extra | license |")
    listed = {name.lower() for row in rows for name in re.split(r",\s*", row[0])}
    assert {name.lower() for name in wanted} - listed == set()


def test_decisions_have_the_range_of_every_dependency() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = text.split("[project.scripts]")[0].split("dependencies = [", 1)[1]
    wanted = dict(re.findall(r'"([A-Za-z][\w-]*)((?:[<>=]+[\d.]+,?)+)', project))
    signs = str.maketrans({"≥": ">=", "≤": "<=", " ": None})
    written = {
        name: one.translate(signs)
        for packages, ranges, _ in table("| package | range | why |")
        for name, one in zip(packages.split(", "), ranges.split("; "), strict=True)
    }
    # no package of the registry
    del written["nvcc"]
    assert written == wanted


def test_types_of_data() -> None:
    """What the table lists is recognized by name as the type that it says."""
    shown = [name for row in table("| `--train-data`, `--val-data`") for name in names(row[0])]
    kinds = {guess_type(name.strip("'").replace("...", "a.tar")) for name in shown}
    assert kinds >= {"webdataset", "csv", "coco", "scenes", "synthetic"}
    assert all(f"pairs{ending}" in shown for ending in (".csv", ".tsv") if ending in ENDINGS)


def test_limits_of_data() -> None:
    said = " ".join(" ".join(row) for row in table("| limit | value |"))
    assert f"{samples.MAX_IMAGE_PIXELS // 1_000_000} million" in said
    assert f"{index.MAX_MEMBERS // 1_000_000} million" in said
    assert f"{samples.MAX_TEXT_BYTES >> 20} MiB" in said
    assert samples.MAX_ASPECT == samples.MAX_JPEG_SCANS == 100
    sources = "\n".join(path.read_text() for path in tracked("fastclip/data/*.py"))
    for row in table("| limit | value |"):
        for kind in names(row[2]):
            assert f'"{kind}"' in sources, kind


def test_modules_spoken_of_exist() -> None:
    """Dotted names of the package in the prose can be imported."""
    for page in READ:
        for name in set(re.findall(r"`(fastclip(?:\.\w+)+)[`(]", page.prose)):
            assert _reach(name) is not None, f"{page}: {name}"


def _reach(name: str) -> Any:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    return None


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_the_two_commands_exist(command: str) -> None:
    assert f"./run {command}" in README.text
    assert f"\n{command})\n" in (ROOT / "run").read_text()


def test_every_room_is_on_the_map() -> None:
    listed = {path for row in table("| room | what |") for path in names(row[0])}
    assert all((ROOT / path).exists() for path in listed)
    rooms = {
        f"fastclip/{p.parts[1]}/"
        for f in tracked("fastclip/*.py")
        if len((p := f.relative_to(ROOT)).parts) > 2
    }
    assert rooms - listed <= {"fastclip/kernels/", "fastclip/bench/"}


def test_the_front_page_is_short() -> None:
    assert len(README.text.splitlines()) <= 150
