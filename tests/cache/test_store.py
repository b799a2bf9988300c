"""The store as its callers see it; attacks on it are in tests/faults."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from owl_wms.cache import CacheStore, Entry, Key, Miss, NoStore
from owl_wms.cache import entry as entry_module
from owl_wms.cache.manifest import FILE_NAME, PROGRAM, parse
from owl_wms.errors import CacheCorruptError, CacheError, CacheRefusedError, FastPathError
from tests.faults.tools import MATERIAL, NAME, Builder, entry_path, looked_up, read


def test_built_once_then_found(tmp_path: Path) -> None:
    store, build = CacheStore(tmp_path / "cache"), Builder(b"program")
    first = store.get_or_build(NAME, Key.of(MATERIAL), build)
    second = store.get_or_build(NAME, Key.of(MATERIAL), build)
    assert (first.built, second.built, build.runs) == (True, False, 1)
    assert first.read(PROGRAM) == second.read(PROGRAM) == b"program"
    assert second.cached
    assert second.manifest.report == {"latency_ms": 1.25}
    assert second.manifest.material == MATERIAL
    assert sorted(path.name for path in entry_path(tmp_path / "cache").iterdir()) == [FILE_NAME, PROGRAM]
    counts = store.stats()
    assert {name: counts[name] for name in ("hits", "misses", "builds", "published", "entries")} == {
        "hits": 1, "misses": 1, "builds": 1, "published": 1, "entries": 1,
    }  # fmt: skip


def test_a_directory_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CacheStore("~/programs").directory == tmp_path / "programs"


def test_other_material_is_another_entry(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    read(store, Builder(b"one"))
    assert read(store, Builder(b"two"), {**MATERIAL, "weights": "other"}) == b"two"
    assert looked_up(store) == b"one"


def test_a_failing_build_leaves_nothing_and_raises_its_own_error(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")

    def build(folder: Path) -> dict[str, object]:
        (folder / PROGRAM).write_bytes(b"half")
        raise FastPathError("build", "no engine")

    with pytest.raises(FastPathError, match="no engine"):
        store.get_or_build(NAME, Key.of(MATERIAL), build)
    assert isinstance(store.lookup(NAME, Key.of(MATERIAL)), Miss)
    assert list((tmp_path / "cache" / ".tmp").iterdir()) == []
    assert read(store, Builder(b"whole")) == b"whole"


def test_a_build_without_a_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"without writing program\.pt2"):
        CacheStore(tmp_path / "cache").get_or_build(NAME, Key.of(MATERIAL), lambda folder: {})


def test_what_is_not_json_in_a_report_costs_that_value_alone(tmp_path: Path) -> None:
    deep: object = "core"
    for _ in range(50):
        deep = [deep]

    def build(folder: Path) -> dict[str, object]:
        (folder / PROGRAM).write_bytes(b"program")
        (folder / "timing.cache").write_bytes(b"stray")
        rows = ({"error": float("inf"), "plan": "b"}, {"error": 1e-3, "plan": "a"})
        return {
            "ms": float("nan"),
            "precision": "fp16",
            "cuda_graph": True,
            "rows": rows,
            "set": {1},
            3: b"",
            "deep": deep,
        }

    store = CacheStore(tmp_path / "cache")
    entry = store.get_or_build(NAME, Key.of(MATERIAL), build)
    assert entry.cached
    report = entry.manifest.report
    assert (report["ms"], report["precision"], report["cuda_graph"]) == (None, "fp16", True)
    assert report["rows"] == [{"error": None, "plan": "b"}, {"error": 1e-3, "plan": "a"}]
    assert (report["set"], report["3"]) == ("<set>", "<bytes>")
    assert str(report["deep"]).strip("[]") == "'<list>'"
    assert store.get_or_build(NAME, Key.of(MATERIAL), build).manifest.report == report
    assert not (entry_path(tmp_path / "cache") / "timing.cache").exists()


def test_a_program_above_the_limit_is_used_but_not_kept(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache", max_bytes=100)
    entry = store.get_or_build(NAME, Key.of(MATERIAL), Builder(b"x" * 101))
    assert entry.read() == b"x" * 101
    assert not entry.cached
    assert "limit" in entry.reason


def test_entries_in_use_outlast_pruning(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    entry = store.get_or_build(NAME, Key.of(MATERIAL), Builder(b"program"))
    assert store.prune(0).in_use == (entry.name,)
    entry.close()
    assert store.prune(0).removed == (entry.name,)
    assert list((tmp_path / "cache" / ".use").iterdir()) == []


def test_a_closed_entry_says_so(tmp_path: Path) -> None:
    entry = CacheStore(tmp_path / "cache").get_or_build(NAME, Key.of(MATERIAL), Builder(b"program"))
    with pytest.raises(CacheError, match=r"holds program\.pt2"):
        entry.read("manifest.json")
    entry.close()
    entry.close()
    with pytest.raises(CacheError, match="closed"):
        entry.read()


def test_lookup_and_listing_make_no_directory(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    assert isinstance(store.lookup(NAME, Key.of(MATERIAL)), Miss)
    assert store.entries() == store.verify() == []
    assert store.prune(0).removed == ()
    assert not (tmp_path / "cache").exists()


def test_operators_are_told_of_a_refused_directory(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    read(store, Builder(b"program"))
    (tmp_path / "cache").chmod(0o777)
    for ask in (store.entries, store.verify, store.prune):
        with pytest.raises(CacheRefusedError, match="everybody"):
            ask()
    assert "everybody" in store.stats()["refused"]


def test_verify_finds_and_repairs(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    read(store, Builder(b"one"))
    read(store, Builder(b"two"), {**MATERIAL, "weights": "other"})
    (entry_path(tmp_path / "cache") / PROGRAM).write_bytes(b"bad")
    assert sorted(info.status for info in store.verify()) == ["corrupt", "ok"]
    bad = [info for info in store.verify(repair=True) if info.status == "corrupt"]
    assert [info.reason for info in bad] == ["program.pt2 does not match its SHA-256"]
    assert [info.status for info in store.verify()] == ["ok"]
    (entry_path(tmp_path / "cache", {**MATERIAL, "weights": "other"}) / "stray").write_bytes(b"")
    assert "should not" in store.verify()[0].reason


def test_quarantine_is_bounded(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    for turn in range(20):
        read(store, Builder(b"one"))
        (entry_path(tmp_path / "cache") / PROGRAM).write_bytes(b"bad%d" % turn)
    read(store, Builder(b"one"))
    assert len(list((tmp_path / "cache" / "quarantine").iterdir())) == 16
    assert store.stats()["quarantined"] == 20


def test_a_manifest_too_large_to_read_is_not_written(tmp_path: Path) -> None:
    entry = CacheStore(tmp_path / "cache").get_or_build(NAME, Key.of({"graph": "x" * (2 << 20)}), Builder(b"program"))
    assert not entry.cached
    assert "larger than" in entry.reason


def test_manifest_round_trip_and_refusals(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    entry = store.get_or_build(NAME, Key.of(MATERIAL), Builder(b"program"))
    assert isinstance(entry, Entry)
    data = (entry_path(tmp_path / "cache") / FILE_NAME).read_bytes()
    assert parse(data, FILE_NAME) == entry.manifest
    for bad in (
        data + b"\n",
        b" " + data,
        data.replace(b'"schema":1', b'"schema":1.0'),
        data.replace(b'"schema":1', b'"schema":true'),
    ):
        with pytest.raises(CacheCorruptError):
            parse(bad, FILE_NAME)
    with pytest.raises(CacheCorruptError, match="key"):
        dataclasses.replace(entry.manifest, key="0" * 64).to_bytes(None)


def test_the_cache_imports_no_torch() -> None:
    code = "import sys, owl_wms.cache; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_entry_larger_than_the_free_memory_is_a_miss_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CacheStore(tmp_path / "cache")
    store.get_or_build(NAME, Key.of(MATERIAL), Builder(b"program")).close()

    def full(*_: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(entry_module, "_read_program", full)
        found = store.lookup(NAME, Key.of(MATERIAL))
        assert isinstance(found, Miss)
        assert (found.kind, "MemoryError" in found.reason) == ("unreadable", True)
    assert read(store, Builder(b"another")) == b"program"


def test_what_is_raised_beside_the_reading_leaves_no_descriptor_open(tmp_path: Path) -> None:
    store = CacheStore(tmp_path / "cache")
    store.get_or_build(NAME, Key.of(MATERIAL), Builder(b"program")).close()

    def interrupted() -> None:
        raise KeyboardInterrupt

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(KeyboardInterrupt):
        store.lookup(NAME, Key.of(MATERIAL), interrupted)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(KeyboardInterrupt):
        store.get_or_build(NAME, Key.of(MATERIAL), Builder(b"program"), meanwhile=interrupted)
    asked: list[int] = []
    store.get_or_build(NAME, Key.of({"other": 1}), Builder(b"program"), meanwhile=lambda: asked.append(1)).close()
    assert asked == [], "a miss has nothing to read"


def test_a_store_that_stores_nothing_builds_in_its_turn(tmp_path: Path) -> None:
    order: list[str] = []

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        order.append("waited")
        yield
        order.append("left")

    built = NoStore().get_or_build(NAME, Key.of(MATERIAL), Builder(b"program"), waiting=turn)
    assert (built.read(), built.cached, built.built) == (b"program", False, True)
    assert "use_cache=False" in built.reason
    assert order == ["waited", "left"]


def test_a_mapping_is_the_key_that_is_made_of_it(tmp_path: Path) -> None:
    store, material = CacheStore(tmp_path / "cache"), {"weights": "ab", "shape": [1, 2]}

    def build(folder: Path) -> dict[str, object]:
        (folder / "program.pt2").write_bytes(b"the program")
        return {}

    store.get_or_build("m", material, build).close()
    found = store.lookup("m", Key.of(material))
    assert isinstance(found, Entry)
    found.close()
