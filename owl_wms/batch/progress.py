"""Counts what a run has done, per worker and, under a launcher, for all ranks together; exports it to Prometheus.

Each rank writes its counts into a small file beside the ledger now and then, and rank 0 adds the others' to its own.

Usage:
    tally = Tally()
    for outcome in run(job, source, suffixes, tally=tally): ...
    print(tally.sum().frames)
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from owl_wms.batch.store import FOLDER, Store
from owl_wms.batch.worker import Outcome
from owl_wms.runtime import metrics

_log = logging.getLogger(__name__)
_SECONDS, _REMOTE_SECONDS = 2.0, 15.0  # between two writes to a local folder and to an object store


class Counts(NamedTuple):
    """Items done and failed, frames and bytes written, and seconds of computation."""

    done: int = 0
    failed: int = 0
    frames: int = 0
    size: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """Holds what a run has done so far.

    Attributes:
        total: items of the dataset, or None until they are counted.
        earlier: items seen so far that earlier runs had finished.
        workers: counts by worker of this process's run.
        others: counts by worker of other ranks, as last seen.
    """

    total: int | None = None
    earlier: int = 0
    workers: dict[str, Counts] = field(default_factory=dict)
    others: dict[str, Counts] = field(default_factory=dict)

    def take(self, outcome: Outcome) -> None:
        """Counts an item's outcome, here and in Prometheus' counters `owl_batch_*` where the client is installed."""
        done = outcome.state == "done"
        new = Counts(done, not done, outcome.frames, outcome.size, outcome.seconds)
        old = self.workers.get(outcome.worker, Counts())
        self.workers[outcome.worker] = _sum([old, new])
        for name, by in (("frames", new.frames), ("bytes", new.size), ("seconds", new.seconds)):
            _add(f"owl_batch_{name}", f"{name} of the items that a dataset run has finished", by)
        _add("owl_batch_items", "items that a dataset run has finished", 1, state=outcome.state)

    def sum(self) -> Counts:
        """Returns the counts of all workers, other ranks' included."""
        return _sum([*self.workers.values(), *self.others.values()])


def _sum(counts: list[Counts]) -> Counts:
    done, failed, frames, size, seconds = map(sum, zip(*counts, strict=True)) if counts else Counts()
    return Counts(done, failed, frames, size, seconds)


def _add(name: str, text: str, by: float, **labels: str) -> None:
    counter = metrics.counter(name, text, tuple(labels))
    if counter is not None:
        (counter.labels(**labels) if labels else counter).inc(by)


class Board:
    """The files through which ranks see each other's counts."""

    def __init__(self, store: Store, rank: int, world: int, tally: Tally) -> None:
        """Writes this rank's file for the first time."""
        self._store, self._rank, self._world, self._tally = store, rank, world, tally
        self._began, self._next = time.time(), 0.0
        self._every = _SECONDS if store.is_local else _REMOTE_SECONDS
        self.post()

    def post(self, *, now: bool = False) -> None:
        """Writes this rank's counts, and in rank 0 reads the others', if it is time again."""
        if time.monotonic() < self._next and not now:
            return
        self._next = time.monotonic() + self._every
        facts = {"at": time.time(), "world": self._world, "workers": self._tally.workers}
        try:
            self._store.write(self._name(self._rank), json.dumps(facts).encode())
            if self._rank == 0:
                for rank in range(1, self._world):
                    self._tally.others.update(self._of(rank))
        except Exception as error:  # only a display; a full disk ends the run where outputs are stored
            _log.info("%s: counts cannot be shared: %s", self._store.url, error)

    def _of(self, rank: int) -> dict[str, Counts]:
        try:
            found: dict[str, Any] = json.loads(self._store.read(self._name(rank)) or b"{}")
        except ValueError:
            return {}
        # Of an earlier start if it is older than this rank, less the time in which all ranks start.
        if found.get("world") != self._world or float(found["at"]) < self._began - 60:
            return {}
        return {worker: Counts(*counts) for worker, counts in found["workers"].items()}

    def _name(self, rank: int) -> str:
        return f"{FOLDER}/progress/{rank}.json"
