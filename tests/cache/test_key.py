"""Keys: pure, exact, and different for anything that differs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_wms.cache.key import cache_key, canonical, entry_name, is_entry_name, label, normalise
from owl_wms.errors import ConfigError

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
MATERIALS = st.dictionaries(st.text(max_size=6), VALUES, max_size=6)


@settings(deadline=None, max_examples=100)
@given(MATERIALS)
def test_order_does_not_matter(material: dict[str, object]) -> None:
    assert cache_key(dict(reversed(list(material.items())))) == cache_key(material)


@settings(deadline=None, max_examples=150)
@given(MATERIALS, MATERIALS)
def test_equal_keys_mean_equal_material(one: dict[str, object], other: dict[str, object]) -> None:
    assert (cache_key(one) == cache_key(other)) == (canonical(normalise(one)) == canonical(normalise(other)))


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.text(max_size=6), VALUES, min_size=1, max_size=6), VALUES, st.data())
def test_each_field_changes_the_key(material: dict[str, object], value: object, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(material)))
    changed = {**material, field: value}
    same = canonical(normalise(changed)) == canonical(normalise(material))
    assert (cache_key(changed) == cache_key(material)) is same
    assert cache_key({key: item for key, item in material.items() if key != field}) != cache_key(material)


def test_types_are_told_apart() -> None:
    keys = {cache_key({"a": value}) for value in (1, 1.0, True, "1", None, [1], {"1": 1}, "", [], {}, 0, False, "true")}
    assert len(keys) == 13


def test_tuples_count_as_lists() -> None:
    assert cache_key({"shape": (8, 128, (8, 8))}) == cache_key({"shape": [8, 128, [8, 8]]})


@pytest.mark.parametrize(
    ("value", "place"),
    [({1, 2}, "material.a"), ([b"x"], r"material.a\[0\]"), ({"b": float("nan")}, "material.a.b"),
     (float("inf"), "material.a"),
     ({1: 2}, "material.a"), (object(), "material.a")],
)  # fmt: skip
def test_what_has_no_one_text_is_refused(value: object, place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        cache_key({"a": value})


def test_nesting_is_bounded() -> None:
    deep: dict[str, object] = {}
    for _ in range(2000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="nested"):
        cache_key(deep)


def test_hash_seed_does_not_matter() -> None:
    code = "from owl_wms.cache.key import cache_key; print(cache_key({'b': [1, {'z': 1, 'y': 2}], 'a': 'ü'}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=True
        ).stdout
        for seed in (0, 1, 4242)
    }
    assert found == {cache_key({"a": "ü", "b": [1, {"y": 2, "z": 1}]}) + "\n"}


def test_the_key_of_a_known_material() -> None:
    """A change of format must be a change of SCHEMA: this value is what schema 1 gives."""
    assert canonical({"b": 1, "a": [1.5, None, "é"]}) == b'{"a":[1.5,null,"\\u00e9"],"b":1}'
    assert cache_key({"torch": "2.11.0"}) == KNOWN


KNOWN = "06b48a3b670ef2d21d2015707fdbd93b4740496056c7caec6519b1ba5218dc49"


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=300))
def test_any_name_becomes_a_safe_one(name: str) -> None:
    made = entry_name(name, "0123456789abcdef" * 4)
    assert is_entry_name(made)
    assert len(made.encode()) <= 81
    assert not made.startswith(".")
    assert "/" not in label(name)
