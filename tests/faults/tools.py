"""What several attacks share: one name, one key, builders, processes, and a way to break system calls."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from owl_wms.cache import CacheStore, Entry, Key, entry_name, fs
from owl_wms.cache.key import cache_key

NAME = "dcae"
MATERIAL = {"weights": "00ff", "torch": "2.11.0", "shape": [8, 128, 8, 8]}
FORK = multiprocessing.get_context("fork")


class Builder:
    """A build that writes known bytes and counts how often it ran."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.runs = 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.runs += 1
        (folder / "program.pt2").write_bytes(self.data)
        return {"latency_ms": 1.25}


def entry_path(directory: Path, material: Mapping[str, Any] = MATERIAL) -> Path:
    return directory / entry_name(NAME, cache_key(material))


def assert_nothing_partial(directory: Path) -> None:
    """Whatever stands under an entry's name is whole."""
    if directory.is_dir():
        bad = [(info.name, info.reason) for info in CacheStore(directory).verify() if info.status != "ok"]
        assert bad == []


def read(
    store: CacheStore, build: Callable[[Path], Mapping[str, Any]], material: Mapping[str, Any] = MATERIAL
) -> bytes:
    entry = store.get_or_build(NAME, Key.of(material), build)
    try:
        return entry.read("program.pt2")
    finally:
        entry.close()


def looked_up(store: CacheStore, material: Mapping[str, Any] = MATERIAL) -> bytes | None:
    entry = store.lookup(NAME, Key.of(material))
    if not isinstance(entry, Entry):
        return None
    data = entry.read()
    entry.close()
    return data


class BrokenCalls:
    """Stands in for `fs._call`: numbers the calls; `decide(index, name)` gives an errno, or None to let it pass."""

    def __init__(self, decide: Callable[[int, str], int | None]) -> None:
        self.names: list[str] = []
        self._decide = decide

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = len(self.names)
        self.names.append(name)
        code = self._decide(index, name)
        if code is None:
            return function(*args, **kwargs)
        if name == "close":  # Linux closes the descriptor whatever it answers
            function(*args, **kwargs)
        raise OSError(code, os.strerror(code))


def gate(monkeypatch: Any, decide: Callable[[int, str], int | None]) -> BrokenCalls:
    broken = BrokenCalls(decide)
    monkeypatch.setattr(fs, "_call", broken)
    return broken


def wait_ok(processes: list[Any], seconds: float = 120.0) -> None:
    """Join every process and see that each ended by itself and well."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * len(processes)
