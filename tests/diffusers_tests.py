"""Runs diffusers' own tests of AutoencoderDC with every decoder accelerated. Nothing of them is part of this project.

    python -m tests.diffusers_tests FOLDER [--plain] [pytest arguments]

FOLDER is the `tests` folder of a diffusers checkout that fits the installed version. `--plain` leaves the decoders
alone, to compare. Without a GPU, programs come from the stand-in for TensorRT that our own tests use.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import owl_wms
from tests.runtime.toolchains import ExportToolchain

TESTS = "models/autoencoders/test_models_autoencoder_dc.py"


class Accelerating:
    """A pytest plugin: each AutoencoderDC is accelerated as soon as it is made."""

    def __init__(self, cache_dir: Path) -> None:
        from diffusers import AutoencoderDC

        plain = AutoencoderDC.__init__
        toolchain = None if torch.cuda.is_available() else ExportToolchain()
        self.made: list[Any] = []

        @functools.wraps(plain)
        def init(model: Any, *args: Any, **kwargs: Any) -> None:
            plain(model, *args, **kwargs)
            owl_wms.accelerate(model, cache_dir=cache_dir, toolchain=toolchain)
            self.made.append(model.decoder)

        AutoencoderDC.__init__ = init

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        calls = sum(decoder.stats().program_calls for decoder in self.made)
        terminalreporter.write_line(f"{len(self.made)} autoencoders accelerated, {calls} calls answered by programs")


def main(arguments: list[str]) -> int:
    """Run them; pytest's exit status."""
    source, *rest = arguments
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, "checkout", "tests")
        shutil.copytree(source, copied)
        sys.path.insert(0, str(copied.parent))
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
            del sys.modules[name]  # diffusers' tests import one another by the same name as ours
        plugins = [] if "--plain" in rest else [Accelerating(Path(folder, "cache"))]
        options = ["-q", "-p", "no:cacheprovider", f"--rootdir={copied.parent}", "-c", "/dev/null"]
        return pytest.main([*options, str(copied / TESTS), *(r for r in rest if r != "--plain")], plugins=plugins)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
