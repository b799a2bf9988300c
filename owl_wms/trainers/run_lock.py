"""Keeps a second training run out of the checkpoint folder of a run that is under way.

A run writes `run.lock` into its folder: its process, host and start, and a number that a thread raises every ten
seconds. Another run reads it before it builds anything, and again before it writes anything, and is refused if the
process that is named there is alive. No lock of the system is held for long: forked data loaders would keep it after
the death of their parent, and a file server would keep it for a node that died.

How a living run is told from a dead one, by the process that the file names:

- one of this machine is alive if it is there, was started then, and has raised the number lately or is stopped;
- any other, of another machine or container or of this machine before it was started again, is alive if the number
  rises while it is watched, for a minute at most (in doubt: a file server that hangs for a minute);
- a file that cannot be read as what a run writes keeps nobody out.

In doubt the new run is let in, and the log says so: a run that does not start at night is as bad as two in one folder.
An old run that was alive after all sees another name in the file before its next checkpoint, and ends without writing.

Usage:
    lock = RunLock(folder)
    lock.look()                 # before anything is built
    lock.take()                 # before anything is written
    lock.check(step)            # before a checkpoint is written
    lock.release()
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from owl_wms.errors import ConfigError, TrainingError
from owl_wms.process import Process
from owl_wms.whole import make_folder

with contextlib.suppress(ImportError):  # Windows, where two runs that begin in one moment may not see each other
    import fcntl

_log = logging.getLogger(__name__)
FILE = "run.lock"
BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
OLD_SECONDS = 600.0
"""Age of a number that nobody has raised: it is not watched any more. Clocks of two machines differ by less."""
_SIZE = 512  # written at once over what was there, so that a reader sees the old text or the new one
_MOMENT_SECONDS = 2.0
_held: set[str] = set()  # names under which this process trains


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of the file.

    Attributes:
        name: of the run: `Process.unique_name`.
        host: for people.
        since: the time at which it began, for people.
        beat: rises while the run lives.
        at: seconds since 1970, of the last rise.
    """

    name: str
    host: str
    since: str
    beat: int
    at: float

    @property
    def process(self) -> Process | None:
        return Process.parse(self.name)

    def lives(self) -> bool | None:
        """Returns whether the run is alive; None if only its beat can tell."""
        process = self.process
        if process is None:
            return False
        if process.pid == os.getpid() and process.lives():  # left by this process, if it does not train
            return self.name in _held
        lives = process.lives()
        if lives and not process.is_stopped() and not -1 <= time.time() - self.at <= PATIENCE_SECONDS:
            return None  # the process is there, and nobody knows that it still trains
        return lives

    def told(self) -> str:
        pid = self.process.pid if self.process else "?"
        return f"process {pid} on {self.host} has been training here since {self.since}"


class RunLock:
    """The claim of one run on its folder.

    Attributes:
        lost: another run has the folder, so nothing may be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.lost = False
        self._folder, self._path = folder, folder / FILE
        self._mine: _Record | None = None
        self._guard = threading.Lock()
        self._over = threading.Event()

    def look(self) -> None:
        """Looks whether another run has the folder, and writes nothing. Takes up to a minute if that is unsure.

        Raises:
            ConfigError: it has.
        """
        self._ended()

    def take(self) -> None:
        """Takes the folder until `release`. Where that cannot be written down, the run goes on without.

        Raises:
            ConfigError: another run has it.
        """
        name, since = Process.current().unique_name(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        mine = _Record(name=name, host=platform.node()[:64], since=since, beat=0, at=time.time())
        try:
            make_folder(self._folder)
            while not self._replaced(self._ended(), mine):
                pass  # another one came in between, or went
        except OSError as error:
            _log.warning("%s cannot be written (%s): a second run would not be kept out", self._path, error.strerror)
            return
        self._mine = mine
        _held.add(name)
        self._over = threading.Event()
        threading.Thread(target=self._beats, args=(self._over,), name="owl-wms-run-lock", daemon=True).start()

    def check(self, step: int) -> None:
        """Looks whether the folder is still this run's, which is at `step`.

        Raises:
            TrainingError: another run has it, which took this one for dead.
        """
        with self._guard:
            mine, now = self._mine, _read(self._path)
            if mine is not None and (self.lost or (now is not None and now.name != mine.name)):
                self.lost = True
                who = "another run has been here" if now is None else now.told()
                text = f"{self._folder}: {who}, since this one gave no sign of life for a minute"
                raise TrainingError(f"{text}; this run ends and writes nothing more; see the other's log", step=step)

    def release(self) -> None:
        """Gives the folder back; nothing happens if it was not taken."""
        self._over.set()
        with self._guard, contextlib.suppress(OSError):
            mine, self._mine = self._mine, None
            if mine is None:
                return
            _held.discard(mine.name)
            with _opened(self._path, os.O_RDWR) as file:
                now = _parsed(os.read(file, _SIZE))
                if now is not None and now.name == mine.name:
                    self._path.unlink()

    def _ended(self) -> _Record | None:
        """Returns what a run that has ended left in the file; None if there is nothing. Raises ConfigError."""
        first = _read(self._path)
        lives = first.lives() if first is not None else False
        if first is None or lives is False:
            return first
        if lives is None:
            here = first.process is not None and first.process.lives()
            if not here and time.time() - first.at > OLD_SECONDS:
                return first
            _log.warning("%s: %s; waiting for a sign of life, a minute at most", self._folder, first.told())
            end = time.monotonic() + PATIENCE_SECONDS
            while (now := _read(self._path)) is not None and (now.name, now.beat) == (first.name, first.beat):
                if time.monotonic() > end:
                    _log.warning("%s: there was none, so that run is taken for ended", self._folder)
                    return first
                time.sleep(min(1.0, PATIENCE_SECONDS / 10))
            if now is None or now.name != first.name:
                return self._ended()
        key = "train.checkpoint_dir"
        stopped = first.process is not None and first.process.lives() and first.process.is_stopped()
        text = f"{key}: {self._folder}: {first.told()}{' and is stopped' if stopped else ''}"
        self.lost = True
        raise ConfigError(f"{text}; wait for its end, stop it, or give another {key}", path=self._folder, key=key)

    def _replaced(self, before: _Record | None, mine: _Record) -> bool:
        """Writes `mine` if the file holds what it held; returns whether it did."""
        with _opened(self._path, os.O_RDWR | os.O_CREAT) as file:
            now = _parsed(os.read(file, _SIZE))
            if now != before:
                return False
            _write(file, mine)
            return os.path.exists(self._path) and os.path.samestat(os.fstat(file), os.stat(self._path))

    def _beats(self, over: threading.Event) -> None:
        """Raises the number until the run ends; a file that was deleted is written again."""
        while not over.wait(BEAT_SECONDS):
            with self._guard, contextlib.suppress(OSError):  # a full disk or a server that is away: the next one counts
                if over.is_set() or self._mine is None:
                    return
                with _opened(self._path, os.O_RDWR | os.O_CREAT) as file:
                    now = _parsed(os.read(file, _SIZE))
                    if now is not None and now.name != self._mine.name:
                        self.lost = True
                        return
                    self._mine = replace(self._mine, beat=self._mine.beat + 1, at=time.time())
                    _write(file, self._mine)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Opens the file for a moment, alone if the file system has locks: nothing is right or wrong by that lock."""
    file = os.open(path, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        end = time.monotonic() + _MOMENT_SECONDS
        while os.name != "nt":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
            except OSError:  # no locks here
                break
        yield file
    finally:
        os.close(file)


def _write(file: int, record: _Record) -> None:
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, json.dumps(vars(record)).encode().ljust(_SIZE - 1) + b"\n")
    os.ftruncate(file, _SIZE)


def _read(path: Path) -> _Record | None:
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError):
        return None
    try:
        return _parsed(os.read(file, _SIZE))
    except OSError:
        return None
    finally:
        os.close(file)


def _parsed(data: bytes) -> _Record | None:
    try:
        found = json.loads(data)
        texts = {name: str(found[name]) for name in ("name", "host", "since")}
        return _Record(**texts, beat=int(found["beat"]), at=float(found["at"]))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
