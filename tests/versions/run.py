"""Tests the supported version sets, each in a fresh virtual environment, one after the other.

Every set takes about 6 GB of disk and several minutes; its environment is deleted when it has been tested. The results
of the sets that ran replace theirs in `benchmarks/results/versions.json`, and `versions.md` is written from that file.

Run: python -m tests.versions.run /path/to/a/folder            # all of them
     python -m tests.versions.run /path/to/a/folder 2.14 2.15
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from owl_wms.trt.library import versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
SETS = {
    **{release.number: release.packages() for release in versions.RELEASES.values()},
    "2.15": ("torch==2.15.*",),
}
"""Set -> requirements. 2.12 is left out on purpose (`owl_wms/trt/library/versions.py`)."""
TESTS = ("tests/trt/library", "tests/trt/build", "tests/cache")
FREE_BYTES = 12 * 2**30


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Install one set into `folder/name`, build every family and run the tests there; the folder is deleted."""
    place = folder / name
    if place.exists():
        raise SystemExit(f"{place} exists; name another folder, or delete it")
    if shutil.disk_usage(folder).free < FREE_BYTES:
        raise SystemExit(f"{folder} has less than {FREE_BYTES >> 30} GiB free; name a folder on another disk")
    try:
        venv.create(place, with_pip=True)
        python = str(place / ("Scripts" if os.name == "nt" else "bin") / "python")
        install = [python, "-m", "pip", "install", "-q", "--no-cache-dir"]
        common = ["-r", str(ROOT / "requirements-common.txt")]
        subprocess.run([*install, *SETS[name], *common], check=True)
        built = subprocess.run([python, "-m", "tests.versions.matrix"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        found = json.loads(built.stdout.splitlines()[-1])
        tested = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(tested.stdout, flush=True)
        return {**found, "tests": tested.stdout.splitlines()[-1], "passed": not (built.returncode or tested.returncode)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def table(results: dict[str, Any]) -> str:
    """The page about the results."""
    lines = [
        "# Version sets",
        "",
        "Each set in an environment of its own, on a CPU (`make test-versions`). **Built on a CPU, not run on a GPU**:",
        "converters, partition, saving and loading are real; PyTorch runs the engines, and our operators' reference",
        "implementations stand for their kernels. What ran on GPUs was torch 2.11 (`trt_matrix_h200_202611.md`).",
        "Torch-TensorRT 2.12 is left out: it leaves bf16 depthwise convolutions in PyTorch by a rule of its own. There",
        "is no Torch-TensorRT for torch 2.15, so only the plan `ops` applies there.",
        "",
        "Written by `tests/versions/run.py`. A set without a row was not run by this script yet.",
        "",
        "| set | packages | tests |",
        "|---|---|---|",
    ]
    for name, found in results.items():
        packages = "; ".join(str(text) for text in found["versions"].values() if "unknown" not in str(text))
        lines.append(f"| {name} | Python {packages} | {found['tests']} |")
    lines += [
        "",
        "| set | family | plan | precision | engines | operators left in PyTorch | parity | reloaded bit-equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for row in found["rows"]:
            said = [str(row.get("engines", "-")), str("-" if row.get("left") is None else row["left"])]
            said += [row["failed"]] if "failed" in row else ["yes" if row["parity"] else "no"]
            said += ["yes" if row.get("reload_bit_equal") else "no"]
            lines.append(f"| {name} | {row['family']} | {row['plan']} | {row['precision']} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any]) -> None:
    """Store the results and the page."""
    ordered = {name: results[name] for name in SETS if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(ordered), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Test the sets that are named, or all; the exit status is 1 if one failed."""
    unknown = set(arguments[1:]) - set(SETS)
    if not arguments or unknown:
        raise SystemExit(f"usage: python -m tests.versions.run FOLDER [{' '.join(SETS)}]")
    folder = Path(arguments[0]).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments[1:] or SETS:
        found = tried(name, folder)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        write({**results, name: found})
        print(f"{name}: {found['tests']}", flush=True)
        failed += [] if found["passed"] else [name]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
