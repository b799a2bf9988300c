"""Fixtures of the fault suite: counts, the ledger, a small real program as payload, a spy on every deserializer."""

from __future__ import annotations

import io
import os
import pickle
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from tests.faults.ledger import Ledger
from tests.faults.rows import ROWS

Case = TypeVar("Case")
_LEDGER = Ledger()
# Tests of one session may run in part; the table is only written when all of them ran.
_ROWS_WITHOUT_GPU = {name for name, row in ROWS.items() if not row.gpu}


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if not config.getoption("--full-counts") or exitstatus != 0:
        return
    missing = _ROWS_WITHOUT_GPU - set(_LEDGER.outcomes)
    if missing:
        terminalreporter.write_line(f"docs/faults.md is not written: no outcome for {', '.join(sorted(missing))}")
    else:
        _LEDGER.write()
        terminalreporter.write_line("docs/faults.md is written")


class Fault:
    """How a test learns its counts and tells its outcome."""

    def __init__(self, full: bool) -> None:
        self.full = full
        self._reduced = False

    def count(self, full: int) -> int:
        """`full` in a full-count run, else a tenth."""
        self._reduced = True
        return full if self.full else max(1, full // 10)

    def some(self, cases: Sequence[Case]) -> Sequence[Case]:
        """All of the cases in a full-count run, else every tenth."""
        self._reduced = True
        return cases if self.full else cases[::10]

    def record(self, identifier: str, outcome: str) -> None:
        _LEDGER.record(identifier, outcome, self._reduced)


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    return Fault(request.config.getoption("--full-counts"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A fresh directory, in memory where the machine has such a place: the attacks are many and disks are slow."""
    shm = Path("/dev/shm")
    if not (shm.is_dir() and os.access(shm, os.W_OK)):
        yield tmp_path
        return
    place = shm / f"owl_faults_{uuid.uuid4().hex}"
    place.mkdir(mode=0o700)
    try:
        yield place
    finally:
        import shutil

        shutil.rmtree(place, ignore_errors=True)


class SmallDecoder(torch.nn.Module):
    """A decoder in miniature: z [1,4,2,2] -> x [1,3,4,4]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Conv2d(4, 12, 3, padding=1)
        self.outer = torch.nn.PixelShuffle(2)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.nn.functional.leaky_relu(self.inner(z), 0.1))


@pytest.fixture(scope="session")
def program() -> bytes:
    """Bytes of a real exported program."""
    torch.manual_seed(0)
    exported = torch.export.export(SmallDecoder().eval(), (torch.zeros(1, 4, 2, 2),))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


class Spy:
    """Counts the calls of every function that turns bytes into objects."""

    def __init__(self) -> None:
        self.calls = 0


@pytest.fixture
def deserializers(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: object, **kwargs: object) -> object:
            spy.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in (
        (torch.export, "load"),
        (torch, "load"),
        (torch.jit, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch._C, "_pickle_load_obj"),
    ):
        watch(owner, name)
    return spy
