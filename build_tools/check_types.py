"""mypy over the whole package: `python build_tools/check_types.py`; arguments are mypy's.

mypy does not follow the path shims in `fastclip/kernels/` and `fastclip/bench/`. So it reads a tree
of links where `kernels/` and `benchmarks/` lie as in a wheel, under the names they are imported by.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"kernels": "kernels", "bench": "benchmarks"}


def link_package(folder: Path) -> None:
    """Make `folder/fastclip`, with all that is imported as part of it."""
    package = folder / "fastclip"
    package.mkdir()
    for path in (ROOT / "fastclip").iterdir():
        if path.name not in ROOMS:
            (package / path.name).symlink_to(path)
    for name, top in ROOMS.items():
        (package / name).mkdir()
        for path in [ROOT / "fastclip" / name / "__init__.py", *(ROOT / top).glob("*.py")]:
            (package / name / path.name).symlink_to(path)


def main() -> int:
    """Return mypy's exit status; its messages name the files of the checkout."""
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    with tempfile.TemporaryDirectory(prefix="fastclip-types-") as folder:
        link_package(Path(folder))
        command = [sys.executable, "-m", "mypy", *options, *sys.argv[1:], "fastclip"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    linked = re.compile(r"^fastclip/(kernels|bench)/(?!__init__)", re.MULTILINE)
    print(linked.sub(lambda found: f"{ROOMS[found[1]]}/", done.stdout), end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
