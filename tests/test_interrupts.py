"""An exception of the caller's own signal handler reaches the caller; one that it has handled does not come back."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from owl_wms.data.s3 import TarBucket
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.arrays import load_array, load_tensor_bytes
from owl_wms.media.stills import read_picture
from owl_wms.trainers.checkpoints import load_checkpoint
from owl_wms.vae import read_state_dict


class TimeLimit(Exception):
    pass


def limit(*_: object) -> None:
    raise TimeLimit


def over(*_: object, **__: object) -> None:
    """Stands for whatever runs when the time is over."""
    signal.raise_signal(signal.SIGALRM)


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, limit)
    yield
    signal.signal(signal.SIGALRM, before)


def fetched(_: Path) -> bytes:
    return TarBucket("b", client_factory=lambda: SimpleNamespace(get_object=over), sleep=limit).fetch("a.tar")


READERS = [
    read_state_dict,
    load_array,
    load_checkpoint,
    lambda path: load_tensor_bytes(path.read_bytes()),
    read_picture,
    fetched,
]


@pytest.mark.parametrize("read", READERS)
def test_a_time_limit_ends_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    torch.save({"latents": torch.zeros(1, 4, 2, 2)}, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", over)
    monkeypatch.setattr(Image, "open", over)
    with pytest.raises(TimeLimit):
        read(tmp_path / "x.pt")


def failing(error: Exception) -> None:
    """Fails as a build does, and falls back unless a time limit was the reason."""
    try:
        raise error
    except Exception as caught:
        raise_interrupt(caught)


def test_a_limit_that_the_caller_has_handled_does_not_come_back() -> None:
    try:
        over()
    except TimeLimit:
        failing(RuntimeError("no such kernel"))  # tried again


def test_a_limit_that_led_to_another_error_comes_back() -> None:
    def build() -> None:
        try:
            over()
        except TimeLimit:
            raise RuntimeError("the build failed")  # noqa: B904

    def build_or_fall_back() -> None:
        try:
            build()
        except RuntimeError as error:
            raise_interrupt(error)

    with pytest.raises(TimeLimit):
        build_or_fall_back()
