"""Parsers fed what nobody would write: only our own exceptions, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owl_wms.cache.key import cache_key
from owl_wms.cache.manifest import MAX_BYTES, Manifest, parse
from owl_wms.errors import CacheCorruptError
from tests.faults.conftest import Fault
from tests.faults.tools import MATERIAL

SECONDS, MEMORY = 0.1, 64 * 2**20


def mutations(seeds: list[bytes], count: int, chance: random.Random) -> Iterable[bytes]:
    """Flip, cut, insert, repeat and splice: what a byte-level fuzzer does."""
    interesting = [
        b"",
        b"\0",
        b"\xff\xfe",
        b"{}",
        b"[" * 50,
        b'"',
        b"NaN",
        b"1e999",
        b"-0",
        b"9" * 30,
        b"\\ud800",
        b"null",
        b": ",
        b"- ",
        b"&a *a",
    ]
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            kind = chance.randrange(5)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del data[at : at + chance.randint(1, 40)]
            elif kind == 2:
                data[at:at] = chance.choice(interesting)
            elif kind == 3:
                data[at:at] = data[max(0, at - 30) : at]
            else:
                other = chance.choice(seeds)
                cut = chance.randrange(len(other) + 1)
                data[at:] = other[cut : cut + 4096]
        yield bytes(data)


def slowest_of(
    parse_one: Callable[[bytes], object], inputs: Iterable[bytes], allowed: type[Exception]
) -> tuple[int, int, float]:
    """Inputs tried, inputs accepted, seconds of the slowest; anything but `allowed` propagates.

    Seconds of this thread on a core, the best of three where they are many: a busy machine is not the parser's fault.
    """
    tried = accepted = 0
    slowest = 0.0
    for data in inputs:
        began = time.thread_time()
        try:
            parse_one(data)
            accepted += 1
        except allowed:
            pass
        took = time.thread_time() - began
        for _ in range(2 if took > SECONDS else 0):
            began = time.thread_time()
            with contextlib.suppress(allowed):
                parse_one(data)
            took = min(took, time.thread_time() - began)
        slowest = max(slowest, took)
        tried += 1
    return tried, accepted, slowest


def peak_memory(parse_one: Callable[[bytes], object], data: bytes, allowed: type[Exception]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(allowed):
            parse_one(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _manifest(data: bytes) -> Manifest:
    return parse(data, "manifest.json")


def good_manifest(report: dict[str, object] | None = None) -> bytes:
    made = Manifest(
        name="dcae",
        key=cache_key(MATERIAL),
        material=dict(MATERIAL),
        size=10,
        sha256="a" * 64,
        report=report or {},
        created_unix=1,
    )
    return made.to_bytes(None)


# Large or deep on purpose: what each would cost a parser that looks before it counts.
BOMBS = {
    "brackets": b"[" * MAX_BYTES,
    "braces": b'{"a":' * (MAX_BYTES // 5),
    "lists": b"[" + b"[]," * (MAX_BYTES // 3 - 2) + b"[]]",
    "objects": b"[" + b'{"a":{}},' * 40_000 + b"0]",
    "numbers": b"[" + b"1," * (MAX_BYTES // 2 - 2) + b"1]",
    "one number": b"9" * MAX_BYTES,
    "one float": b"1." + b"9" * (MAX_BYTES - 2),
    "exponent": b"1e" + b"9" * 1000,
    "string": b'"' + b"a" * (MAX_BYTES - 2) + b'"',
    "escapes": b'"' + b"\\u0041" * (MAX_BYTES // 6 - 1) + b'"',
    "keys": b"{" + b",".join(b'"%d":0' % number for number in range(49_000)) + b"}",
    "same key": b"{" + b'"a":0,' * 49_000 + b'"a":0}',
    "too large": b" " * (MAX_BYTES + 1),
    "nothing": b"",
    "spaces": b" " * MAX_BYTES,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    data = BOMBS[name]
    _, accepted, slowest = slowest_of(_manifest, [data], CacheCorruptError)
    assert accepted == 0
    assert slowest < SECONDS
    assert peak_memory(_manifest, data, CacheCorruptError) < MEMORY


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["schema", "name", "key", "material", "program", "report", "created_unix", "hmac_sha256", "seal"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400))
def test_manifest_of_random_bytes(data: bytes) -> None:
    with pytest.raises(CacheCorruptError):
        _manifest(data)


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FIELDS), JSONS)
def test_manifest_with_one_field_replaced_and_sealed_again(field: str, value: object) -> None:
    """The strongest forger: every field can be anything, and the seal fits."""
    import hashlib

    from owl_wms.cache import canonical

    body = json.loads(good_manifest())
    body[field] = value
    if field != "seal":
        del body["seal"]
        body["seal"] = hashlib.sha256(canonical(body)).hexdigest()
    try:
        made = _manifest(canonical(body))
    except CacheCorruptError:
        return
    assert made.key == cache_key(made.material)
    assert isinstance(made.report, dict)
    assert made.size >= 0


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(max_size=8), JSONS, max_size=4))
def test_any_report_comes_back(report: dict[str, object]) -> None:
    from owl_wms.cache.key import normalise

    assert _manifest(good_manifest(normalise(report))).report == normalise(report)


@pytest.mark.timeout(900)
def test_manifest_mutations(fault: Fault) -> None:
    seeds = [good_manifest(), good_manifest({"plans": [{"name": "tensorrt", "ms": 1.5}] * 5, "why": "x" * 200})]
    count = fault.count(1_000_000)

    def only_what_was_written(data: bytes) -> None:
        _manifest(data)
        assert data in seeds, "a changed manifest was accepted"

    inputs = mutations(seeds, count, random.Random(1))
    tried, accepted, slowest = slowest_of(only_what_was_written, inputs, CacheCorruptError)
    assert accepted < tried / 10, "the mutations do not mutate"
    assert slowest < SECONDS
    peak = max(peak_memory(_manifest, data, CacheCorruptError) for data in BOMBS.values())
    assert peak < MEMORY
    fault.record(
        "fuzz-manifest",
        f"{tried} mutated inputs and {len(BOMBS)} bombs: CacheCorruptError only, "
        f"slowest {slowest * 1e3:.0f} ms, at most {peak / 2**20:.0f} MiB",
    )
