"""A process is judged by its own machine, boot and container alone; what others left goes by its age."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from owl_wms import process
from owl_wms.batch.store import FOLDER, Store
from owl_wms.cache import staging
from owl_wms.process import LEFT_SECONDS, Process
from owl_wms.temporary import temporary_folder

HERE = Process.current()
DEAD = dataclasses.replace(HERE, pid=2**22 + 1)
OTHERS: dict[str, Any] = {
    "another machine of the same name": {"boot": "0" * 8},
    "another machine of the same boot, as of a snapshot": {"host": "0" * 8},
    "another container": {"namespace": "0" * 8},
    "another machine": {"host": "0" * 8, "boot": "0" * 8, "namespace": "0" * 8},
}


def test_this_machine_knows_its_processes() -> None:
    assert HERE.lives() is True
    assert Process.parse(HERE.unique_name()) == HERE
    assert DEAD.lives() is False
    assert dataclasses.replace(HERE, start=HERE.start + 1).lives() is False, "its number is another's now"


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_others_cannot_be_judged(changes: Any) -> None:
    assert dataclasses.replace(DEAD, **changes).lives() is None
    assert dataclasses.replace(HERE, **changes).lives() is None


def test_without_a_boot_and_an_address_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_boot", lambda: "")
    here = Process.current()
    assert here.lives() is None
    assert not here.shares_kernel()


def swept_from_cache(place: Path) -> None:
    number = os.open(place, os.O_RDONLY)
    staging.sweep(number)
    os.close(number)


def swept_from_output(place: Path) -> None:
    Store(str(place)).remove_abandoned()


def swept_from_temporary(place: Path) -> None:
    with temporary_folder("job"):
        pass


SWEEPS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cache": (f"{staging.FOLDER}/", swept_from_cache),
    "output": (f"{FOLDER}/staging/", swept_from_output),
    "temporary": ("owl_wms_", swept_from_temporary),
}


@pytest.mark.parametrize(("begin", "sweep"), SWEEPS.values(), ids=SWEEPS.keys())
def test_a_neighbour_that_may_live_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str, sweep: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    end = "_job_x" if begin == "owl_wms_" else ""
    left: dict[str, Any] = {**OTHERS, "a dead process of this machine": {}}
    made = {
        (title, age): tmp_path / f"{begin}{dataclasses.replace(DEAD, **changes).unique_name()}{end}"
        for title, changes in left.items()
        for age in (0.0, 0.9, 1.1)
    }
    for folder in made.values():
        (folder / "entry").mkdir(parents=True)
    for (_, age), folder in made.items():
        then = folder.parent.stat().st_mtime - age * LEFT_SECONDS
        os.utime(folder, (then, then))
    sweep(tmp_path)
    kept = {(title, age) for (title, age), folder in made.items() if folder.exists()}
    unjudged = {(title, age) for title in OTHERS for age in (0.0, 0.9)}
    if begin.startswith(staging.FOLDER):  # whose lock was free, and locks hold for all containers of one kernel
        unjudged -= {(title, age) for title, age in unjudged if "boot" not in OTHERS[title]}
    assert kept == unjudged
