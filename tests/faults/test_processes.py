"""Many processes and threads, killed and stopped ones."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from owl_wms.cache import CacheStore, Key, fs
from tests.faults.conftest import Fault
from tests.faults.tools import FORK, MATERIAL, NAME, Builder, assert_nothing_partial, entry_path, read, wait_ok

PROCESSES = 32
DATA = random.Random(7).randbytes(200_000)


def _crowd(directory: Path, rounds: int, break_flock: bool) -> tuple[list[int], int]:
    """Every process asks for the round's key at once; builds per round, and reads that were right."""
    barrier = FORK.Barrier(PROCESSES)
    builds = FORK.Array("i", rounds)
    right = FORK.Value("i", 0)

    def one(number: int) -> None:
        if break_flock:
            fcntl.flock = lambda descriptor, operation: None  # type: ignore[assignment]
        for turn in range(rounds):
            store = CacheStore(directory)

            def build(folder: Path, turn: int = turn) -> dict[str, Any]:
                with builds.get_lock():
                    builds[turn] += 1
                (folder / "program.pt2").write_bytes(DATA)
                return {}

            barrier.wait(60)
            data = read(store, build, {**MATERIAL, "turn": turn})
            with right.get_lock():
                right.value += data == DATA

    processes = [FORK.Process(target=one, args=(number,)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    wait_ok(processes, 280)
    return list(builds), right.value


@pytest.mark.timeout(600)
def test_one_build_for_32_processes(fault: Fault, folder: Path) -> None:
    rounds = fault.count(50)
    builds, right = _crowd(folder / "cache", rounds, break_flock=False)
    assert builds == [1] * rounds
    assert right == PROCESSES * rounds
    assert_nothing_partial(folder / "cache")
    fault.record(
        "one-key", f"{rounds} rounds: 1 build in each, {right}/{PROCESSES * rounds} reads verified, 0 exceptions"
    )


@pytest.mark.timeout(600)
def test_no_corrupt_read_without_flock(fault: Fault, folder: Path) -> None:
    rounds = fault.count(50)
    builds, right = _crowd(folder / "cache", rounds, break_flock=True)
    assert min(builds) >= 1
    assert right == PROCESSES * rounds
    assert_nothing_partial(folder / "cache")
    mean = sum(builds) / rounds
    fault.record(
        "no-flock",
        f"{rounds} rounds: {mean:.1f} builds a round, {right}/{PROCESSES * rounds} reads verified, 0 exceptions",
    )


def test_threads_share_a_store(fault: Fault, folder: Path) -> None:
    rounds = fault.count(50)
    for turn in range(rounds):
        store, build, seen = CacheStore(folder / "cache"), Builder(DATA), []
        material = {**MATERIAL, "turn": turn}

        def one(
            store: CacheStore = store, build: Builder = build, seen: list[bool] = seen, material: Any = material
        ) -> None:
            seen.append(read(store, build, material) == DATA)

        threads = [threading.Thread(target=one) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert seen == [True] * 16
        assert build.runs == 1
    fault.record("threads", f"{rounds} rounds of 16 threads: 1 build in each, {16 * rounds} reads right")


def test_store_survives_fork(fault: Fault, folder: Path) -> None:
    store, build = CacheStore(folder / "cache"), Builder(DATA)
    entry = store.get_or_build(NAME, Key.of(MATERIAL), build)
    children = fault.count(200)

    def child() -> None:
        assert entry.read() == DATA
        entry.close()
        assert read(store, build) == DATA
        assert read(store, build, {**MATERIAL, "child": os.getpid()}) == DATA

    for _ in range(children):
        process = FORK.Process(target=child)
        process.start()
        wait_ok([process])
    # A child that closed its copy of the entry must not have unlocked the parent's.
    assert store.prune(0).in_use == (entry.name,)
    assert read(store, build) == DATA
    fault.record("fork", f"{children} children read before and after; the parent's entry stayed in use")


def _writer(directory: Path, ready: Any, at_call: int | None) -> None:
    """Publish one entry after another until killed; with `at_call`, die at that system call of the first one."""
    if at_call is not None:
        original, seen = fs._call, [0]

        def counted(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
            if seen[0] == at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            return original(name, function, *args, **kwargs)

        fs._call = counted
    store = CacheStore(directory)
    ready.set()
    turn = 0
    while True:
        read(store, Builder(DATA), MATERIAL if turn == 0 else {**MATERIAL, "turn": turn})
        turn += 1


def _after_a_kill(directory: Path) -> float:
    """What must hold after a writer died; seconds that the next call took."""
    assert_nothing_partial(directory)
    started = time.monotonic()
    store = CacheStore(directory)
    assert read(store, Builder(DATA)) == DATA
    assert read(store, Builder(DATA), {**MATERIAL, "new": started}) == DATA
    seconds = time.monotonic() - started
    staging = directory / ".tmp"
    assert not staging.exists() or list(staging.iterdir()) == []
    store.prune(0)
    return seconds


@pytest.mark.timeout(900)
def test_kill_at_random_moments(fault: Fault, folder: Path) -> None:
    kills, slowest, chance = fault.count(1000), 0.0, random.Random(11)
    for _ in range(kills):
        ready = FORK.Event()
        process = FORK.Process(target=_writer, args=(folder / "cache", ready, None))
        process.start()
        assert ready.wait(30)
        time.sleep(chance.uniform(0, 0.012))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        slowest = max(slowest, _after_a_kill(folder / "cache"))
    assert slowest < 1.0
    fault.record(
        "kill",
        f"{kills} kills: 0 bad entries, 0 exceptions, slowest next call {slowest * 1e3:.0f} ms, nothing left",
    )


@pytest.mark.timeout(900)
def test_kill_at_each_system_call(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = fs._call

    def counting(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(name, function, *args, **kwargs)

    monkeypatch.setattr(fs, "_call", counting)
    read(CacheStore(folder / "measure"), Builder(DATA))
    monkeypatch.undo()
    chosen = fault.some(range(len(calls)))
    for index in chosen:
        directory = folder / f"cache{index}"
        ready = FORK.Event()
        process = FORK.Process(target=_writer, args=(directory, ready, index))
        process.start()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        _after_a_kill(directory)
    fault.record("kill-each", f"{len(chosen)} of {len(calls)} system calls: as above")


def test_waiter_passes_a_stopped_builder(fault: Fault, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    started = FORK.Event()

    def stuck(folder: Path) -> dict[str, Any]:
        started.set()
        time.sleep(600)
        return {}

    holder = FORK.Process(target=lambda: CacheStore(folder / "cache").get_or_build(NAME, Key.of(MATERIAL), stuck))
    holder.start()
    assert started.wait(30)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        store = CacheStore(folder / "cache", lock_timeout=0.5)
        began = time.monotonic()
        assert read(store, Builder(DATA)) == DATA
        waited = time.monotonic() - began
        assert 0.5 <= waited < 30
        assert f"process {holder.pid}" in caplog.text
        assert store.stats()["lock_timeouts"] == 1
        # The stopped builder lives: its folder must outlast any sweep.
        store.prune()
        assert len(list((folder / "cache" / ".tmp").iterdir())) == 1
    finally:
        holder.kill()
        holder.join()
    assert entry_path(folder / "cache").is_dir()
    fault.record(
        "stopped",
        f"answered after {waited:.1f} s (timeout 0.5 s), the message named the process, its folder was left alone",
    )


def test_dead_holder_does_not_block(fault: Fault, folder: Path) -> None:
    turns = fault.count(50)
    for turn in range(turns):
        material = {**MATERIAL, "turn": turn}
        locks = folder / "cache" / ".locks"
        locks.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "cache").chmod(0o700)
        name = entry_path(folder / "cache", material).name
        (locks / f"{name}.lock").write_text("")
        (locks / f"{name}.holder").write_text(f"{os.getppid()}\n")  # alive, and has nothing to do with the lock
        began = time.monotonic()
        assert read(CacheStore(folder / "cache", lock_timeout=30), Builder(DATA), material) == DATA
        assert time.monotonic() - began < 15, "half of the time that a living holder is given"
    fault.record("stale-lock", f"{turns} stale locks: no wait")
