"""Tests the supported version sets, each in a fresh virtual environment, one after the other.

Every set takes 3 to 6 GB of disk and several minutes; its environment is deleted when it has been tested. One that
stands in the folder already, under the set's name, is used as it is and stays. The results of the sets that ran replace
theirs in `benchmarks/results/versions.json`, and `versions.md` beside it is written from that file.

Run: python -m tests.versions.run /path/to/a/folder            # all of them
     python -m tests.versions.run /path/to/a/folder 2.14 2.15
     python -m tests.versions.run --page                       # the page again, from what is there
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_wms.trt.library import versions
from tests.versions import page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
FREE_BYTES = 12 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Set:
    """What one environment holds and what is run there.

    Attributes:
        requirements: besides `requirements-common.txt`, as pip takes them.
        python: the interpreter, looked for on PATH; the one that runs this by default.
        tests: paths for pytest; all of the suite when empty.
    """

    requirements: tuple[str, ...]
    python: str = sys.executable
    tests: tuple[str, ...] = ("tests/trt/library", "tests/trt/build", "tests/cache")


SETS = {
    **{release.number: Set(requirements=release.packages()) for release in versions.RELEASES.values()},
    # Without Torch-TensorRT, for which torch 2.15 has none: programs without engines are built, kept and loaded.
    "2.15": Set(
        requirements=("torch==2.15.*",), tests=("tests/trt/library", "tests/trt/build", "tests/trt/run", "tests/cache")
    ),
    "python3.13": Set(requirements=versions.RELEASES["2.11"].packages(), python="python3.13", tests=()),
}
"""Name -> set. 2.12 is left out on purpose (`owl_wms/trt/library/versions.py`)."""


def install(wanted: Set, place: Path) -> None:
    """Make a virtual environment with the set."""
    python = shutil.which(wanted.python)
    if python is None:
        raise SystemExit(f"{wanted.python} is not on PATH")
    if shutil.disk_usage(place.parent).free < FREE_BYTES:
        raise SystemExit(f"{place.parent} has less than {FREE_BYTES >> 30} GiB free; name a folder on another disk")
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    pip = [str(interpreter(place)), "-m", "pip", "install", "-q", "--no-cache-dir"]
    subprocess.run([*pip, *wanted.requirements, "-r", str(ROOT / "requirements-common.txt")], check=True)
    # Where an index or folder has builds for CPUs too, pip prefers them, and Torch-TensorRT's library needs CUDA's.
    probe = "import sys, torch; sys.exit(torch.version.cuda is None)"
    if subprocess.run([str(interpreter(place)), "-c", probe]).returncode:
        raise SystemExit(
            f"pip took a torch without CUDA for {wanted.requirements}; see `pip config list` for find-links"
        )


def interpreter(place: Path) -> Path:
    """The Python of a virtual environment."""
    return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def tried(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what is known of one set: when every family was built, and again when the tests ran."""
    place, wanted = folder / name, SETS[name]
    fresh = not place.exists()
    try:
        if fresh:
            install(wanted, place)
        python = str(interpreter(place))
        built = subprocess.run([python, "-m", "tests.versions.matrix"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if not built.stdout.strip():
            raise SystemExit(f"{name}: the matrix printed nothing and ended with {built.returncode}")
        found = {**json.loads(built.stdout.splitlines()[-1]), "sound": built.returncode == 0}
        yield {**found, "tests": "not run"}
        printed, status = shown([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *wanted.tests])
        yield {**found, "sound": found["sound"] and status == 0, "tests": summary(printed, status)}
    finally:
        if fresh:
            shutil.rmtree(place, ignore_errors=True)


def shown(command: list[str]) -> tuple[str, int]:
    """Run a command and print its lines while it runs; returns all that it printed and its exit status."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return "".join(lines), process.returncode


def summary(printed: str, status: int) -> str:
    """Returns pytest's closing line, or its exit status (a signal as a negative number) if it did not get that far."""
    last = printed.splitlines()[-1].strip("= ") if printed.strip() else ""
    closed = re.match(r"\d+ (passed|failed|skipped|error|deselected|xfailed|warning)", last)
    return last if closed else f"ended with status {status} before its last line"


def stored() -> dict[str, Any]:
    """The results so far, in the order of `SETS`."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {name: results[name] for name in SETS if name in results}


def main(arguments: list[str]) -> None:
    """Test the sets that are named, or all; the exit status is 1 if one failed."""
    if arguments == ["--page"]:
        page.write(stored())
        return
    unknown = set(arguments[1:]) - set(SETS)
    if not arguments or unknown:
        raise SystemExit(f"usage: python -m tests.versions.run FOLDER [{' '.join(SETS)}]")
    folder = Path(arguments[0]).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments[1:] or SETS:
        for found in tried(name, folder):
            results = {**stored(), name: found}
            RESULTS.write_text(json.dumps({at: results[at] for at in SETS if at in results}, indent=1) + "\n", "utf-8")
            page.write(stored())
        print(f"{name}: {found['tests']}", flush=True)
        failed += [] if found["sound"] else [name]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
