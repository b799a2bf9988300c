"""Eviction under load, with wrong clocks, and over long use."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from owl_wms.cache import CacheStore, Entry, Key, Miss, evict, staging
from tests.faults.conftest import Fault
from tests.faults.tools import FORK, MATERIAL, NAME, Builder, assert_nothing_partial, entry_path, read, wait_ok

TEN_YEARS_NS = 10 * 365 * 86_400 * 10**9
SIZE = 100_000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def _shift_clock(years_ns: int) -> None:
    original = time.time_ns
    time.time_ns = lambda: original() + years_ns


@pytest.mark.timeout(300)
def test_readers_and_writers_over_a_small_cap(fault: Fault, folder: Path) -> None:
    directory, seconds = folder / "cache", fault.count(60)
    cap, readers, writers, keys = 3, 8, 4, 40
    # An entry stays while it is in somebody's hand, and each has one at most; a writer's new one is in its hand, too.
    # Far fewer than there are keys, so that a cache which does not evict, or not enough, is over it at once.
    bound = cap + readers + writers
    reads, misses, builds = FORK.Value("q", 0), FORK.Value("q", 0), FORK.Value("q", 0)
    largest = FORK.Value("q", 0)
    end = time.monotonic() + seconds

    def store() -> CacheStore:
        return CacheStore(directory, max_bytes=cap * (SIZE + 1000))

    def material(number: int) -> dict[str, Any]:
        return {**MATERIAL, "number": number}

    def writer(seed: int) -> None:
        _shift_clock((-1, 1, 0, 1)[seed % 4] * TEN_YEARS_NS)
        chance = random.Random(seed)
        while time.monotonic() < end:
            number = chance.randrange(keys)
            assert read(store(), Builder(content(number)), material(number)) == content(number)
            with builds.get_lock():
                builds.value += 1
            standing = sum(name.startswith(f"{NAME}_") for name in os.listdir(directory))
            with largest.get_lock():
                largest.value = max(largest.value, standing)

    def reader(seed: int) -> None:
        _shift_clock((0, -1, 1)[seed % 3] * TEN_YEARS_NS)
        chance, expected = random.Random(100 + seed), [content(number) for number in range(keys)]
        while time.monotonic() < end:
            number = chance.randrange(keys)
            found = store().lookup(NAME, Key.of(material(number)))
            if isinstance(found, Entry):
                assert found.read() == expected[number]
                found.close()
                with reads.get_lock():
                    reads.value += 1
            else:
                assert isinstance(found, Miss)
                assert found.kind in ("absent", "gone"), found.reason
                with misses.get_lock():
                    misses.value += 1

    processes = [FORK.Process(target=writer, args=(seed,)) for seed in range(writers)]
    processes += [FORK.Process(target=reader, args=(seed,)) for seed in range(readers)]
    for process in processes:
        process.start()
    wait_ok(processes, seconds + 60)
    assert reads.value > 100
    assert misses.value > 0, "nothing was evicted, so nothing was tried"
    assert not (directory / "quarantine").exists()
    assert_nothing_partial(directory)
    assert cap <= largest.value <= bound
    store().prune()
    assert len(CacheStore(directory).entries()) <= cap
    fault.record(
        "evict",
        f"{seconds} s: {reads.value} reads right, 0 failed, {misses.value} misses, "
        f"{builds.value} writes, at most {largest.value} of {keys} entries at once "
        f"(bound {bound}: cap {cap} and one held by each of {readers + writers}), {cap} at most after",
    )


def test_order_of_use_survives_clocks(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, chance, now = fault.count(300), random.Random(3), time.time_ns()
    for turn in range(turns):
        directory = folder / f"cache{turn}"
        store = CacheStore(directory)
        names = {}
        for number in range(4):
            material = {**MATERIAL, "number": number}
            read(store, Builder(b"x" * 1000), material)
            names[number] = entry_path(directory, material).name
        order = []
        for _ in range(6):  # each use under another clock: 1970, ten years ago, now, in ten years
            number = chance.randrange(4)
            offset = chance.choice((-now + 1, -TEN_YEARS_NS, 0, TEN_YEARS_NS))
            monkeypatch.setattr(time, "time_ns", lambda offset=offset: now + offset)
            assert isinstance(store.lookup(NAME, Key.of({**MATERIAL, "number": number})), Entry)
            order = [name for name in order if name != names[number]] + [names[number]]
        monkeypatch.undo()
        survivor = order[-1]
        size = store.stats()["cache_bytes"] // 4
        assert survivor not in store.prune(size + 10).removed
        assert [info.name for info in store.entries()] == [survivor]
    fault.record(
        "clock", f"{turns} rounds of 6 uses under 4 clocks: the last used entry was the one kept, {turns}/{turns}"
    )


def test_live_writers_outlast_sweeps(fault: Fault, folder: Path) -> None:
    directory = folder / "cache"
    read(CacheStore(directory), Builder(b"x"))
    turns = fault.count(200)
    go, stop = FORK.Semaphore(0), FORK.Event()

    def writer() -> None:
        fd = os.open(directory, os.O_RDONLY)
        staged = staging.StagingFolder.open(fd, directory, 0o700)
        (staged.path / "program.pt2").write_bytes(b"half")
        go.release()
        assert stop.wait(120)
        assert (staged.path / "program.pt2").read_bytes() == b"half"
        staged.close()

    writers = [FORK.Process(target=writer) for _ in range(4)]
    for process in writers:
        process.start()
    for _ in writers:
        assert go.acquire(timeout=30)
    dead = FORK.Process(
        target=lambda: (staging.StagingFolder.open(os.open(directory, os.O_RDONLY), directory, 0o700), os._exit(0))
    )
    dead.start()
    dead.join()
    swept = 0
    for turn in range(turns):
        for path in (directory / ".tmp").iterdir():
            stamp = time.time() + (-1, 0, 1)[turn % 3] * TEN_YEARS_NS / 1e9
            os.utime(path, (stamp, stamp))
        fd = os.open(directory, os.O_RDONLY)
        swept += staging.sweep(fd)
        os.close(fd)
    stop.set()
    wait_ok(writers)
    assert swept == 1, "the dead writer's folder, and only that"
    fault.record("live-writer", f"{turns} sweeps under 3 clocks: 4 of live writers left, 1 of a dead one removed")


def test_no_flock_does_not_sweep_the_living(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks say yes to everybody, the process in the folder's name decides."""
    import fcntl

    directory = folder / "cache"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    fd = os.open(directory, os.O_RDONLY)
    staged = staging.StagingFolder.open(fd, directory, 0o700)
    assert staging.sweep(fd) == 0
    assert staged.path.is_dir()
    staged.close()
    os.close(fd)


@pytest.mark.timeout(600)
def test_descriptors_and_memory_stay_flat(fault: Fault, folder: Path) -> None:
    directory, rounds, me = folder / "cache", fault.count(100_000), psutil.Process()
    data = content(1)[:20_000]
    store = CacheStore(directory)
    read(store, Builder(data))
    for _ in range(500):
        read(store, Builder(data))
    descriptors, memory = me.num_fds(), me.memory_info().rss
    for _ in range(rounds):
        entry = store.lookup(NAME, Key.of(MATERIAL))
        assert isinstance(entry, Entry)
        assert entry.read() == data
        entry.close()
    grown = (me.memory_info().rss - memory) / 2**20
    assert me.num_fds() == descriptors
    assert grown < 8
    fault.record("flat", f"{rounds} rounds: 0 descriptors and {max(0, grown):.1f} MiB more")


def test_unclosed_entries_let_go(folder: Path) -> None:
    """An entry that is dropped without `close` releases its lock and descriptor."""
    store = CacheStore(folder / "cache")
    read(store, Builder(b"x" * 100))
    before = psutil.Process().num_fds()
    held = store.lookup(NAME, Key.of(MATERIAL))
    assert isinstance(held, Entry)
    assert store.prune(0).in_use == (held.name,)
    del held
    assert psutil.Process().num_fds() == before
    assert len(store.prune(0).removed) == 1
    assert evict.last_used(os.open(folder / "cache", os.O_RDONLY)) == {}
