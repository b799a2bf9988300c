"""Keeps a second run out of an output folder that a run is writing.

A run holds the whole output, or a launcher's rank holds its share of it. A local folder has lock files, which the
system releases when their process ends. An object store has lock objects that only one writer can create and that
their owner renews. One that was not renewed for three minutes is taken over. Its owner, if it is alive after all,
sees that at its next renewal and ends.

Usage:
    with held(job) as check:
        for outcome in outcomes:
            check()
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

with suppress(ImportError):  # Windows; see `_flocked`
    import fcntl

from owl_wms.batch.job import Job
from owl_wms.batch.store import FOLDER, Store, own_name
from owl_wms.errors import BatchError, OwlError
from owl_wms.files import one_line

_log = logging.getLogger(__name__)
STALE_SECONDS = 180.0
_RUNNING = "another run is writing here; wait for its end, or give another --out"
_ACTORS_SECONDS = 60.0  # that actors of a killed driver may take until Ray ends them


@contextmanager
def held(job: Job, rank: int | None = None) -> Iterator[Callable[[], None]]:
    """Holds the output of a job while the body runs: all of it, or one rank's share.

    Yields a function to call now and then, which raises BatchError when another run has taken the output over.

    Raises:
        BatchError: another run holds it, or the output cannot be written.
    """
    store = Store(job.out)
    with ExitStack() as stack:
        with _refusing(job.out):
            check = stack.enter_context((_files if store.is_local else _objects)(store, rank))
        yield check


@contextmanager
def quiet(job: Job) -> Iterator[None]:
    """Waits until no Ray actor of an earlier run, whose driver was killed, is at work on a local output.

    Raises:
        BatchError: one still is after a minute.
    """
    store = Store(job.out)
    busy = "actors of an earlier run are at work; end them (ray list actors), then run this again"
    with ExitStack() as stack:
        if store.is_local:
            with _refusing(job.out, busy):
                stack.enter_context(_flocked(store, "actors", exclusive=True, seconds=_ACTORS_SECONDS))
        yield


@contextmanager
def at_work(store: Store) -> Iterator[None]:
    """Holds what `quiet` waits for, while a Ray actor processes a block."""
    here = store.is_local
    with _flocked(store, "actors", exclusive=False, seconds=_ACTORS_SECONDS) if here else nullcontext():
        yield


class _Taken(Exception):
    """Another process holds a lock."""


@contextmanager
def _refusing(out: str, taken: str = _RUNNING) -> Iterator[None]:
    try:
        yield
    except _Taken as error:
        raise BatchError(f"{out}: {taken}", out=out) from error
    except OwlError:
        raise
    except Exception as error:  # a store's library has errors of its own
        said = getattr(error, "strerror", None) or one_line(error)
        raise BatchError(f"{out}: cannot be written: {said}; give an --out that can be", out=out) from error


@contextmanager
def _files(store: Store, rank: int | None) -> Iterator[Callable[[], None]]:
    Path(store.path(FOLDER)).mkdir(parents=True, exist_ok=True)
    mine = nullcontext() if rank is None else _flocked(store, f"rank-{rank}", exclusive=True)
    with _flocked(store, "run", exclusive=rank is None), mine:
        yield lambda: None


@contextmanager
def _flocked(store: Store, name: str, *, exclusive: bool, seconds: float = 0.0) -> Iterator[None]:
    path, end = store.path(f"{FOLDER}/{name}.lock"), time.monotonic() + seconds
    if os.name == "nt":
        raise OSError(None, "Windows has no flock, which keeps a second run out (in WSL it works)")
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        while True:
            try:
                fcntl.flock(number, how | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise _Taken from error
                time.sleep(0.05)
        yield
    finally:
        os.close(number)


@contextmanager
def _objects(store: Store, rank: int | None) -> Iterator[Callable[[], None]]:
    name = "run" if rank is None else f"rank-{rank}"
    lock = _Object(store, f"{FOLDER}/{name}.lock")
    lock.take()
    try:
        # Both sides create first and look then, so that of a run and a rank at most one goes on.
        against = r"rank-\d+\.lock" if rank is None else r"run\.lock"
        others = [other for other in store.names(FOLDER) if re.fullmatch(against, other)]
        if any(_Object(store, f"{FOLDER}/{other}").is_fresh() for other in others):
            raise _Taken
        renewing = threading.Thread(target=lock.renew, name="owl-wms-lock", daemon=True)
        renewing.start()
        try:
            yield lock.check
        finally:
            lock.ended.set()
            renewing.join()
    finally:
        lock.release()


class _Object:
    """A lock object in a store."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._owner = store, name, own_name()
        self.ended, self._lost = threading.Event(), False

    def take(self) -> None:
        """Creates the object, or takes a stale one over.

        Of several that want to take it over, the one that creates a second object, named after the stale owner, does.
        """
        if self._created(self._name):
            return
        there = self._read(self._name)
        if self.is_fresh():
            raise _Taken
        mark = f"{self._name}-after-{there.get('owner', '')}"
        if not self._created(mark):
            if time.time() - float(self._read(mark).get("at", 0)) > STALE_SECONDS:
                self._remove(mark)  # its creator died; the next attempt can take the lock
            raise _Taken
        try:
            if self._read(self._name).get("owner") != there.get("owner"):
                raise _Taken
            self._write()
        finally:
            self._remove(mark)

    def renew(self) -> None:
        while not self.ended.wait(STALE_SECONDS / 4):
            try:
                owner = self._read(self._name).get("owner")
                if owner not in (self._owner, None):
                    self._lost = True
                    return
                self._write()
            except Exception as error:  # the network may be back at the next renewal
                _log.warning("%s: the lock could not be renewed: %s", self._store.url, one_line(error))

    def check(self) -> None:
        if self._lost:
            text = f"{self._store.url}: another run took over, since this one's lock was not renewed for "
            raise BatchError(f"{text}{STALE_SECONDS:g} s; wait for the other one's end", out=self._store.url)

    def release(self) -> None:
        try:
            if self._read(self._name).get("owner") == self._owner:
                self._remove(self._name)
        except Exception as error:  # it becomes stale; the run's own outcome matters more
            _log.warning("%s: the lock could not be removed: %s", self._store.url, one_line(error))

    def is_fresh(self) -> bool:
        at = self._read(self._name).get("at", 0.0)
        return isinstance(at, (int, float)) and time.time() - at < STALE_SECONDS

    def _created(self, name: str) -> bool:
        try:
            with self._store.fs.open(self._store.path(name), "xb") as file:
                file.write(self._stamp())
        except FileExistsError:
            return False
        return True

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._store.read(name) or b"{}")
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._store.write(self._name, self._stamp())

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._store.fs.rm_file(self._store.path(name))

    def _stamp(self) -> bytes:
        return json.dumps({"owner": self._owner, "at": time.time()}).encode()
