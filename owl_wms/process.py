"""Tells a process apart from every other one that ever had its number, on this machine and on others.

Why: whoever holds a file for as long as it lives may be killed, and its number is given to another process later. On a
shared file system the number may be of another machine, and in a container of another namespace.

Usage:
    name = Process.current().unique_name()
    Process.parse(name).lives()             # True, False, or None: cannot be known from here

Names of machines are no proof: nodes that were made from one image, and containers, often have the same one. So a
process can be judged only by one of the same name, kernel boot and namespace. What others left is never removed
because of their names, but when it is as old as `LEFT_SECONDS`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import platform
import uuid
from pathlib import Path

LEFT_SECONDS = 30 * 86400.0
"""Age of what a process that cannot be judged has left: none of ours writes into one folder for longer."""


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A process.

    Attributes:
        host: 8 hex digits that stand for the host name.
        boot: the same for the boot of its kernel; where no system tells it, for the machine's network address.
        namespace: the same for the namespace its number is valid in.
        pid: process number.
        start: kernel ticks from boot to its start; 0 when that cannot be read.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> Process:
        pid = os.getpid()
        start = (_stat(pid) or ("", 0))[1]
        return cls(_short(platform.node()), _short(_boot()), _short(_namespace()), pid, start)

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """The process in a `unique_name`, None for another text."""
        parts = text.split("-")
        if len(parts) != 6 or not (parts[3].isdecimal() and parts[4].isdecimal()) or len(text) > 120:
            return None
        return cls(parts[0], parts[1], parts[2], int(parts[3]), int(parts[4]))

    def unique_name(self) -> str:
        """Returns `<host>-<boot>-<namespace>-<pid>-<start>-<random>`."""
        return f"{self.host}-{self.boot}-{self.namespace}-{self.pid}-{self.start}-{uuid.uuid4().hex}"

    def lives(self) -> bool | None:
        """Returns whether it is there; None if that cannot be known from here: another machine, another container, or
        this machine before it was started again.

        A process that ended and that its parent has not asked about yet is not there; one that is stopped is.
        """
        here = Process.current()
        same = (self.host, self.boot, self.namespace) == (here.host, here.boot, here.namespace)
        if not same or not _boot() or os.name == "nt":
            return None
        if self.pid < 1:  # to `kill`, a group of processes
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass  # there, and another user's
        found = _stat(self.pid)
        if found is None:
            return True
        state, start = found
        return state not in "ZX" and not (start and self.start and start != self.start)

    def shares_kernel(self) -> bool:
        """Returns whether it belongs to the same boot of the same kernel as this one, whose locks hold for both."""
        return bool(_boot()) and self.boot == _short(_boot())

    def is_stopped(self) -> bool:
        """Returns whether it waits for SIGCONT, after Ctrl-Z say. It must be one of this machine that `lives`."""
        found = _stat(self.pid)
        return found is not None and found[0] in "Tt"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_left(folder: os.stat_result, parent: os.stat_result) -> bool:
    """Returns whether a folder, of a process that cannot be judged, is so old that nobody can be at work in it.

    Both times are the file system's own: the folder around it changes whenever another process begins or ends there.
    """
    return parent.st_mtime - folder.st_mtime > LEFT_SECONDS


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        address = uuid.getnode()
        return "" if address >> 40 & 1 else f"{address:012x}"  # this bit is set in a number drawn for want of one


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start of a process: fields 3 and 22 of `/proc/<pid>/stat` (proc(5)).

    The command in field 2 may hold spaces and brackets, so count from its last bracket.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        fields = text.rsplit(")", 1)[1].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
