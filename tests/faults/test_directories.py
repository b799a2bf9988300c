"""Directories that cannot or must not be used: each has one outcome, and the caller gets its program in all of them."""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_wms.cache import CacheStore, Key
from owl_wms.errors import CacheError
from tests.faults.conftest import Fault
from tests.faults.tools import (
    MATERIAL,
    NAME,
    Builder,
    assert_nothing_partial,
    entry_path,
    looked_up,
    read,
)

DATA = bytes(range(256)) * 40
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make this situation")


def answers_uncached(store: CacheStore, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The program is returned, nothing is kept, and exactly one warning says why."""
    caplog.clear()
    build = Builder(DATA)
    with caplog.at_level(logging.WARNING, "owl_wms.cache"):
        for turn in range(2):
            entry = store.get_or_build(NAME, Key.of({**MATERIAL, "turn": turn}), build)
            assert entry.read() == DATA
            assert not entry.cached
            assert entry.reason
    assert build.runs == 2
    text = [record.getMessage() for record in caplog.records]
    assert any(reason in line for line in text), text
    assert len(text) == len(set(text)) <= 2, "said once: why there is no cache, and that the program is used"


def test_missing(fault: Fault, folder: Path) -> None:
    directory = folder / "a" / "b" / "cache"
    old = os.umask(0)
    try:
        assert read(CacheStore(directory), Builder(DATA)) == DATA
    finally:
        os.umask(old)
    for made in (directory, directory.parent, directory.parent.parent, entry_path(directory)):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert stat.S_IMODE((entry_path(directory) / "program.pt2").stat().st_mode) == 0o600
    assert looked_up(CacheStore(directory)) == DATA
    fault.record("dir-missing", "made with 0700, files 0600, whatever the umask; kept")


@contextlib.contextmanager
def mounted(target: Path, *arguments: str) -> Iterator[None]:
    """Mount something for the block; skips the test where mounting is not allowed."""
    done = subprocess.run(["mount", *arguments, str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


@root_only
def test_read_only(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = folder / "cache"
    directory.mkdir(mode=0o700)
    with mounted(directory, "-t", "tmpfs", "-o", "ro,size=1m,mode=700", "tmpfs"):
        answers_uncached(CacheStore(directory), caplog, "Read-only file system")
    fault.record("dir-read-only", "uncached, one warning")


@root_only
def test_read_only_with_an_entry(fault: Fault, folder: Path) -> None:
    directory, build = folder / "cache", Builder(DATA)
    directory.mkdir(mode=0o700)
    with mounted(directory, "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs"):
        read(CacheStore(directory), Builder(DATA))
        (entry_path(directory) / "program.pt2").chmod(0o400)
        subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
        assert read(CacheStore(directory), build) == DATA
        assert build.runs == 0
    fault.record("dir-read-only-hit", "used, nothing built")


def test_a_file(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "file").write_text("mine")
    answers_uncached(CacheStore(folder / "file"), caplog, "not a directory")
    answers_uncached(CacheStore(folder / "file" / "below"), caplog, "not a directory")
    assert (folder / "file").read_text() == "mine"
    fault.record("dir-file", "refused, uncached, the file untouched")


@root_only
def test_foreign_owner(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = folder / "cache"
    read(CacheStore(directory), Builder(DATA))
    os.chown(directory, 12345, 12345)
    answers_uncached(CacheStore(directory), caplog, "belongs to uid 12345")
    assert looked_up(CacheStore(directory)) is None
    assert read(CacheStore(directory, hmac_key=b"k"), Builder(DATA)) == DATA
    assert looked_up(CacheStore(directory, hmac_key=b"k")) == DATA
    # An entry somebody else planted in a directory that is ours (restored from a backup, say).
    os.chown(directory, 0, 0)
    read(CacheStore(directory), Builder(DATA))
    os.chown(entry_path(directory) / "program.pt2", 12345, 12345)
    assert looked_up(CacheStore(directory)) is None
    fault.record("dir-foreign", "refused, uncached; accepted when signed; a foreign file in it is quarantined")


def test_world_writable(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = folder / "cache"
    read(CacheStore(directory), Builder(DATA))
    for mode in (0o777, 0o702, 0o1777):
        directory.chmod(mode)
        answers_uncached(CacheStore(directory), caplog, "can be written by everybody")
        answers_uncached(CacheStore(directory, hmac_key=b"k"), caplog, "can be written by everybody")
        assert looked_up(CacheStore(directory)) is None
    fault.record("dir-world", "0777, 0702 and 01777 refused, uncached, also when signed")


def test_group_writable(
    fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = folder / "cache"
    read(CacheStore(directory), Builder(DATA))
    directory.chmod(0o770)
    mine = grp.struct_group
    monkeypatch.setattr(grp, "getgrgid", lambda gid: mine(("staff", "x", gid, ["somebody"])))
    answers_uncached(CacheStore(directory), caplog, "can be written by group")
    assert read(CacheStore(directory, hmac_key=b"k"), Builder(DATA)) == DATA
    # The user's private group (umask 002 with user-private groups) has nobody else in it.
    import pwd

    user = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(grp, "getgrgid", lambda gid: mine((user.pw_name, "x", gid, [])))
    assert read(CacheStore(directory), Builder(DATA)) == DATA
    fault.record("dir-group", "refused, uncached; accepted when signed, or when the group is the user's private one")


def test_open_parent(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    parent = folder / "open"
    (parent / "cache").mkdir(parents=True, mode=0o700)
    parent.chmod(0o777)
    answers_uncached(CacheStore(parent / "cache"), caplog, "everybody can replace it")
    parent.chmod(0o1777)
    assert read(CacheStore(parent / "cache"), Builder(DATA)) == DATA
    assert looked_up(CacheStore(parent / "cache")) == DATA
    fault.record("dir-parent", "refused, uncached; with the sticky bit accepted")


def test_links(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = folder / "good"
    read(CacheStore(good), Builder(DATA))
    targets = {"dangling": folder / "nothing", "good": good, "etc": Path("/etc")}
    for name, target in targets.items():
        link = folder / name.join("<>")
        link.symlink_to(target)
        before = sorted(os.listdir(target)) if target.exists() else None
        answers_uncached(CacheStore(link), caplog, "symbolic link")
        assert looked_up(CacheStore(link)) is None
        assert (sorted(os.listdir(target)) if target.exists() else None) == before
    fault.record("dir-link", "3/3 refused, uncached, targets untouched")


def test_links_inside(fault: Fault, folder: Path) -> None:
    outside = folder / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    for inner in (".tmp", ".use", ".locks", "quarantine"):
        directory = folder / f"cache{inner}"
        directory.mkdir(mode=0o700)
        (directory / inner).symlink_to(outside)
        store = CacheStore(directory)
        assert read(store, Builder(DATA)) == DATA
        if entry_path(directory).exists():
            (entry_path(directory) / "program.pt2").write_bytes(b"damage")
        assert read(store, Builder(DATA)) == DATA
        store.prune(0)
        assert (outside / "precious").read_text() == "mine"
        assert [path.name for path in outside.iterdir()] == ["precious"]
    fault.record("dir-inner-links", "4 folders: answered each time, nothing written elsewhere")


@root_only
def test_noexec(fault: Fault, folder: Path) -> None:
    directory = folder / "cache"
    directory.mkdir(mode=0o700)
    with mounted(directory, "-t", "tmpfs", "-o", "noexec,nosuid,nodev,mode=700", "tmpfs"):
        assert read(CacheStore(directory), Builder(DATA)) == DATA
        assert looked_up(CacheStore(directory)) == DATA
    fault.record("dir-noexec", "kept and used")


def test_names(fault: Fault, folder: Path) -> None:
    names = [
        "x" * 255,
        "../../etc/passwd",
        "a/b\\c",
        "...",
        "",
        "\0\n\x1b[31m",
        "ü" * 300,
        "-rf",
        ".locks",
        "quarantine",
    ]
    for name in names:
        store, build = CacheStore(folder / "cache"), Builder(DATA)
        store.get_or_build(name, Key.of(MATERIAL), build).close()
        entry = store.get_or_build(name, Key.of(MATERIAL), build)
        assert entry.cached
        assert build.runs <= 1
        assert entry.path is not None
        assert entry.path.parent == folder / "cache"
        assert len(entry.path.name.encode()) <= 81
    assert_nothing_partial(folder / "cache")
    fault.record("dir-name", f"{len(names)}/{len(names)} kept under a safe name of at most 81 bytes")


def test_no_home(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    from owl_wms.settings import default_cache_dir

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    # As when installed elsewhere: the user's cache folder has to be found without a home.
    monkeypatch.setattr("owl_wms.settings.__file__", str(folder / "site" / "owl_wms" / "settings.py"))
    monkeypatch.chdir(folder)
    directory = default_cache_dir()
    assert read(CacheStore(directory), Builder(DATA)) == DATA
    fault.record("dir-no-home", "a default directory is still named, and the program is returned")


def test_no_place_at_all(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")

    def none(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", none)
    with pytest.raises(CacheError, match=r"no directory to build in: .*/file .* no temporary one: .*temporary"):
        CacheStore(folder / "file").get_or_build(NAME, Key.of(MATERIAL), Builder(DATA))
    fault.record("dir-no-temp", "CacheError that names both places")


@root_only
@pytest.mark.timeout(600)
def test_full_file_system(fault: Fault, folder: Path) -> None:
    """Real tmpfs mounts; the build writes into the cache's file system first and fails there as a real one would."""
    data = os.urandom(100_000)
    sizes = [4096 * pages for pages in range(1, 65)]  # the kernel counts in pages; 64 of them hold more than the entry
    chosen = fault.some(sizes)
    kept = 0
    for size in chosen:
        directory = folder / "cache"
        directory.mkdir(mode=0o700)
        with mounted(directory, "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs"):
            store = CacheStore(directory)
            assert read(store, Builder(data)) == data
            kept += entry_path(directory).exists()
            assert_nothing_partial(directory)
            staging = directory / ".tmp"
            assert not staging.exists() or list(staging.iterdir()) == []
            if not entry_path(directory).exists():
                with contextlib.suppress(OSError):
                    assert shutil.disk_usage(directory).used <= 4096 * 8, "leftovers"
        directory.rmdir()
    assert 0 < kept < len(chosen)
    fault.record(
        "full",
        f"{len(chosen)} sizes from {sizes[0]} to {sizes[-1]} bytes: all answered, {kept} kept, 0 partial, nothing left",
    )
