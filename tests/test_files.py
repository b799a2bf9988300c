"""Names that are refused, Windows's rules among them, and what is left where a system has no POSIX calls.

Windows itself was never run: its rules come from Python's own table of reserved names, and the calls that it lacks are
taken away.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import ntpath
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import nn

from owl_wms import files
from owl_wms.batch import store
from owl_wms.cache.key import entry_name, is_entry_name
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.errors import DataError, FastPathError
from owl_wms.media import sinks
from owl_wms.media.npy import NpyFile
from owl_wms.process import Process
from owl_wms.request import Request
from owl_wms.trainers import distributed
from owl_wms.trt.build import parent

PACKAGE = Path(files.__file__).parent
POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}


def reserved(name: str) -> bool:
    """Python's own answer."""
    if sys.version_info >= (3, 13):
        return ntpath.isreserved(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return PureWindowsPath(name).is_reserved()


@pytest.mark.parametrize(
    "stem", ["con", "PRN", "aux", "Nul", "com1", "COM9", "lpt1", "com0", "com", "console", "null", "a"]
)
@pytest.mark.parametrize("end", ["", ".npy", ".tar.gz", "1", "_0.npy"])
def test_devices_are_those_that_python_knows(stem: str, end: str) -> None:
    assert (files.unusable_name(stem + end, windows=True) is not None) == reserved(stem + end)
    assert files.unusable_name(stem + end, windows=False) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("clip:1.npy", "':'"),
        ("a\\b", r"'\\'"),
        ("what?", "'?'"),
        ("a\x1fb", "x1f"),
        ("a.", "ends in a dot"),
        ("a ", "ends in a dot or a space"),
        ("com\u00b9.txt", "device"),
        ("CONIN$", "device"),
    ],
)
def test_what_only_windows_refuses(name: str, problem: str) -> None:
    said = files.unusable_name(name, windows=True)
    assert said is not None
    assert problem in said
    assert files.unusable_name(name, windows=False) is None


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256, "\u00e9" * 128])
def test_what_every_system_refuses(name: str, windows: bool) -> None:
    assert files.unusable_name(name, windows=windows) is not None


@pytest.mark.parametrize("name", ["clip 1.npy", ".hidden", "a.b.c", "\u00e9" * 127, "x" * 255])
def test_ordinary_names_pass_everywhere(name: str) -> None:
    assert files.unusable_name(name, windows=True) is None


@pytest.mark.parametrize("model", ["nul.x", "CON", "com1.dcae", "dcae", "aux." + "y" * 80])
def test_entries_are_never_devices(model: str) -> None:
    name = entry_name(model, "0123456789abcdef" * 4)
    assert files.unusable_name(name, windows=True) is None
    assert is_entry_name(name)


@pytest.mark.parametrize("column", ["../up", "", "x" * 300])
def test_a_column_that_is_no_name_makes_no_table(tmp_path: Path, column: str) -> None:
    if column:
        with pytest.raises(DataError, match="no file can be named after column"):
            NpyTableWriter(tmp_path / "table", [column])
    assert not (tmp_path / "table").exists()


def test_reading_needs_no_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.uint8))
    whole = (tmp_path / "a.npy").read_bytes()
    with files.open_regular(tmp_path / "a.npy") as file:
        assert files.read_exactly(file, 9, 130) == whole[130:139]
        assert files.read_exactly(file, len(whole)) == whole


def test_modules_that_windows_lacks_are_imported_with_a_way_out() -> None:
    """At the top of a module such an import stands in a `try` or a `with`."""
    bare = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bare += [f"{path.name}: {name}" for name in names if name in POSIX_ONLY]
    assert bare == []


WINDOWS_LACKS = re.compile(
    r"\bos\.(O_(CLOEXEC|DIRECTORY|NOCTTY|NOFOLLOW|NONBLOCK|SYNC)|WNOHANG|chown|chroot|confstr|fchdir|fchown|fdatasync|"
    r"fork|forkpty|getegid|geteuid|getgid|getgroups|getloadavg|getpgid|getpgrp|getpriority|getsid|getuid|initgroups|"
    r"killpg|lchown|lockf|mkfifo|mknod|nice|pathconf|pipe2|posix_\w+|preadv?|pwritev?|register_at_fork|sched_\w+|"
    r"sendfile|set(e?[gu]id|pgid|priority|sid)|f?statvfs|sync|sysconf|uname|wait[34]?|waitid)\b|"
    r"\bsignal\.(ITIMER_\w+|SIG(ALRM|BUS|CHLD|CONT|HUP|KILL|PIPE|QUIT|STOP|TSTP|TTIN|TTOU|USR[12]|XCPU)|alarm|"
    r"[gs]etitimer|pause|pthread_\w+|siginterrupt|sigpending|sigtimedwait|sigwait(info)?)\b|"
    r"\bsocket\.(AF_UNIX|SO_REUSEPORT)\b|\bselect\.e?poll\b"
)
"""By the documentation of Python 3.13; a `getattr` with a default is no such use."""
BEHIND_A_CHECK = {
    "batch/local.py": "hasattr; sys.platform",
    "batch/lock.py": "os.name, before the first call",
    "cache/fs.py": "`lacking`, before a cache is opened",
    "cache/guard.py": "`fs.lacking`",
    "cache/locks.py": "`fs.lacking`",
    "cache/staging.py": "`fs.lacking`",
    "data/workers.py": "sys.platform",
    "env.py": "hasattr; an except clause",
    "files.py": "hasattr",
    "inference/kept_token.py": "hasattr",
    "interrupts.py": "hasattr",
    "media/sinks.py": "hasattr",
    "settings.py": "after an error that Windows has not",
    "temporary.py": "hasattr",
    "trainers/run_lock.py": "os.name",
    "trt/build/parent.py": "WINDOWS, before a process begins",
    "vae/pieces.py": "hasattr",
}
"""Modules that call something of these, and what keeps them from it on Windows."""


def test_what_windows_lacks_is_called_behind_a_check_alone() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {name for name, text in sources.items() if WINDOWS_LACKS.search(text)}
    assert found <= set(BEHIND_A_CHECK), "each needs a way without it, or a refusal in one line"


def test_a_member_of_an_archive_is_read_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows does not open a temporary file a second time."""
    monkeypatch.delattr(tempfile, "NamedTemporaryFile")
    monkeypatch.delattr(os, "preadv")
    buffer = io.BytesIO()
    np.save(buffer, np.arange(12, dtype=np.int16).reshape(4, 3))
    with NpyFile.of_bytes(buffer.getvalue()) as file:
        assert file.shape == (4, 3)
        assert file.read(1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
    with pytest.raises(ValueError, match="empty"):
        NpyFile.of_bytes(b"")


def test_drafts_stay_where_no_process_can_be_asked_for(tmp_path: Path) -> None:
    """Containers of one machine may share its name and an output, and have numbers of their own for processes."""
    here, out = Process.parse(store.own_name()), store.Store(str(tmp_path))
    assert here is not None
    gone = dataclasses.replace(here, pid=4_194_305)  # larger than any process's number
    elsewhere = dataclasses.replace(gone, namespace="0" * 8)
    for process in (here, gone, elsewhere):
        out.staging(process.unique_name()).mkdir(parents=True)
    out.remove_abandoned()
    left = [Process.parse(folder.name) for folder in out.staging("").iterdir()]
    assert len(left) == 2
    assert here in left
    assert elsewhere in left


def test_frames_are_written_without_pwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite")
    frames = torch.arange(5 * 2 * 3 * 3, dtype=torch.uint8).reshape(5, 2, 3, 3)
    with sinks.ArrayWriter(tmp_path / "a.npy", (5,), sinks.Spent()) as writer:
        writer.write(frames[:2])
        writer.write(frames[2:])
    assert np.array_equal(np.load(tmp_path / "a.npy"), frames.numpy())


def test_a_build_is_refused_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("no process is begun"))
    with pytest.raises(FastPathError, match=r"Windows.*run in WSL"):
        parent.build_program(nn.Conv2d(3, 3, 1), Request(input_shape=(1, 3, 2, 2), device="cpu"), tmp_path)


def test_without_nccl_ranks_meet_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "choose_device", lambda rank: torch.device("cuda", rank))
    monkeypatch.setattr(distributed, "_require_meeting_place", lambda address: None)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, *_, **__: asked.append(backend))
    for there in (True, False):
        monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda there=there: there)
        distributed.setup()
    assert asked == ["nccl", "gloo"]


WITHOUT_POSIX = """
import os, shutil, sys
import numpy, torch, aiohttp, fsspec, platformdirs.unix  # which look at the system themselves
for name in ("fcntl", "grp", "pwd", "resource", "termios", "triton"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "chown", "fchmod", "fork", "geteuid",
             "getuid", "killpg", "pread", "preadv", "register_at_fork", "statvfs", "uname"):
    delattr(os, name)
os.supports_dir_fd = set()
shutil._use_fd_functions = False  # decided when it was imported, by what the system has
from pathlib import Path
from owl_wms import cache, env, files
from owl_wms.inference import limits
from owl_wms.ops import frame_bytes
from owl_wms.trainers import run_lock
store = cache.CacheStore(Path(sys.argv[1]) / "cache")
def build(folder):
    (folder / "program.pt2").write_bytes(b"program")
    return {}
entry = store.get_or_build("m", {"a": 1}, build)
assert entry.read("program.pt2") == b"program" and not entry.cached
print(entry.reason)
print(store.stats()["refused"])
"""


def test_without_posix_calls_programs_are_built_and_not_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_POSIX, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert run.returncode == 0, run.stderr
    reason, refused = run.stdout.splitlines()
    assert reason == refused
    assert "this system has no directory descriptors and flock; run in WSL" in reason
    assert list(tmp_path.iterdir()) == []
