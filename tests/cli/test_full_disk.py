"""A disk that refuses, or a folder where nothing can be made, is one line and exit code 2; what was whole stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from owl_wms.cli import main
from owl_wms.cli._disk import disk_failure
from owl_wms.data.latent_dataset import make_game_latents
from owl_wms.data.npy_table import NpyTable, NpyTableWriter
from owl_wms.errors import ConfigError, DataError
from owl_wms.media.video import read_video
from owl_wms.trainers.run_log import RunLog
from tests.cli.runner import call, run
from tests.cli.test_refusals import refuse
from tests.cli.test_train import Mean
from tests.trainers.helpers import config, write_table

FULL = "No space left on device"


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def short(*_: Any, **__: Any) -> Any:
    """As numpy tells it."""
    raise OSError("9 requested and 4 written")


def full_in_torch(*_: Any, **__: Any) -> Any:
    """As torch's writer tells it: its own error after the system's."""
    try:
        full()
    except OSError as error:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 896 vs 790") from error


def test_decode(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "o.mp4"
    assert call(place, "decode", "latents.pt", "--out", str(out)) == 0
    before = sorted(place.iterdir())
    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=full))
    capsys.readouterr()
    assert call(place, "decode", "latents.pt", "--out", str(out), "--overwrite") == 2
    error = capsys.readouterr().err
    assert f"o.mp4: cannot be written: {FULL}" in error.replace("\n", " ")
    assert "Traceback" not in error
    assert sorted(place.iterdir()) == before
    assert len(list(read_video(out))) == 10


@pytest.mark.parametrize("how", [full, full_in_torch])
def test_training_names_folder_and_step(
    tmp_path: Path, how: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path)
    config(tmp_path, "rft")
    file = str(tmp_path / "rft.yml")
    assert run("train", file, "--set", "train.max_steps=1") == 0
    monkeypatch.setattr(torch, "save", how)
    message = f"run: step 3 cannot be saved: {FULL}; checkpoints of earlier steps are whole"
    refuse(message, capsys, "train", file, "--resume", "--set", "train.max_steps=3")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "step_1.pt"]


def test_other_errors_of_a_run_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path)
    config(tmp_path, "rft", max_steps=1)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        main(["train", str(tmp_path / "rft.yml")])
    assert disk_failure(FileNotFoundError(errno.ENOENT, "no such file")) is None


@pytest.mark.parametrize("key", ["checkpoint_dir", "output_path", "eval_sample_dir"])
def test_training_tries_its_folders_first(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_table(tmp_path)
    config(tmp_path, "rft")
    file = str(tmp_path / "rft.yml")
    (tmp_path / "file").write_text("kept")
    refuse(f"train.{key}: /proc/foo/x: cannot be written", capsys, "train", file, "--set", f"train.{key}=/proc/foo/x")
    taken = tmp_path if key == "output_path" else tmp_path / "file"
    refuse(f"train.{key}: {taken}: is a f", capsys, "train", file, "--set", f"train.{key}={taken}")
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "run").exists()


def test_the_log_names_its_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (Path("/proc/foo"), tmp_path / "file"):
        with pytest.raises(ConfigError, match=rf"train\.checkpoint_dir: {folder}: cannot be written"):
            RunLog(folder, None, {})


@pytest.mark.parametrize("error", [full, short])
def test_a_table_keeps_its_whole_rows(tmp_path: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"episodes": 1, "frames": 2, "size": (36, 64)}
    make_game_latents(tmp_path, Mean(), **settings)
    before = sorted(tmp_path.iterdir())
    saved, calls = np.save, []

    def second(path: Path, *rest: Any, **more: Any) -> None:
        saved(path, *rest, **more)
        calls.append(path)
        if len(calls) == 2:
            error()

    monkeypatch.setattr(np, "save", second)
    with pytest.raises(
        DataError,
        match=r"row 1 cannot be written: (No space left|the disk is full, or a limit is reached .9 requested)",
    ):
        make_game_latents(tmp_path, Mean(), first_seed=5, **settings)
    assert sorted(tmp_path.iterdir()) == before
    assert len(NpyTable(tmp_path).rows) == 1


def test_data_make_says_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("owl_wms.whole.os.replace", full)
    with pytest.raises(DataError, match=f"cannot be written: {FULL}"):
        NpyTableWriter(tmp_path / "table", ("latents",))
    assert list((tmp_path / "table").iterdir()) == []
    monkeypatch.setattr("owl_wms.vae.load_encoder", lambda *_: Mean())
    refuse(f"t: cannot be written: {FULL}", capsys, "data", "make", str(tmp_path / "t"), "--device", "cpu")


def test_any_command_says_it_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owl_wms.cli.doctor.diagnose", full)
    refuse(f"the disk refused what was written: {FULL}", capsys, "doctor")
