"""What is interrupted, or meets a full disk, leaves the file that stood there and nothing beside it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from owl_wms import whole
from owl_wms.errors import DataError
from owl_wms.media.arrays import load_array, save_array
from owl_wms.media.pictures import save_picture
from owl_wms.media.video import VideoWriter, read_video
from owl_wms.trainers.output import write_clip
from owl_wms.vae import save_weights
from owl_wms.whole import written_whole
from tests.media.test_video import gradient


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/.draft")


class FullAt:
    """A container of PyAV whose disk is full when `call` is called for the second time."""

    def __init__(self, container: Any, call: str) -> None:
        self._container, self._call, self._calls = container, call, 0

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            self._calls += 1
            if self._calls == (2 if name == "mux" else 1):
                self._container.close()
                return full
        return getattr(self._container, name)


def only(folder: Path, name: str, content: bytes) -> None:
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_clip_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old clip")

    def write() -> None:
        with VideoWriter(path) as clip:
            clip.write(gradient(3))
            raise error

    with pytest.raises(error):
        write()
    only(tmp_path, "clip.mp4", b"the old clip")


@pytest.mark.parametrize("call", ["mux", "close"])
def test_a_full_disk_is_one_error_and_leaves_the_old_clip(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the old clip")
    opened = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: FullAt(opened(*a, **k), call))
    refused = pytest.raises(DataError, match=r"clip\.mp4: cannot be written: No space left on device$")
    with refused, VideoWriter(path) as clip:
        clip.write(gradient(60))
    only(tmp_path, "clip.mp4", b"the old clip")


def test_a_finished_clip_takes_the_place_that_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "clip.mp4").write_bytes(b"the old clip")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "real" / "clip.mp4")
    with VideoWriter(tmp_path / "link.mp4") as clip:
        clip.write(gradient(2))
        assert (tmp_path / "link.mp4").read_bytes() == b"the old clip"
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(list(read_video(tmp_path / "real" / "clip.mp4"))) == 2


@pytest.mark.parametrize(
    ("name", "write", "patched"),
    [
        ("z.pt", lambda path: save_array(path, torch.zeros(2)), (torch, "save")),
        ("z.npy", lambda path: save_array(path, torch.zeros(2)), (np, "save")),
        ("s.png", lambda path: save_picture(path, Image.new("RGB", (2, 2))), (Image.Image, "save")),
    ],
    ids=["pt", "npy", "picture"],
)
def test_arrays_and_pictures_too(
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None],
    patched: tuple[Any, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(*patched, full)
    with pytest.raises(DataError, match=f"{name}: cannot be written: No space left on device$"):
        write(tmp_path / name)
    only(tmp_path, name, b"old")


@pytest.mark.parametrize("name", ["z.pt", "z.npy", "z.safetensors"])
def test_a_writer_that_hides_the_reason_is_told_in_words(tmp_path: Path, name: str) -> None:
    """A limit on the sizes of files ends a write in its middle, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DataError, match=r"File too large|the disk is full, or a limit is reached"):
            save_array(tmp_path / name, torch.zeros(4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_endings_in_capitals_are_kept(tmp_path: Path) -> None:
    save_array(tmp_path / "Z.NPY", torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["Z.NPY"]
    assert load_array(tmp_path / "Z.NPY").sum() == 2


def test_a_trainers_clip_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = [torch.zeros(3, 36, 64, 3, dtype=torch.uint8)]
    path = write_clip(tmp_path / "step_1_0", video, None, fps=20)
    whole = path.read_bytes()
    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=full))
    with pytest.raises(DataError, match=r"step_1_0\.mp4: cannot be written: No space left"):
        write_clip(tmp_path / "step_1_0", video, None, fps=20)
    only(tmp_path, "step_1_0.mp4", whole)


def test_the_draft_goes_when_the_body_raises(tmp_path: Path) -> None:
    def write() -> None:
        with written_whole(tmp_path / "deep" / "x.bin") as draft:
            draft.write_bytes(b"half")
            full()

    with pytest.raises(OSError, match="No space left"):
        write()
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("busy", "windows", "written"), [(0, False, True), (1, False, False), (3, True, True), (9, True, False)]
)
def test_a_file_that_windows_keeps_open_is_waited_for(
    busy: int, windows: bool, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left, slept = os.replace, [busy], []

    def replace(source: Path, target: str) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "used by another process")
        real(source, target)

    monkeypatch.setattr(whole, "WINDOWS", windows)
    monkeypatch.setattr(whole.os, "replace", replace)
    monkeypatch.setattr(whole.time, "sleep", slept.append)
    (tmp_path / "x.bin").write_bytes(b"old")

    def write() -> None:
        with written_whole(tmp_path / "x.bin") as draft:
            draft.write_bytes(b"new")

    if written:
        write()
    else:
        with pytest.raises(PermissionError):
            write()
    only(tmp_path, "x.bin", b"new" if written else b"old")
    assert len(slept) == (min(busy, 5) if windows else 0)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    with written_whole(tmp_path / "x.bin") as draft, written_whole(tmp_path / "x.bin") as other:
        draft.write_bytes(b"first")
        other.write_bytes(b"second")
    only(tmp_path, "x.bin", b"first")


@pytest.mark.parametrize("name", ["link.safetensors", f"{'x' * 240}.safetensors"], ids=["a link", "a long name"])
def test_weights_are_written_as_every_file_is(tmp_path: Path, name: str) -> None:
    module = torch.nn.Linear(2, 3)
    if name.startswith("link"):
        (tmp_path / name).symlink_to(tmp_path / "real.safetensors")
    save_weights(module, tmp_path / name)
    assert (tmp_path / name).is_symlink() == name.startswith("link")
    assert load_file(tmp_path / name).keys() == module.state_dict().keys()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
