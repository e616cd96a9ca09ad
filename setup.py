"""Everything static is in pyproject.toml; this adds the top-level folders and the native library.

`kernels/` and `benchmarks/` live beside the package and are imported as `fastclip.kernels` and
`fastclip.bench` (path shims there find them in a checkout); in a wheel they are copied into the
package, without what only a checkout needs. `csrc/` is compiled to `fastclip/_native`, in a
checkout in place.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))
import native  # noqa: E402

TOP_LEVEL_ROOMS = {"benchmarks": "fastclip/bench", "kernels": "fastclip/kernels"}
# Of benchmarks/, what no command of `fastclip bench` imports stays in the checkout: it tunes and
# checks kernels there. A test holds the list.
LAB = set(
    "archive attention_check attention_lab attention_sweep ceilings check compile_cases "
    "compile_limits compile_report gpu_lab lab_losses ranking retrieval sass search small "
    "tile_sweep trials variants".split()
)


class BuildWithRooms(build_py):
    def run(self) -> None:
        super().run()
        where = ROOT if self.editable_mode else Path(self.build_lib)
        native.install(where / "fastclip", self.distribution.get_version())
        if self.editable_mode:
            return
        for folder, package in TOP_LEVEL_ROOMS.items():
            target = Path(self.build_lib) / package
            target.mkdir(parents=True, exist_ok=True)
            for suffix in ("*.py", "*.json"):
                for file in sorted(Path(folder).glob(suffix)):
                    if folder != "benchmarks" or file.stem not in LAB:
                        shutil.copy2(file, target / file.name)


class WheelOfThisMachine(bdist_wheel):
    """A wheel is pure unless the library is inside."""

    def get_tag(self) -> tuple[str, str, str]:
        package = Path(self.get_finalized_command("build_py").build_lib) / "fastclip"
        self.root_is_pure = native.library(package) is None
        return super().get_tag()


setup(cmdclass={"build_py": BuildWithRooms, "bdist_wheel": WheelOfThisMachine})
