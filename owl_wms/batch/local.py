"""Hands blocks to worker processes of this machine, one per GPU, and replaces the ones that die.

Why processes and not threads: a hanging library, a crash in native code or a CUDA error ends one worker, and the run
goes on. While a worker computes one block, the next one lies in its pipe, however many are still being written, so
that it never waits; a slow item delays the one block behind it.

Usage:
    for outcome in run_local(job, blocks, devices=["cuda:0", "cuda:1"]): ...
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from owl_wms.batch.job import Job
from owl_wms.batch.worker import Block, BlockWorker, Outcome
from owl_wms.errors import BatchError, OwlError
from owl_wms.files import one_line

_CONTEXT: Any = multiprocessing.get_context("spawn")  # a forked process could not use a GPU of its parent
_STARTS = 3  # workers that may end one after the other without having done anything
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class _Worker:
    """One process, its pipe and the blocks that it has, of which it has not begun the last `waiting` ones."""

    def __init__(self, job: Job, device: str | None, threads: int) -> None:
        self.device, self.threads, self.blocks = device, threads, deque[Block]()
        self.waiting, self.ready = 0, False
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_work, args=(job, device, threads, theirs, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, block: Block) -> None:
        self.blocks.append(block)
        self.waiting += 1
        with suppress(OSError):  # it has died, which its pipe reports
            self.pipe.send(block)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_local(job: Job, blocks: Iterator[Block], devices: list[str | None]) -> Generator[Outcome, None, None]:
    """Yields outcomes as they come, each item's once, until every block has ended.

    Args:
        job: what to do.
        blocks: taken as workers ask for them.
        devices: one worker each; None is the device that the worker sees first.

    Raises:
        BatchError: outputs cannot be stored, or workers end before they begin.
        OwlError: the model cannot be loaded.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // len(devices))
    workers = [_Worker(job, device, threads) for device in devices]
    fruitless, told = 0, defaultdict[str, set[str]](set)  # keys of the blocks in hand
    try:
        for worker in workers:
            _fill(worker, blocks)
        while any(worker.blocks for worker in workers):
            for pipe in wait([worker.pipe for worker in workers if worker.blocks]):
                place = next(at for at, worker in enumerate(workers) if worker.pipe is pipe)
                worker = workers[place]
                try:
                    said: Any = worker.pipe.recv()
                except (EOFError, OSError):
                    fruitless = 0 if worker.ready else fruitless + 1
                    worker.stop()
                    if fruitless >= _STARTS:
                        text = f"{_STARTS} workers on {worker.device or 'the first device'} ended while they started"
                        text = f"{text}, with status {worker.process.exitcode}; run one alone with --workers 1 -v"
                        raise BatchError(text, out=job.out) from None
                    workers[place] = _replaced(worker, job)
                    continue
                if isinstance(said, Exception):
                    raise said
                worker.ready = True
                if said is None:  # it has begun a block
                    worker.waiting -= 1
                    _fill(worker, blocks)
                    continue
                if not said.key:
                    worker.blocks.popleft()
                    told.pop(said.block, None)
                elif said.key in told[said.block]:  # by the worker before, which has died
                    continue
                else:
                    told[said.block].add(said.key)
                yield said
    finally:
        for worker in workers:
            worker.stop()


def _fill(worker: _Worker, blocks: Iterator[Block]) -> None:
    if not worker.waiting and (block := next(blocks, None)) is not None:
        worker.give(block)


def _replaced(dead: _Worker, job: Job) -> _Worker:
    worker = _Worker(job, dead.device, dead.threads)
    for block in dead.blocks:
        worker.give(block)
    return worker


def _work(job: Job, device: str | None, threads: int, pipe: Connection, parent: int) -> None:
    """Runs in the worker process."""
    if sys.platform == "linux":  # elsewhere a worker whose parent was killed ends when it next sends or receives
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    if not torch.cuda.is_available():  # workers that decode on a CPU share its cores
        torch.set_num_threads(min(torch.get_num_threads(), threads))
    try:
        worker = BlockWorker(job, device=device)
        for outcome in worker.run(_received(pipe, worker)):
            pipe.send(outcome)
    except OwlError as error:
        pipe.send(error if isinstance(error, BatchError) else BatchError(one_line(error), out=job.out))
    except (BrokenPipeError, ConnectionResetError):
        pass


def _received(pipe: Connection, worker: BlockWorker) -> Iterator[Block | None]:
    while True:
        while worker.is_finishing and not pipe.poll():
            yield None
        try:
            block = pipe.recv()
        except EOFError:
            return
        pipe.send(None)
        yield block
