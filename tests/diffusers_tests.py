"""Runs diffusers' own tests of AutoencoderDC with every decoder accelerated. Nothing of them is part of this project.

    python -m tests.diffusers_tests FOLDER [--plain] [--eval] [--precision P] [--slice I/N] [--rows FILE] [...]

FOLDER is the `tests` folder of a diffusers checkout that fits the installed version. `--plain` leaves the decoders
alone, to compare. `--eval` puts every autoencoder into eval mode as soon as it is made, as `from_pretrained` does.
`--slice 2/12` runs every 12th test from the second on, so that several processes with one `--cache` share the work.
`--rows` receives one line of JSON per test as it ends. Without a GPU, programs come from the stand-in for TensorRT that
our own tests use.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import owl_wms
from tests.runtime.toolchains import ExportToolchain

TESTS = "models/autoencoders/test_models_autoencoder_dc.py"
TOLD = ("state", "plan", "precision", "entry", "reason")


class Accelerating:
    """A pytest plugin: each AutoencoderDC is accelerated as soon as it is made, and each test gives a row."""

    def __init__(self, given: argparse.Namespace, cache_dir: Path) -> None:
        from diffusers import AutoencoderDC

        plain = AutoencoderDC.__init__
        toolchain = None if torch.cuda.is_available() else ExportToolchain()
        self.given = given
        self.made: list[Any] = []
        self.failure = ""

        @functools.wraps(plain)
        def init(model: Any, *args: Any, **kwargs: Any) -> None:
            plain(model, *args, **kwargs)
            if given.eval:
                model.eval()
            if not given.plain:
                owl_wms.accelerate(model, cache_dir=cache_dir, toolchain=toolchain, precision=given.precision)
                self.made.append(model.decoder)

        AutoencoderDC.__init__ = init

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        first, step = map(int, self.given.slice.split("/"))
        items[:] = items[first - 1 :: step]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "setup":
            self.made, self.failure = [], ""
        if report.failed:
            text = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.failure = f"{report.when}: {' '.join(text.split())[:500]}"
        if report.when == "call" or report.outcome != "passed":
            self.write(report)

    def write(self, report: Any) -> None:
        """Appends the row of a test that has ended."""
        stats = [decoder.stats() for decoder in self.made]
        pytorch = sum((Counter(one.pytorch) for one in stats), Counter())
        programs = [p for one in stats for decode in one.programs.values() for p in decode.programs]
        row = {
            "test": report.nodeid.partition("::")[2],
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "program_calls": sum(one.program_calls for one in stats),
            "pytorch": dict(pytorch),
            "programs": sorted({" ".join(str(p.get(key)) for key in TOLD)[:250] for p in programs}),
            "why": self.failure or (report.longrepr[2] if report.skipped else ""),
        }
        if self.given.rows is not None:
            with self.given.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def main(arguments: list[str]) -> int:
    """Run them; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--slice", default="1/1", metavar="I/N")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of the programs; left out: for this run alone")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    given, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder, "checkout", "tests")
        shutil.copytree(given.source, copied)
        sys.path.insert(0, str(copied.parent))
        for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
            del sys.modules[name]  # diffusers' tests import one another by the same name as ours
        plugin = Accelerating(given, given.cache or Path(folder, "cache"))
        options = ["-q", "-p", "no:cacheprovider", f"--rootdir={copied.parent}", "-c", "/dev/null"]
        return pytest.main([*options, str(copied / TESTS), *rest], plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
