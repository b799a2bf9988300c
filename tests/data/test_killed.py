"""Whoever kills an import, a rendering or the start of a training run loses nothing that was there, and goes on.

Each is killed at ten random moments, one after the other in the same folder, and then ends undisturbed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from owl_wms.data.importing import import_clips
from owl_wms.data.latent_dataset import make_game_latents
from owl_wms.data.npy_table import NpyTable
from owl_wms.trainers.checkpoints import load_checkpoint
from tests.cli.test_train import Mean
from tests.trainers.test_trainers import build

KILLS = 10
ALONE = "OWL_WMS_TEST_ALONE"
CLIPS, FRAMES = 40, 30
FILE_CALLS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.truncate")
FORK = multiprocessing.get_context("fork")


def _alone(work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)  # threads of the parent do not live on in a forked child
    work()


def fatal(work: Callable[[Path], Any], folder: Path, call: int, count: Any) -> None:
    """Do the work in `folder` and die of SIGKILL before the given call that changes or opens a file there.

    A place, not a time: a kill after so many seconds hits another place on a busy machine, or none.
    """

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in FILE_CALLS and str(folder) in str(given[0]):
            count.value += 1
            if count.value == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    _alone(lambda: work(folder))


def calls_of(work: Callable[[Path], Any], folder: Path, call: int = 0) -> tuple[int, bool]:
    """How many such calls the work makes in a process of its own, and whether it died of that one; 0 for none."""
    count = FORK.Value("i", 0)
    process = FORK.Process(target=fatal, args=(work, folder, call, count))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL if call else 0)
    return count.value, process.exitcode != 0


def killed(work: Callable[[], Any], seconds: float) -> bool:
    """Begin the work in a process of its own, kill it after so long, and return whether it was still working."""
    process = FORK.Process(target=_alone, args=(work,))
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows, each array of which was read; none where there is no table yet."""
    if not (folder / "schema.json").exists():
        return []
    table = NpyTable(folder)
    assert table.rows, "a table without its clips"
    found = []
    for index, row in enumerate(table.rows):
        arrays = {column: table.slice(index, column, 0, row.length) for column in table.columns}
        found.append({**arrays, **{name: row.fields.get(name) for name in ("source", "seed")}})
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.array_equal(value, b[name]) for name, value in a.items())


def survive(work: Callable[[Path], Any], folder: Path, spare: Path) -> list[dict[str, Any]]:
    """Kill the work in `folder` ten times; what was there stays, and its end is the same as undisturbed in `spare`."""
    (calls, _), chance, before, hits = calls_of(work, spare), random.Random(5), [], 0
    for _ in range(KILLS):
        hits += calls_of(work, folder, chance.randint(1, calls // 4))[1]
        after = rows_of(folder)
        assert len(after) >= len(before)
        assert all(map(same, before, after))
        before = after
    assert hits >= 3
    work(folder)
    whole = rows_of(folder)
    wanted = rows_of(spare)
    assert len(whole) == len(wanted)
    assert all(map(same, whole, wanted))
    arrays = [{path.name for path in place.glob("*.npy")} for place in (folder, spare)]
    assert arrays[0] == arrays[1], "files that no row names"
    return whole


def test_an_import_that_is_killed_goes_on(tmp_path: Path) -> None:
    source, draw = tmp_path / "clips", np.random.default_rng(1)
    source.mkdir()
    for clip in range(CLIPS):
        np.save(source / f"{clip}.latent.npy", draw.normal(size=(FRAMES, 6, 3, 5)).astype(np.float32))
        np.save(source / f"{clip}.mouse.npy", draw.normal(size=(FRAMES, 2)).astype(np.float32))
        np.save(source / f"{clip}.buttons.npy", draw.integers(0, 2, (FRAMES, 7)).astype(np.uint8))
    rows = survive(lambda folder: import_clips(str(source), folder, fps=12), tmp_path / "table", tmp_path / "spare")
    assert sorted(row["source"] for row in rows) == sorted(str(clip) for clip in range(CLIPS))


def test_a_rendering_that_is_killed_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"episodes": 12, "frames": 3, "batch": 2, "first_seed": 50, "size": (36, 64)}
    rows = survive(
        lambda folder: make_game_latents(folder, Mean(), resume=True, **settings),
        tmp_path / "table",
        tmp_path / "spare",
    )
    assert [row["seed"] for row in rows] == list(range(50, 62))


@pytest.mark.parametrize("resume", [None, "latest"], ids=["a new run", "a resumed run"])
def test_a_start_that_is_killed_keeps_the_checkpoints(
    tmp_path: Path, resume: str | None, request: pytest.FixtureRequest
) -> None:
    if ALONE not in os.environ:  # a process whose autograd has threads of its own, from other tests, cannot be forked
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{request.node.name}"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ran = subprocess.run(command, env={**clean, ALONE: "1"}, capture_output=True, text=True, timeout=280)
        assert ran.returncode == 0, ran.stdout
        assert "1 passed" in ran.stdout
        return
    build(tmp_path, "rft", max_steps=3).train()
    run = tmp_path / "run"
    kept = (run / "step_3.pt").read_bytes()

    def start() -> None:
        build(tmp_path, "rft", max_steps=6, save_interval=1, resume_ckpt=resume).train()

    chance, spent = random.Random(3), []
    for _ in range(KILLS):
        spent.append(killed(start, chance.uniform(0.0, 1.5)))
        assert any(path.read_bytes() == kept for path in run.rglob("step_3.pt")), "the first run's checkpoint is lost"
        for path in run.glob("step_*.pt"):
            load_checkpoint(path)
    steps = [int(path.stem.removeprefix("step_")) for path in run.glob("step_*.pt")]
    rest = build(tmp_path, "rft", max_steps=max(steps, default=0) + 1, resume_ckpt="latest")
    rest.train()
    assert len(rest.losses) == 1, "goes on from the newest step"
