"""Folders of killed processes are removed by the next one that makes one, and nobody else's."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest

from owl_wms.process import Process
from owl_wms.temporary import temporary_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_goes_at_the_end(place: Path) -> None:
    with temporary_folder("job") as folder:
        assert folder.parent == place
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_text("x")
        with temporary_folder("job"):
            assert (folder / "file").exists(), "of a living process"
    assert list(place.iterdir()) == []


def test_what_a_killed_process_left_is_removed(place: Path) -> None:
    here = Process.current()
    # Its number is in use again, and not by it.
    dead = dataclasses.replace(here, start=here.start + 1).unique_name()
    elsewhere = dataclasses.replace(here, host="0" * 8, boot="0" * 8).unique_name()
    kept = [
        f"owl_wms_{here.unique_name()}_job_a",
        f"owl_wms_{elsewhere}_job_b",
        f"other_{dead}_job_c",
        "owl_wms_x_job_d",
    ]
    for name in (f"owl_wms_{dead}_job_x", *kept):
        (place / name).mkdir()
        (place / name / "decoder.pt").write_text("x")
    link = place / f"owl_wms_{dead}_job_link"
    link.symlink_to(place / kept[2])
    with temporary_folder("job") as folder:
        left = {path.name for path in place.iterdir()} - {folder.name}
    assert left == {*kept, link.name}
    assert (place / kept[2] / "decoder.pt").exists(), "a link was followed"
