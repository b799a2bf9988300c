"""Processes blocks of items: opens, computes, writes, records. The same under every engine.

Three stages overlap: while one item is computed, the next one is opened (downloaded, from an object store), and up to
four finished ones are hashed, flushed to the disk and put in place. One bad item is an outcome with a reason. Three
faults end the worker: outputs that cannot be stored end the whole run; a CUDA error leaves a process that cannot be
used; and an item over its time limit cannot be interrupted otherwise. Whoever hands out the blocks then gives the same
block to a new worker, which reads the block's part file and goes on behind the item.

Usage:
    worker = BlockWorker(job, device="cuda:0")
    for outcome in worker.run([("block-0", items)]): ...
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from owl_wms.batch.items import Item
from owl_wms.batch.job import FPS, Job
from owl_wms.batch.ledger import Line, Part, are_placed
from owl_wms.batch.outputs import write_frames, write_latents
from owl_wms.batch.store import Store, digest_of, located, own_name, sync
from owl_wms.batch.watch import Watch
from owl_wms.errors import BatchError, DataError, OwlError
from owl_wms.files import one_line, refused_with, unusable_name
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.runtime.ahead import ahead
from owl_wms.timing import Spent

Block = tuple[str, list[Item]]
ATTEMPTS = 3  # workers that may end while they have the same item
_FINISHING = 4  # one thread hashes 1 to 2 GB per second, and a GPU decodes more
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Outcome(NamedTuple):
    """The end of an item, or, without a key, of a block.

    Attributes:
        block: name of its block.
        key: see `Item.key`.
        item: its URL.
        state: `done` or `failed`.
        frames: how many were written.
        seconds: that its computation took.
        size: bytes written.
        reason: of a failure.
        worker: host and process id of the worker.
    """

    block: str
    key: str = ""
    item: str = ""
    state: str = ""
    frames: int = 0
    seconds: float = 0.0
    size: int = 0
    reason: str = ""
    worker: str = ""


class BlockWorker:
    """Processes blocks in this process, on one device."""

    def __init__(self, job: Job, *, device: str | None = None) -> None:
        """Loads the model.

        Args:
            job: what to do.
            device: given to `job.make`.

        Raises:
            OwlError: what `job.make` raises.
        """
        self._job, self._store = job, Store(job.out)
        self._clips = job.make(device=device)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._staging = self._store.staging(own_name())
        self._store.remove_abandoned()
        self._watch = Watch(job.time_limit)
        self._finishing: deque[_Pending] = deque()

    @property
    def is_finishing(self) -> bool:
        """True while `run` has outcomes to come of items that are computed."""
        return bool(self._finishing)

    def run(self, blocks: Iterable[Block | None]) -> Iterator[Outcome]:
        """Yields an outcome per item, and one without a key behind the last item of each block.

        Args:
            blocks: None among them means that none is at hand: one item that is being finished is waited for instead.
                While `is_finishing`, whatever gives out blocks must not wait for the next one, but yield None.

        Raises:
            BatchError: outputs cannot be stored.
        """
        # The end of a block waits for its items, which must not keep a thread from finishing one.
        with ThreadPoolExecutor(_FINISHING, "owl-wms-finish") as pool, ThreadPoolExecutor(1, "owl-wms-end") as ends:
            try:
                for outcome in self._run_blocks(pool, ends, blocks):
                    yield outcome._replace(worker=self.name)
            finally:
                pool.shutdown(cancel_futures=True)
                shutil.rmtree(self._staging, ignore_errors=True)

    def _run_blocks(
        self, pool: ThreadPoolExecutor, ends: ThreadPoolExecutor, blocks: Iterable[Block | None]
    ) -> Iterator[Outcome]:
        """Runs block after block, and yields outcomes in order."""
        finishing = self._finishing
        finishing.clear()
        for block in blocks:
            for pending in self._run_block(pool, ends, *block) if block is not None else ():
                finishing.append(pending)
                while finishing and (finishing[0].outcome.done() or sum(p.is_item for p in finishing) > _FINISHING):
                    yield finishing.popleft().outcome.result()
            if block is None and finishing:
                yield finishing.popleft().outcome.result()
        while finishing:
            yield finishing.popleft().outcome.result()

    def _run_block(
        self, pool: ThreadPoolExecutor, ends: ThreadPoolExecutor, name: str, items: list[Item]
    ) -> Iterator[_Pending]:
        """Computes a block's items, and yields what finishes them."""
        with self._storing():
            part = Part(self._store, name)
        todo, futures = [], []
        for item in items:
            with self._storing():  # outputs are looked at
                settled = self._earlier_outcome(name, part, item)
            if settled is None:
                todo.append(item)
            else:
                yield _Pending(_as_future(settled), True)
        opening = self._open_items(todo)
        if not part.earlier:  # else one item at a time, see below
            opening = ahead(opening, depth=1, name="owl-wms-open")
        with closing(opening) as opened:
            for place, item in enumerate(todo):
                key = item.key(self._job.generation)
                with self._storing():
                    part.add("begin", key, worker=self.name)
                    if place == 0 or part.earlier:
                        part.upload()
                began, spent = time.perf_counter(), Spent()
                try:
                    with self._watch.on(part, key, item), spent.on("open"):
                        sources = next(opened)
                    if isinstance(sources, Exception):
                        raise sources
                    for source in sources:
                        if hasattr(self._clips, "prepare"):
                            self._clips.prepare(source)  # a build is not part of the item's time
                    with self._watch.on(part, key, item):
                        outputs = self._compute(item, key, sources, spent)
                except Exception as error:  # whatever a damaged file leads a library to raise is the item's own fault
                    self._raise_unless_items_fault(error)
                    futures.append(pool.submit(self._failed, name, part, item, key, error))
                else:
                    seconds = time.perf_counter() - began
                    futures.append(pool.submit(self._finish, name, part, item, key, outputs, seconds, spent))
                if part.earlier:  # the next item may be the one that ends workers, and must not end this one with it
                    wait([futures[-1]])
                yield _Pending(futures[-1], True)
        yield _Pending(ends.submit(self._end, name, part, futures), False)

    def _earlier_outcome(self, block: str, part: Part, item: Item) -> Outcome | None:
        """Returns the outcome that an earlier attempt at the block recorded, if there is one."""
        if not part.earlier:
            return None
        key = item.key(self._job.generation)
        lines = [line for line in part.earlier if line["key"] == key]
        last = lines[-1] if lines else {}
        if last.get("event") == "placing" and are_placed(self._store, last):
            part.add_done(last)
            last = {**last, "event": "done"}
        if last.get("event") in ("done", "failed"):
            return _outcome(block, last)
        if sum(line["event"] == "begin" for line in lines) >= ATTEMPTS:
            reason, remedy = f"{ATTEMPTS} workers ended while they had it", "run it alone to see why"
            part.add("failed", key, item=item.url, reason=reason, remedy=remedy)
            return Outcome(block, key, item.url, "failed", reason=reason)
        return None

    def _open_items(self, items: list[Item]) -> Generator[Any, None, None]:
        """Yields the sources of each item, or the error that opening it raised."""
        for item in items:
            try:
                yield self._clips.sources(self._fetch(item))
            except Exception as error:  # see `_run_block`
                yield error

    def _fetch(self, item: Item) -> Path:
        path = self._local(item)
        if "://" not in item.url:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        fs, remote = located(item.url)
        fs.get_file(remote, str(path))
        return path

    def _local(self, item: Item) -> Path:
        """Returns the path of the item on this machine once it is fetched."""
        if "://" not in item.url:
            return Path(item.url)
        return self._staging / f"{item.key(self._job.generation)}-input{Path(item.name).suffix.lower()}"

    def _compute(self, item: Item, key: str, sources: list[Any], spent: Spent) -> list[tuple[Path, str, int]]:
        """Writes the outputs of an item into the staging folder: path, final name and frames of each."""
        written = []
        for number, source in enumerate(sources):
            name = f"{item.name}/{source.name}" if source.name else item.name
            name = f"{name}.{self._job.form}"
            problem = next(filter(None, map(unusable_name, name.split("/"))), None)
            if problem is not None:
                raise DataError(f"a part of its output's name {problem}: {name!r}", path=item.url)
            path = self._staging / f"{key}-{number}.{self._job.form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pieces = self._clips.stream(source, spent)
            if self._job.encodes:
                frames = write_latents(pieces, path, source.facts)
            else:
                fps = self._job.fps or source.fps or FPS
                frames = write_frames(pieces, path, self._job.form, shape=source.shape, fps=fps, spent=spent)
            written.append((path, name, frames))
        if len({name for _, name, _ in written}) != len(written):
            raise DataError("two clips inside it have the same name", path=item.url)
        return written

    def _finish(
        self,
        block: str,
        part: Part,
        item: Item,
        key: str,
        written: list[tuple[Path, str, int]],
        seconds: float,
        spent: Spent,
    ) -> Outcome:
        with self._storing():
            outputs = []
            for path, name, frames in written:
                with spent.on("hash"), path.open("rb", buffering=0) as file:
                    sync(path)
                    digest = digest_of(file)
                outputs.append({"name": name, "sha256": digest, "bytes": path.stat().st_size, "frames": frames})
            facts = {
                "item": item.url,
                "name": item.name,
                "outputs": outputs,
                "frames": sum(int(frames) for *_, frames in written),
                "seconds": round(seconds, 4),
            }
            part.add("placing", key, **facts)
            taken = self._store.place_all([(path, name) for path, name, _ in written])
            if taken is not None:
                text = f"its output {taken} needs the name of another input's file or folder; rename one of them"
                return self._failed(block, part, item, key, DataError(text, path=taken))
            stages = {stage: round(seconds, 4) for stage, seconds in spent.seconds.items()}
            part.add("done", key, **facts, stages=stages)
        if "://" in item.url:
            self._remove_staged(key)
        return _outcome(block, {"event": "done", "key": key, **facts})

    def _failed(self, block: str, part: Part, item: Item, key: str, error: Exception) -> Outcome:
        self._remove_staged(key)
        reason = one_line(str(error).replace(str(self._local(item)), item.url) or type(error).__name__)
        reason = reason.removeprefix(f"{one_line(item.url)}: ")
        reason = reason if isinstance(error, OwlError) else f"{type(error).__name__}: {reason}"
        remedy = "mend or remove the file, then run the same command again"
        if is_out_of_memory(error):
            remedy = "free memory, or give a smaller --batch-size, then run the same command again"
        with self._storing():
            part.add("failed", key, item=item.url, reason=reason, remedy=remedy)
        return Outcome(block, key, item.url, "failed", reason=reason)

    def _remove_staged(self, key: str) -> None:
        for path in self._staging.glob(f"{key}-*"):
            path.unlink(missing_ok=True)

    def _end(self, block: str, part: Part, futures: list[Future[Outcome]]) -> Outcome:
        for future in futures:
            future.result()
        with self._storing():
            part.close()
        return Outcome(block)

    def _raise_unless_items_fault(self, error: Exception) -> None:
        raise_interrupt(error)
        refused = refused_with(error, _REFUSALS)
        if isinstance(error, BatchError):
            raise error
        if refused is not None:
            raise _unstored(self._job.out, refused) from error
        if "CUDA error" in str(error):  # no later call in this process would work
            raise error

    def _storing(self) -> AbstractContextManager[None]:
        return storing(self._job.out)


@contextmanager
def storing(out: str) -> Iterator[None]:
    """Turns every error of the body, which writes to `out`, into the BatchError that ends the run."""
    try:
        yield
    except BatchError:
        raise
    except Exception as error:
        raise _unstored(out, error) from error


def _unstored(out: str, error: Exception) -> BatchError:
    said = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
    return BatchError(
        f"{out}: cannot be written: {said}; make room or mend it, then run the same command again", out=out
    )


def _outcome(block: str, line: Line) -> Outcome:
    size = sum(int(output["bytes"]) for output in line.get("outputs", ()))
    facts = (int(line.get("frames", 0)), float(line.get("seconds", 0)), size, str(line.get("reason", "")))
    return Outcome(block, line["key"], str(line.get("item", "")), line["event"], *facts)


class _Pending(NamedTuple):
    """An outcome that a thread is making: of an item, or of a block's end."""

    outcome: Future[Outcome]
    is_item: bool


def _as_future(outcome: Outcome) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future
