"""Single flight: of many processes that want one key, one builds and the others wait for it.

Why it is only that: on several network file systems `flock` says yes to everybody, and a stopped process holds its lock
for ever. So a lock here saves work and guards nothing. When it cannot be had in time, the waiter goes on without it and
says who holds it; unique temporary names and one rename keep the entries right either way.

Usage:
    with single_flight(Path("/cache/.locks"), "dcae_0123456789abcdef", timeout=300) as outcome:
        ...                                # outcome.held, or outcome.reason why not
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from owl_wms.cache import fs

POLL_SECONDS = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Flight:
    """The result of taking the lock.

    Attributes:
        held: this caller is the only builder, as far as locks can say.
        timed_out: somebody else held it for the whole timeout.
        reason: why it is not held; empty when it is.
    """

    held: bool
    timed_out: bool = False
    reason: str = ""


@contextlib.contextmanager
def single_flight(directory: Path | None, name: str, timeout: float, mode: int = 0o600) -> Iterator[Flight]:
    """Hold the lock of `name` for the block, or run the block without it.

    Args:
        directory: where lock files stand; None when there is no such place.
        name: entry name.
        timeout: seconds to wait before going on alone.
        mode: permission bits of the lock file.
    """
    if directory is None:
        yield Flight(held=False, reason="the directory for lock files cannot be used")
        return
    lock_path, note_path = directory / f"{name}.lock", directory / f"{name}.holder"
    # thread_local=False: the object lives in this frame only, and the file descriptor, not the thread, is what holds
    # the lock.
    lock = filelock.FileLock(str(lock_path), timeout=timeout, mode=mode, thread_local=False)
    flight = _take(lock, note_path, timeout)
    try:
        yield flight
    finally:
        if flight.held:
            with contextlib.suppress(OSError):
                note_path.unlink(missing_ok=True)
            with contextlib.suppress(Exception):  # see _take
                lock.release()


def _take(lock: filelock.BaseFileLock, note_path: Path, timeout: float) -> Flight:
    try:
        fs._call("lock", lock.acquire, timeout=timeout, poll_interval=POLL_SECONDS)
    except filelock.Timeout:
        return Flight(
            held=False, timed_out=True, reason=f"{_holder(note_path)} has held {lock.lock_file} for {timeout:g} s"
        )
    except Exception as error:  # whatever a lock library meets on a strange file system, it must not stop a build
        return Flight(held=False, reason=f"{lock.lock_file} cannot be locked: {error}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError), open(os.open(note_path, flags, 0o600), "w", encoding="ascii") as note:
        note.write(f"{os.getpid()}\n")
    return Flight(held=True)


def _holder(note_path: Path) -> str:
    """Returns who holds a lock, for a message; never trusted for anything else."""
    try:
        with note_path.open(encoding="ascii", errors="replace") as note:
            text = note.read(20).strip()
    except OSError:
        text = ""
    return f"process {text}" if text.isdigit() else "another process"
