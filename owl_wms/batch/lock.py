"""Keeps a second run out of an output folder that a run is writing.

A local folder has a lock file, which the system releases when its process ends. An object store has a lock object that
only one writer can create, and that its owner renews; one that has not been renewed for three minutes is taken over.

Usage:
    with held(job, "run"): ...
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from owl_wms.batch.job import Job
from owl_wms.batch.ledger import FOLDER
from owl_wms.batch.store import Store
from owl_wms.errors import BatchError
from owl_wms.files import one_line

STALE_SECONDS = 180.0


@contextmanager
def held(job: Job, name: str) -> Iterator[None]:
    """Holds the lock of this name on the job's output while the body runs.

    Raises:
        BatchError: another run holds it, or the output cannot be written.
    """
    store = Store(job.out)
    taken = f"{job.out}: another run is writing here; wait for its end, or give another --out"
    if store.is_local:
        path = Path(store.path(f"{FOLDER}/{name}.lock"))
        lock = FileLock(path, timeout=0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise BatchError(taken, out=job.out) from error
        except OSError as error:
            text = f"{job.out}: cannot be written: {error.strerror or error}; give an --out that can be"
            raise BatchError(text, out=job.out) from error
        try:
            yield
        finally:
            lock.release()
        return
    path_there = store.path(f"{FOLDER}/{name}.lock")
    owner = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}"
    try:
        _create(store, path_there, owner, taken)
    except OSError as error:
        text = f"{job.out}: cannot be written: {one_line(error)}; give an --out that can be"
        raise BatchError(text, out=job.out) from error
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, path_there, owner, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        store.fs.rm_file(path_there)


def _create(store: Store, path: str, owner: str, taken: str) -> None:
    for _ in range(2):
        try:
            with store.fs.open(path, "xb") as file:
                file.write(_stamp(owner))
            return
        except FileExistsError:
            try:
                store.fs.invalidate_cache()
                at = float(json.loads(store.fs.cat_file(path))["at"])
            except (FileNotFoundError, ValueError, KeyError):
                at = 0.0
            if time.time() - at < STALE_SECONDS:
                raise BatchError(taken, out=store.url) from None
            store.fs.rm_file(path)
    raise BatchError(taken, out=store.url)


def _renew(store: Store, path: str, owner: str, ended: threading.Event) -> None:
    while not ended.wait(STALE_SECONDS / 4):
        store.fs.pipe_file(path, _stamp(owner))


def _stamp(owner: str) -> bytes:
    return json.dumps({"owner": owner, "at": time.time()}).encode()
