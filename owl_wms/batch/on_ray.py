"""Hands blocks to Ray Data's actors, one per GPU; Ray schedules, replaces dead actors and repeats their blocks.

The list of blocks is a file beside the ledger, and Ray gets a row per block with its place in that file, so that the
driver holds about 50 bytes per item. A block that is repeated goes on behind the items that its part file has.

Usage:
    for outcome in run_ray(job, blocks, workers=2, run=run): ...
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from owl_wms.batch.items import Item
from owl_wms.batch.job import Job, is_announced
from owl_wms.batch.ledger import FOLDER
from owl_wms.batch.lock import at_work
from owl_wms.batch.store import Store
from owl_wms.batch.worker import Block, BlockWorker, Outcome
from owl_wms.errors import BatchError, ConfigError
from owl_wms.files import one_line

_ROWS = 4096  # blocks that Ray sees at once


class _RayWorker:
    """A BlockWorker whose rows say where in the list a block stands."""

    def __init__(self, job: Job, run: str) -> None:
        self._job, self._run = job, run
        self._worker = BlockWorker(job)
        self._store = Store(job.out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with at_work(self._store):
            # The driver may have been killed, and Ray has not ended this actor yet, while another run has begun.
            if not is_announced(self._job, self._run):
                raise BatchError(f"{self._job.out}: another run has begun; this one ends", out=self._job.out)
            return self._processed(batch)

    def _processed(self, batch: dict[str, Any]) -> dict[str, Any]:
        names, items = [], []
        for path, start, stop in zip(batch["path"], batch["start"], batch["stop"], strict=True):
            name, block = json.loads(self._store.fs.cat_file(str(path), start=int(start), end=int(stop)))
            names.append(name)
            items.append([Item(*fields) for fields in block])
        return self._worker({"block": names, "items": items})


def run_ray(job: Job, blocks: Iterator[Block], workers: int, *, run: str, gpus: float = 1.0) -> Iterator[Outcome]:
    """Yields outcomes as Ray returns them, block by block.

    Args:
        job: what to do; its output must be one that every node reaches.
        blocks: named lists of items.
        workers: actors at most.
        run: see `announce`.
        gpus: of each actor; 0 takes one CPU each.

    Raises:
        ConfigError: Ray is not installed.
        BatchError: outputs cannot be stored, or Ray gave up.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        text = "--engine ray needs Ray: pip install 'ray[data]'; or take --engine local"
        raise ConfigError(text, key="engine") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    store = Store(job.out)
    number = 0
    while rows := _listed(store, blocks, number):
        number += 1
        compute = ray.data.ActorPoolStrategy(min_size=1, max_size=workers)
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
                yield Outcome(**{name: row[name] for name in Outcome._fields})
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, BatchError):
                raise cause from error
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
