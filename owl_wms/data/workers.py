"""A loader's worker processes: only their own trainer may end them by SIGTERM.

Why: launchers and schedulers send that signal to all processes of a job. A trainer then finishes its step and saves,
for which it needs batches, but torch's workers would die of the signal and the run would end with their error. This
holds for forked workers, which torch makes on Linux by itself; a spawned one imports libraries whose threads take the
signal, and dies of it.

Usage:
    DataLoader(dataset, num_workers=2, worker_init_fn=keep_reading)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading


def keep_reading(worker: int) -> None:
    """Called in a worker before its first sample; `worker` is its number."""
    trainer = multiprocessing.parent_process()
    if trainer is not None and sys.platform == "linux":  # elsewhere a signal does not say who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(trainer.pid,), daemon=True).start()


def _end_with(trainer: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
