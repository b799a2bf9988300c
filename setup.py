"""Builds the package; what it is and needs stands in pyproject.toml, tried version sets in requirements*.txt.

The only thing done here: a wheel takes along the configurations and the shipped weights, which stand outside the
package in a checkout (`owl_wms.configs.paths` finds them in either place).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ("configs/**/*.yml", "examples/**/*.yml", "examples/**/*.safetensors", "examples/**/*.json")


class BuildWithShippedFiles(build_py):
    """`build_py`, and then the shipped files under `owl_wms/shipped`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in SHIPPED:
            for path in sorted(ROOT.glob(pattern)):
                target = Path(self.build_lib, "owl_wms", "shipped", path.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
