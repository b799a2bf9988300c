"""Entries damaged, mixed up or forged: refused before anything deserializes them, put aside, built again once."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.cache import CacheStore, Entry, Key, Miss, cache_key, canonical
from owl_wms.cache.manifest import Manifest, parse
from tests.faults.conftest import Fault, Spy
from tests.faults.tools import MATERIAL, NAME, Builder, entry_path, read

FILES = ("program.pt2", "manifest.json")
OTHER = {**MATERIAL, "weights": "ff00"}


def load_as_the_runtime_does(store: CacheStore) -> Any:
    """Look up and, only when verified, deserialize."""
    entry = store.lookup(NAME, Key.of(MATERIAL))
    return torch.export.load(io.BytesIO(entry.read())) if isinstance(entry, Entry) else entry


class Victim:
    """A good entry that can be damaged again and again."""

    def __init__(self, directory: Path, program: bytes) -> None:
        self.directory, self.program = directory, program
        read(CacheStore(directory), Builder(program))
        self.path = entry_path(directory)
        self.good = {name: (self.path / name).read_bytes() for name in FILES}

    def restore(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(self.directory / "quarantine", ignore_errors=True)
        self.path.mkdir(mode=0o700)
        for name, data in self.good.items():
            (self.path / name).write_bytes(data)

    def attack(self, changed: dict[str, bytes]) -> None:
        """Put damaged files in place; see that they are refused, put aside, and the entry is built again once."""
        for name, data in changed.items():
            assert data != self.good[name]
            (self.path / name).write_bytes(data)
        store, build = CacheStore(self.directory), Builder(self.program)
        found = store.lookup(NAME, Key.of(MATERIAL))
        assert isinstance(found, Miss), "damage was not noticed"
        assert found.kind == "corrupt", found.reason
        kept = list((self.directory / "quarantine").iterdir())
        assert len(kept) == 1
        assert (kept[0] / "reason.txt").stat().st_size > 0
        assert read(store, build) == self.program
        assert read(store, build) == self.program
        assert build.runs == 1
        assert store.stats()["quarantined"] == 1
        shutil.rmtree(self.directory / "quarantine")
        self.good["manifest.json"] = (self.path / "manifest.json").read_bytes()  # its time may differ


@pytest.fixture
def victim(folder: Path, program: bytes, deserializers: Spy) -> Victim:
    return Victim(folder / "cache", program)


def test_the_good_entry_loads(victim: Victim, deserializers: Spy) -> None:
    """Without this the refusals below would prove nothing."""
    loaded = load_as_the_runtime_does(CacheStore(victim.directory))
    assert deserializers.calls > 0
    z = torch.randn(1, 4, 2, 2)
    assert torch.equal(loaded.module()(z), torch.export.load(io.BytesIO(victim.program)).module()(z))


@pytest.mark.timeout(900)
def test_single_bit_flips(fault: Fault, victim: Victim, deserializers: Spy) -> None:
    flips, chance = fault.count(10_000), random.Random(5)
    bits = {name: 8 * len(data) for name, data in victim.good.items()}
    # Every bit of the manifest that the count allows, the rest over the program.
    places = [
        ("manifest.json", bit)
        for bit in chance.sample(range(bits["manifest.json"]), min(flips // 3, bits["manifest.json"]))
    ]
    places += [("program.pt2", bit) for bit in chance.sample(range(bits["program.pt2"]), flips - len(places))]
    for name, bit in places:
        data = bytearray(victim.good[name])
        data[bit // 8] ^= 1 << bit % 8
        victim.attack({name: bytes(data)})
    assert deserializers.calls == 0
    fault.record("flips", f"{flips}/{flips} refused and rebuilt once, 0 deserializer calls")


@pytest.mark.timeout(900)
def test_truncation(fault: Fault, victim: Victim, deserializers: Spy) -> None:
    chance, cases = random.Random(6), 0
    for name in FILES:
        size = len(victim.good[name])
        lengths = [length for length in fault.some(range(4097)) if length < size]
        lengths += [chance.randrange(size) for _ in range(fault.count(1000))]
        for length in lengths:
            victim.attack({name: victim.good[name][:length]})
        cases += len(lengths)
    assert deserializers.calls == 0
    fault.record("cuts", f"{cases}/{cases} refused and rebuilt once, 0 deserializer calls")


@pytest.mark.timeout(900)
def test_appended_bytes_and_zero_pages(fault: Fault, victim: Victim, deserializers: Spy) -> None:
    chance, cases = random.Random(8), 0
    for name in FILES:
        for length in fault.some(range(1, 4097, 8)):
            victim.attack({name: victim.good[name] + chance.randbytes(length)})
            cases += 1
    data = victim.program
    for start in fault.some(range(0, len(data), max(1, len(data) // 400))):
        hole = data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :]
        if hole != data:
            victim.attack({"program.pt2": hole})
            cases += 1
    assert deserializers.calls == 0
    fault.record("tails", f"{cases}/{cases} refused and rebuilt once, 0 deserializer calls")


def _second(victim: Victim, program: bytes) -> dict[str, bytes]:
    """A valid entry of another key in the same cache."""
    read(CacheStore(victim.directory), Builder(program), OTHER)
    path = entry_path(victim.directory, OTHER)
    return {name: (path / name).read_bytes() for name in FILES}


def test_swapped_and_rolled_back(fault: Fault, victim: Victim, deserializers: Spy) -> None:
    other = _second(victim, victim.program[:-1] + b"!")
    victim.attack({"program.pt2": other["program.pt2"]})
    victim.restore()
    victim.attack({"manifest.json": other["manifest.json"]})
    victim.restore()
    victim.attack(other)
    victim.restore()
    # An older build of the same key: manifest and program belong together only as pairs.
    old = dict(victim.good)
    shutil.rmtree(victim.path)
    newer = Builder(victim.program + b"newer")
    read(CacheStore(victim.directory), newer)
    victim.good = {name: (victim.path / name).read_bytes() for name in FILES}
    victim.attack({"manifest.json": old["manifest.json"]})
    assert deserializers.calls == 0
    fault.record("swaps", "4/4 kinds refused and rebuilt once, 0 deserializer calls")


def test_wrong_kinds_of_file(victim: Victim, deserializers: Spy, folder: Path) -> None:
    """Links, pipes and directories where files should be: refused without following or blocking."""
    import os

    outside = folder / "outside"
    outside.write_bytes(victim.program)
    for name in FILES:
        for make in (
            lambda path: path.symlink_to(outside),
            lambda path: os.mkfifo(path),
            lambda path: path.mkdir(),
            lambda path: None,
        ):
            victim.restore()
            (victim.path / name).unlink()
            make(victim.path / name)
            store, build = CacheStore(victim.directory), Builder(victim.program)
            assert read(store, build) == victim.program
            assert build.runs == 1
            assert store.stats()["quarantined"] == 1
    shutil.rmtree(victim.path)
    victim.path.symlink_to(folder)
    assert read(CacheStore(victim.directory), Builder(victim.program)) == victim.program
    assert not victim.path.is_symlink()
    assert outside.read_bytes() == victim.program
    assert deserializers.calls == 0


def _reseal(path: Path, hmac_key: bytes | None = None, **changes: Any) -> Manifest:
    """Forge: rewrite a manifest with changed fields and a seal that fits."""
    manifest = dataclasses.replace(parse((path / "manifest.json").read_bytes(), path), **changes)
    (path / "manifest.json").write_bytes(manifest.to_bytes(hmac_key))
    return manifest


def test_signed_cache(fault: Fault, folder: Path, program: bytes, deserializers: Spy) -> None:
    directory, secret = folder / "cache", b"a shared secret"
    signed = lambda key=secret: CacheStore(directory, hmac_key=key)  # noqa: E731
    cases = 0

    def refused(reason: str) -> None:
        nonlocal cases
        found = signed().lookup(NAME, Key.of(MATERIAL))
        assert isinstance(found, Miss)
        assert reason in found.reason
        shutil.rmtree(entry_path(directory), ignore_errors=True)
        cases += 1

    read(CacheStore(directory), Builder(program))
    refused("unsigned")
    read(signed(b"another"), Builder(program))
    refused("another key")
    # The attacker can write everything but does not know the secret: payload replaced, seal recomputed.
    read(signed(), Builder(program))
    path = entry_path(directory)
    signature = json.loads((path / "manifest.json").read_bytes())["hmac_sha256"]
    (path / "program.pt2").write_bytes(b"evil")
    import hashlib

    body = json.loads((path / "manifest.json").read_bytes())
    body["program"] = {"sha256": hashlib.sha256(b"evil").hexdigest(), "size": 4}
    assert body["hmac_sha256"] == signature
    del body["seal"]
    body["seal"] = hashlib.sha256(canonical(body)).hexdigest()
    (path / "manifest.json").write_bytes(canonical(body))
    assert isinstance(CacheStore(directory).lookup(NAME, Key.of(MATERIAL)), Entry), (
        "the forgery is sound but for its signature"
    )
    refused("another key")
    read(signed(), Builder(program))
    found = signed().lookup(NAME, Key.of(MATERIAL))
    assert isinstance(found, Entry)
    assert found.read() == program
    assert deserializers.calls == 0
    fault.record("hmac", f"{cases}/{cases} refused, the signed entry is used")


MACHINE = {
    "torch": "2.11.0",
    "tensorrt": "1.4",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "compute_capability": "9.0",
    "sm_count": 132,
}


@pytest.mark.parametrize(
    ("fact", "was"),
    [
        ("torch", "2.10.0"),
        ("tensorrt", "1.3"),
        ("gpu", "NVIDIA L4"),
        ("driver", "570.1"),
        ("sm_count", 58),
        ("compute_capability", "8.9"),
    ],
)
def test_entries_of_other_machines(
    fact: str, was: Any, fault: Fault, folder: Path, program: bytes, deserializers: Spy
) -> None:
    directory = folder / "cache"
    here, there = {"machine": MACHINE}, {"machine": {**MACHINE, fact: was}}
    store = CacheStore(directory)
    read(store, Builder(program), there)
    assert isinstance(store.lookup(NAME, Key.of(here)), Miss)
    listed = {info.name: info for info in store.entries(MACHINE)}[entry_path(directory, there).name]
    assert listed.status == "miss"
    assert listed.reason == f"{fact} was {was}, is {MACHINE[fact]}"
    # Forged: the other machine's entry is put under the name that this machine will look for.
    entry_path(directory, there).rename(entry_path(directory, here))
    listed = store.entries(MACHINE)[0]
    assert listed.status == "corrupt"
    assert isinstance(store.lookup(NAME, Key.of(here)), Miss)
    # Forged better: the manifest claims this machine's key over that machine's facts.
    read(store, Builder(program), there)
    entry_path(directory, there).rename(entry_path(directory, here))
    text = (entry_path(directory, here) / "manifest.json").read_bytes()
    forged = text.replace(cache_key(there).encode(), cache_key(here).encode())
    assert forged != text
    (entry_path(directory, here) / "manifest.json").write_bytes(forged)
    assert isinstance(store.lookup(NAME, Key.of(here)), Miss)
    assert deserializers.calls == 0
    if fact == "torch":
        fault.record(
            "upgrade",
            "6 facts x 3 ways (honest, moved, forged key), 2 schemas: all missed with a reason, 0 deserializer calls",
        )


@pytest.mark.parametrize("schema", [0, 2])
def test_entries_of_another_schema(schema: int, victim: Victim, deserializers: Spy) -> None:
    import hashlib

    body = json.loads(victim.good["manifest.json"])
    del body["seal"]
    body["schema"] = schema
    body["seal"] = hashlib.sha256(canonical(body)).hexdigest()
    (victim.path / "manifest.json").write_bytes(canonical(body))
    store = CacheStore(victim.directory)
    listed = store.entries()[0]
    assert listed.status == "miss"
    assert f"schema {schema}" in listed.reason
    assert isinstance(load_as_the_runtime_does(store), Miss)
    assert deserializers.calls == 0
