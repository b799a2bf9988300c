"""A loader's worker processes outlive the signals that ask a run to end: only their own trainer ends them.

Why: terminals, launchers and schedulers send these signals to all processes of a job. A trainer then finishes its step
and saves, for which it needs batches, but torch's workers would die of the signal and the run would end with their
error. For SIGTERM, which the trainer itself sends to its workers, this holds for forked workers, which torch makes on
Linux by itself. A spawned worker imports libraries whose threads take the signal, and dies of it.

Usage:
    DataLoader(dataset, num_workers=2, worker_init_fn=keep_reading)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that end a run after its current step; Windows has the first two."""


def keep_reading(worker: int) -> None:
    """Prepare a worker before its first sample; `worker` is its number."""
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and sys.platform == "linux":  # elsewhere a signal does not say who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(trainer.pid,), daemon=True).start()


def _end_with(trainer: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
