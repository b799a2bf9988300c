"""Hands blocks to Ray Data's actors, one per GPU; Ray schedules, replaces dead actors and repeats their blocks.

The list of blocks is a file beside the ledger, and Ray gets a row per block with its place in that file, so that the
driver holds about 50 bytes per item. A block that is repeated goes on behind the items that its part file has.

Usage:
    workers, gpus = join(None, None)
    for outcome in run_ray(job, blocks, workers, run=run, gpus=gpus): ...
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import socket
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from owl_wms import env
from owl_wms.batch.items import Item
from owl_wms.batch.job import Job, announced
from owl_wms.batch.lock import at_work
from owl_wms.batch.store import FOLDER, Store
from owl_wms.batch.worker import Block, BlockWorker, Outcome
from owl_wms.errors import BatchError, ConfigError, OwlError
from owl_wms.files import one_line

_log = logging.getLogger(__name__)
_ROWS = 4096  # blocks that Ray sees at once
_IN_HAND = 4  # blocks that an actor has: one is computed, one waits, and of short ones some are still being written
_HOST_AND_PORT = re.compile(r"([\w.-]+):(\d+)")
_CONNECT_SECONDS = 10.0
_ENDS = "ends"  # state of an outcome that ends the run


class _RayWorker:
    """A BlockWorker whose rows say where in the list a block stands.

    Ray calls it for several blocks at once. The BlockWorker has a thread of its own and takes them one behind the
    other, so that the GPU computes the next one while the last files of the one before are hashed and put in place.
    """

    def __init__(self, job: Job, run: str) -> None:
        self._job, self._run = job, run
        self._store = Store(job.out)
        self._blocks: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self._asked: dict[str, _Asked] = {}
        self._error: Exception | None = None
        self._lock = threading.Lock()
        try:
            worker = BlockWorker(job)
        except OwlError as error:  # told by the first call: see there
            self._error = BatchError(one_line(error), out=job.out)
            return
        threading.Thread(target=self._work, args=(worker,), name="owl-wms-blocks", daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the outcomes of a batch of one block, as a column; what ends the run is one outcome too.

        Why not an exception: Ray wraps it, and the driver would see that a function failed and not why.
        """
        try:
            outcomes = self._processed(batch)
        except BatchError as error:
            outcomes = [Outcome("", state=_ENDS, reason=str(error))]
        # As JSON: a name that is no UTF-8 could not be a value of Ray's.
        return {"outcome": np.array([json.dumps(outcome) for outcome in outcomes])}

    def _processed(self, batch: dict[str, Any]) -> list[Outcome]:
        with at_work(self._store):
            # The driver may have been killed, and Ray has not ended this actor yet, while another run has begun.
            if announced(self._job) != self._run:
                raise BatchError(f"{self._job.out}: another run has begun; this one ends", out=self._job.out)
            (path,), (start,), (stop,) = batch["path"], batch["start"], batch["stop"]
            name, items = json.loads(self._store.fs.cat_file(str(path), start=int(start), end=int(stop)))
            asked = _Asked([], Future())
            with self._lock:
                if self._error is not None:
                    raise self._error
                self._asked[name] = asked
            self._blocks.put((name, [Item(*fields) for fields in items]))
            asked.ended.result()
            return asked.outcomes

    def _work(self, worker: BlockWorker) -> None:
        try:
            for outcome in worker.run(self._taken(worker)):
                asked = self._asked[outcome.block]
                if outcome.key:
                    asked.outcomes.append(outcome)
                    continue
                del self._asked[outcome.block]
                asked.ended.set_result(None)
        except Exception as error:
            if "CUDA error" in str(error):  # no later call in this process would work; Ray starts another actor
                os._exit(1)
            with self._lock:
                self._error = error
                for asked in self._asked.values():
                    asked.ended.set_exception(error)

    def _taken(self, worker: BlockWorker) -> Iterator[Block | None]:
        while True:
            while worker.is_finishing and self._blocks.empty():
                yield None
            yield self._blocks.get()


class _Asked(NamedTuple):
    """Holds what a call waits for."""

    outcomes: list[Outcome]
    ended: Future[None]


def join(workers: int | None, on_gpus: bool | None) -> tuple[int, float]:
    """Joins the cluster that RAY_ADDRESS names, or starts one on this machine; returns actors and GPUs of each.

    The driver's own machine need not have a GPU: what counts is what the cluster has.

    Args:
        workers: actors, or None for one per GPU of the cluster, or one without a GPU.
        on_gpus: whether each gets a GPU, or None for: if the cluster has one.

    Raises:
        ConfigError: Ray is not installed, its cluster cannot be reached, or GPUs are wanted and it has none.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        text = "--engine ray needs Ray: pip install 'ray[data]'; or take --engine local"
        raise ConfigError(text, key="engine") from error
    address = env.read("RAY_ADDRESS")
    if not ray.is_initialized():
        try:
            if address is not None and (found := _HOST_AND_PORT.fullmatch(address)) is not None:
                # Ray itself would try for a minute and more.
                socket.create_connection((found[1], int(found[2])), _CONNECT_SECONDS).close()
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, OverflowError, RuntimeError) as error:
            remedy = "start it (ray start --head), name another in RAY_ADDRESS, or unset that"
            text = f"no Ray cluster answers at {address or 'this machine'}: {one_line(error)}; {remedy}"
            raise ConfigError(text, key="RAY_ADDRESS") from error
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    if on_gpus and not gpus:
        raise ConfigError("the Ray cluster has no GPU; give --workers in place of --gpus", key="gpus")
    takes = gpus > 0 if on_gpus is None else on_gpus
    return workers or (gpus if takes else 1) or 1, float(takes)


def run_ray(
    job: Job, blocks: Iterator[Block], workers: int, *, run: str, gpus: float = 1.0
) -> Generator[Outcome, None, None]:
    """Yields outcomes as Ray returns them, block by block, after `join`.

    Args:
        job: what to do; its output must be one that every node reaches.
        blocks: named lists of items.
        workers: actors at most.
        run: see `announce`.
        gpus: of each actor; 0 takes one CPU each.

    Raises:
        BatchError: outputs cannot be stored, or Ray gave up.
    """
    import ray
    import ray.data

    if not _log.isEnabledFor(logging.INFO):
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of plans, and of each stage's end
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    store = Store(job.out)
    number = 0
    while rows := _listed(store, blocks, number):
        number += 1
        # All actors start at once; a cluster with room for fewer goes on with those that it can hold.
        compute = ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=workers,
            initial_size=workers,
            max_tasks_in_flight_per_actor=_IN_HAND,
            max_concurrent_calls_per_actor=_IN_HAND,
            enable_true_multi_threading=True,
        )
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker,
            fn_constructor_args=(job, run),
            batch_size=1,
            compute=compute,
            num_gpus=gpus or None,
            num_cpus=None if gpus else 1,
        )
        try:
            for row in data.iter_rows():
                outcome = Outcome(*json.loads(row["outcome"]))
                if outcome.state == _ENDS:
                    raise BatchError(outcome.reason, out=job.out)
                yield outcome
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            text = f"Ray gave up: {one_line(cause)}; run the same command again to go on"
            raise BatchError(text, out=job.out) from error


def _listed(store: Store, blocks: Iterator[Block], number: int) -> list[dict[str, Any]]:
    """Writes up to `_ROWS` blocks as lines of one file, and returns where each of them stands."""
    rows: list[dict[str, Any]] = []
    text = bytearray()
    name = f"{FOLDER}/blocks-{number}.jsonl"
    for block, items in blocks:
        line = json.dumps([block, items]).encode()
        rows.append({"path": store.path(name), "start": len(text), "stop": len(text) + len(line)})
        text += line + b"\n"
        if len(rows) == _ROWS:
            break
    if rows:
        store.write(name, bytes(text))
    return rows
