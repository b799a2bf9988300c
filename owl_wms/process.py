"""Tells a process apart from every other one that ever had its number, on this machine and on others.

Why: whoever holds a file for as long as it lives may be killed, and its number is given to another process later. On a
shared file system the number may be of another machine, and in a container of another namespace.

Usage:
    name = Process.current().unique_name()
    Process.parse(name).lives()             # True, False, or None: cannot be known from here
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import uuid
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A process.

    Attributes:
        host, boot, namespace: 8 hex digits each: host name, boot of its kernel, namespace its number is valid in.
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
        """Returns whether it is there; None if that cannot be known from here: another machine, another container.

        A process that ended and that its parent has not asked about yet is not there; one that is stopped is.
        """
        here = Process.current()
        if self.boot != here.boot:
            return False if self.host == here.host else None  # this machine was started again since
        if self.namespace != here.namespace or (not _boot() and self.host != here.host) or os.name == "nt":
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

    def is_stopped(self) -> bool:
        """Returns whether it waits for SIGCONT, after Ctrl-Z say. It must be one of this machine that `lives`."""
        found = _stat(self.pid)
        return found is not None and found[0] in "Tt"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


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
