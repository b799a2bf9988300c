"""A token is kept for the next server on its port, and only its owner's own, young, readable by nobody else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from owl_wms.inference.kept_token import KEPT_SECONDS, keep_token


def test_the_next_server_on_the_port_has_the_same_token(tmp_path: Path) -> None:
    token = keep_token(8080, tmp_path / "deep" / "folder")
    assert keep_token(8080, tmp_path / "deep" / "folder") == token
    assert keep_token(8081, tmp_path / "deep" / "folder") != token
    file = tmp_path / "deep" / "folder" / "8080.token"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert sorted(path.name for path in file.parent.iterdir()) == ["8080.token", "8081.token"]


@pytest.mark.parametrize("fault", ["old", "readable", "link", "short", "text", "folder"])
def test_a_doubtful_file_is_not_used(tmp_path: Path, fault: str) -> None:
    token, file = keep_token(8080, tmp_path), tmp_path / "8080.token"
    if fault == "old":
        os.utime(file, (time.time() - KEPT_SECONDS - 9,) * 2)
    elif fault == "readable":
        file.chmod(0o644)
    elif fault == "link":
        file.rename(tmp_path / "other")
        file.symlink_to(tmp_path / "other")
    elif fault == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_text({"short": "abc", "text": "a b\n" * 9}[fault])
    fresh = keep_token(8080, tmp_path)
    assert fresh != token
    assert len(fresh) == 32
    assert fault == "folder" or keep_token(8080, tmp_path) == fresh


def test_a_folder_that_cannot_be_made_costs_only_the_keeping(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert keep_token(8080, tmp_path / "file") != keep_token(8080, tmp_path / "file")
