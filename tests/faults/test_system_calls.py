"""Each system call of the cache made to fail in turn, and the order in which they are made."""

from __future__ import annotations

import errno
import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from owl_wms.cache import CacheStore
from owl_wms.cache.fs import STORAGE_ERRNOS
from tests.faults.conftest import Fault
from tests.faults.tools import MATERIAL, NAME, Builder, assert_nothing_partial, entry_path, gate, read

CODES = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EDQUOT)
WRITING = ("mkdir", "write", "fsync", "rename", "fchmod", "utime", "unlink", "rmdir", "lock")
DATA = bytes(range(256)) * 200


def _calls(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls that one `get_or_build` makes here."""
    seen = gate(monkeypatch, lambda index, name: None)
    read(CacheStore(directory), Builder(DATA))
    monkeypatch.undo()
    return seen.names


def _cases(count: int, fault: Fault) -> Sequence[tuple[int, int]]:
    return fault.some(list(itertools.product(range(count), CODES)))


@pytest.mark.timeout(900)
def test_each_call_of_the_write_path_fails(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CODES) <= STORAGE_ERRNOS
    count = len(_calls(folder / "measure", monkeypatch))
    cases, kept = _cases(count, fault), 0
    for number, (index, code) in enumerate(cases):
        directory = folder / f"c{number}"
        broken = gate(monkeypatch, lambda at, name, index=index, code=code: code if at == index else None)
        data = read(CacheStore(directory), Builder(DATA))
        monkeypatch.undo()
        assert len(broken.names) > index, "the call that was to fail was never made"
        assert data == DATA
        kept += entry_path(directory).exists()
        assert_nothing_partial(directory)
        again = Builder(DATA)
        assert read(CacheStore(directory), again) == DATA
        assert read(CacheStore(directory), again) == DATA
        assert again.runs <= 1
        assert entry_path(directory).exists()
        shutil.rmtree(directory)
    fault.record(
        "errno-write",
        f"{len(cases)} of {count * len(CODES)} (call, error) pairs: all answered, 0 partial, {kept} kept anyway",
    )


@pytest.mark.timeout(900)
def test_each_call_of_the_read_path_fails(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = folder / "cache"
    read(CacheStore(directory), Builder(DATA))
    count = len(_calls(directory, monkeypatch))
    cases, rebuilt = _cases(count, fault), 0
    for index, code in cases:
        build = Builder(DATA)
        gate(monkeypatch, lambda at, name, index=index, code=code: code if at == index else None)
        data = read(CacheStore(directory), build)
        monkeypatch.undo()
        assert data == DATA
        assert build.runs <= 1
        rebuilt += build.runs
        assert_nothing_partial(directory)
        assert entry_path(directory).exists()
    assert not (directory / "quarantine").exists()
    fault.record(
        "errno-read", f"{len(cases)} of {count * len(CODES)} pairs: all answered, {rebuilt} rebuilt, 0 quarantined"
    )


@pytest.mark.timeout(900)
def test_a_disk_that_breaks_and_stays_broken(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(_calls(folder / "measure", monkeypatch))
    cases = fault.some(list(itertools.product(range(count), (errno.ENOSPC, errno.EROFS, errno.EIO))))
    for number, (start, code) in enumerate(cases):
        directory = folder / f"c{number}"
        gate(
            monkeypatch,
            lambda at, name, start=start, code=code: code if at >= start and name in WRITING else None,
        )
        data = read(CacheStore(directory), Builder(DATA))
        monkeypatch.undo()
        assert data == DATA
        assert_nothing_partial(directory)
        assert read(CacheStore(directory), Builder(DATA)) == DATA
        assert entry_path(directory).exists()
        shutil.rmtree(directory)
    fault.record("errno-rest", f"{len(cases)} (start, error) pairs: all answered, 0 partial, all healed")


def test_durable_order(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = _order([name for name in _calls(folder / "cache", monkeypatch) if name in ("fsync", "rename")])
    assert recorded == ["fsync", "fsync", "fsync", "rename", "fsync"]
    seen = _strace(folder)
    if seen is not None:
        assert seen == ["file", "file", "directory", "rename", "directory"]
    fault.record(
        "order",
        "fsync program, fsync manifest, fsync entry, rename, fsync parent"
        + ("; strace agrees" if seen else "; strace not available"),
    )


def _order(names: list[str]) -> list[str]:
    """The calls around the publishing rename, which is the first one of a fresh build."""
    return names[: names.index("rename") + 2]


def _strace(folder: Path) -> list[str] | None:
    """fsync and rename calls of one build as the kernel saw them, fsync named by its target; None without strace."""
    if shutil.which("strace") is None:
        return None
    log, script = folder / "trace", folder / "one_build.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom owl_wms.cache import CacheStore\n"
        "def build(folder):\n    (folder / 'program.pt2').write_bytes(b'x' * 5000)\n    return {}\n"
        f"CacheStore(sys.argv[1]).get_or_build({NAME!r}, {MATERIAL!r}, build).close()\n"
    )
    command = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync,rename,renameat,renameat2"]
    done = subprocess.run(
        [*command, sys.executable, str(script), str(folder / "traced")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[2],
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )
    if done.returncode != 0 or not log.exists():
        return None
    steps = []
    for line in log.read_text().splitlines():
        if str(folder / "traced") not in line:
            continue
        if "fsync(" in line:
            target = line.split("<", 1)[1].split(">", 1)[0]
            steps.append("file" if target.endswith((".pt2", ".json")) else "directory")
        elif "rename" in line:
            steps.append("rename")
    return steps
