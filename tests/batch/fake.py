"""A decoder that costs nothing, and one that misbehaves as its input says, for tests of the engines."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from owl_wms.batch import Job, prepare
from owl_wms.errors import BatchError, DataError
from owl_wms.timing import Spent


class FakeSource(NamedTuple):
    name: str
    shape: tuple[int, int]
    text: str
    fps: float | None = None


class FakeClips:
    """Makes two frames out of the bytes of a file. A file that begins with a word below does that instead:

    `bad` fails; `large` finds too little memory; `unreadable` fails to open;
    `unstored` finds that no output can be stored; `hang` never ends; `die`
    kills the process; `die-once:PATH` does unless PATH is there, and makes it; `die-parent-once:PATH` kills the parent
    process likewise; `slow:SECONDS` sleeps; `busy:SECONDS` computes for that long.
    """

    def __init__(self, *, device: str | None = None) -> None:
        self.device = device

    def sources(self, path: Path) -> list[FakeSource]:
        text = path.read_text(encoding="utf-8")
        if text == "unreadable":
            raise DataError(f"{path}: is unreadable", path=path)
        return [FakeSource("", (1, 2), text)]

    def stream(self, source: FakeSource, spent: Spent) -> Iterator[torch.Tensor]:
        word, _, value = source.text.partition(":")
        if word == "bad":
            raise DataError("it is bad")
        if word == "large":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if word == "unstored":
            raise BatchError("the bucket is gone", out="bucket")
        if word == "hang":
            time.sleep(1000)
        if word == "die" or (word in ("die-once", "die-parent-once") and not Path(value).exists()):
            if value:
                Path(value).touch()
            os.kill(os.getppid() if word == "die-parent-once" else os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if word == "slow":
            time.sleep(float(value))
        if word == "busy":
            end = time.process_time() + float(value)
            while time.process_time() < end:
                pass
        for number in range(2):
            yield self.piece(source.text, number)

    def piece(self, text: str, number: int) -> torch.Tensor:
        return frames_of(text)[number : number + 1]


def frames_of(text: str) -> torch.Tensor:
    """The two frames that a text stands for, uint8 [2, 2, 4, 4]."""
    digest = np.frombuffer(hashlib.sha512(text.encode()).digest(), np.uint8)
    return torch.from_numpy(digest.reshape(2, 2, 4, 4).copy())


def make_inputs(folder: Path, texts: dict[str, str]) -> Path:
    """A folder of `.pt` files with these texts."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def fake_job(out: Path | str, **options: Any) -> Job:
    """A job of FakeClips that writes `.npy`."""
    return prepare(partial(FakeClips), str(out), form="npy", settings={"fake": 1}, **options)[0]


def outputs_of(job: Job) -> dict[str, bytes]:
    """Name and bytes of every file outside of the ledger, and of what is left in staging."""
    root = Path(job.out)
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("_ledger") or "staging" in name}


def parts(job: Job) -> list[dict[str, Any]]:
    """The whole lines of the ledger, run after run."""
    return list(job.ledger().lines())
