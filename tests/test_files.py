"""Names that are refused, Windows's rules among them, and what is left where a system has no POSIX calls.

Windows itself was never run: its rules come from Python's own table of reserved names, and the calls that it lacks are
taken away.
"""

from __future__ import annotations

import ast
import ntpath
import os
import subprocess
import sys
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest

from owl_wms import files
from owl_wms.cache.key import entry_name, is_entry_name
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.errors import DataError

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


WITHOUT_POSIX = """
import os, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "chown", "fchmod", "fork", "geteuid",
             "getuid", "killpg", "pread", "preadv", "register_at_fork", "statvfs", "uname"):
    delattr(os, name)
os.supports_dir_fd = set()
from pathlib import Path
from owl_wms import cache, env, files
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
