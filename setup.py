"""Everything static is in pyproject.toml; this adds the top-level folders to the wheel.

`kernels/` and `benchmarks/` live beside the package and are imported as `fastclip.kernels` and
`fastclip.bench` (path shims there find them in a checkout); in a wheel they are copied into the
package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOP_LEVEL_ROOMS = {"benchmarks": "fastclip/bench", "kernels": "fastclip/kernels"}


class BuildWithRooms(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, package in TOP_LEVEL_ROOMS.items():
            target = Path(self.build_lib) / package
            target.mkdir(parents=True, exist_ok=True)
            for suffix in ("*.py", "*.json"):
                for file in sorted(Path(folder).glob(suffix)):
                    shutil.copy2(file, target / file.name)


setup(cmdclass={"build_py": BuildWithRooms})
