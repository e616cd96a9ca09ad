"""Everything static is in pyproject.toml; this adds the top-level folders to the wheel.

`benchmarks/` lives beside the package and is imported as `fastclip.bench` (a path shim there finds
it in a checkout); in a wheel its modules are copied into the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOP_LEVEL_ROOMS = {"benchmarks": "fastclip/bench"}


class BuildWithRooms(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, package in TOP_LEVEL_ROOMS.items():
            target = Path(self.build_lib) / package
            target.mkdir(parents=True, exist_ok=True)
            for module in sorted(Path(folder).glob("*.py")):
                shutil.copy2(module, target / module.name)


setup(cmdclass={"build_py": BuildWithRooms})
