"""How often a decode call does what costs time, from the call to its program; and what the key must cover.

Run: python -m pytest tests/runtime/test_counts.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import owl_wms
from owl_wms.trt.key import SOURCES

# Here and in the build process.
BUILT = {
    "folds": [1, 1],  # PyTorch's own copy; the ordinary decoder that this one is compared with
    "recordings": [1, 2],  # the key; the decoder that arrived, and the ordinary one
    "forwards for shapes": [0, 0],
    "selections": [0, 1],
    "digests of the weights": [1, 0],
    "directory checks": [2, 0],  # before the locks, and under them
    "keys hashed": [3, 0],  # the key's own; a manifest proves itself when it is written and when it is read back
    "exported programs loaded": [0, 1],  # what was written computes the same
    "call lists read": [1, 1],  # and so does its call list, which is all that a later process reads
    "outputs compared": [1, 2],
    "exports": [0, 3],  # one per plan, of which the tests' build process has three
}
CACHED = {
    "folds": [1, 0],
    "recordings": [1, 0],
    "forwards for shapes": [0, 0],
    "selections": [0, 0],
    "digests of the weights": [1, 0],
    "directory checks": [1, 0],
    "keys hashed": [2, 0],
    "exported programs loaded": [0, 0],
    "call lists read": [1, 0],
    "outputs compared": [1, 0],
    "exports": [0, 0],
}
NOT_HASHED = {
    "owl_wms": "a version number",
    "owl_wms.errors": "words",
    "owl_wms.interrupts": "lets a caller's own exceptions pass, and makes nothing",
    "owl_wms.ending": "stops a build at exit, and makes none",
    "owl_wms.env": "reads the machine; what it reads is in the key",
    "owl_wms.settings": "what a user asked for; the request holds it",
    "owl_wms.dynamo": "keeps callers' compilers out",
    "owl_wms.configs": "makes configurations; the key has the graph and the weights of the decoder made from one",
    "owl_wms.files": "paths of files, and how they are opened",
    "owl_wms.whole": "writes files whole, checkpoints among them; a program is compiled from weights in memory",
    "owl_wms.process": "names processes, and asks if one still lives",
    "owl_wms.temporary": "folders that are gone afterwards",
    "owl_wms.memory": "tells from an error that memory ran out",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A build and a second decode function in one process, then two decode functions in another."""
    cache = tmp_path_factory.mktemp("counts") / "cache"
    lines = []
    for _ in range(2):
        command = [sys.executable, "-m", "tests.runtime.counting", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        lines += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return lines


def test_a_miss_a_second_function_and_a_hit_do_each_thing_as_often_as_needed(told: list[dict[str, Any]]) -> None:
    assert [line["source"] for line in told] == ["built", "cached", "cached", "cached"]
    assert told[0]["counts"] == BUILT
    assert told[1]["counts"] == CACHED, "a second decode function of the process that built"
    assert told[2]["counts"] == CACHED, "a new process"


def test_every_module_that_a_lowering_loads_is_in_the_key_or_listed_with_a_reason(told: list[dict[str, Any]]) -> None:
    """A change of one that is in neither would leave old programs standing for new ones."""
    package = Path(owl_wms.__file__).parent
    loaded = told[0]["modules"]
    assert {"owl_wms.fused.dcae", "owl_wms.ops.stage", "owl_wms.trt.plans", "owl_wms.vae.fold"} <= set(loaded)
    hashed = {name.removesuffix(".py") for name in SOURCES}
    assert all((package / name).exists() for name in SOURCES)
    for name in loaded:
        place = name.split(".")[1] if "." in name else ""
        listed = name in NOT_HASHED or f"owl_wms.{place}" in NOT_HASHED
        assert place in hashed or listed, f"{name} shapes programs and is not in SOURCES of owl_wms/trt/key.py"
