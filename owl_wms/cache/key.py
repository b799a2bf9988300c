"""From everything a program depends on to one name: a pure function.

Why: a cache that forgets one dependency returns the wrong program, silently. The caller puts all of them in a JSON
mapping ("material"); equal material gives an equal key whatever the dict order or PYTHONHASHSEED, and any difference
gives another key. Values with no canonical text (sets, NaN, bytes, arbitrary objects) are rejected rather than guessed
at.

Usage:
    key = Key.of({"gpu": "NVIDIA H200", "weights_sha256": "ab..."})
    key.digits                                              # 64 hex digits
    name = entry_name("dcae", key.digits)                   # "dcae_<first 16 hex>"
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from owl_wms.errors import ConfigError
from owl_wms.files import unusable_name

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"

SCHEMA = 1
"""Version of the entry format: what a manifest and a directory look like. It is part of every key, so that two versions
of this code never look for the same name. What is in the material has a version of its own (`owl_wms.trt.key.SCHEMA`).
"""

MAX_DEPTH = 32
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_ENTRY = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,63})_([0-9a-f]{16})\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """The material of one program as plain JSON, and the 64 hex digits that stand for it; made once and handed down.

    Attributes:
        material: as `normalise` makes it.
        digits: `cache_key(material)`.
        text: `canonical(material)`, by which an entry's material is compared.
    """

    material: dict[str, Any]
    digits: str
    text: bytes = dataclasses.field(repr=False)

    @classmethod
    def of(cls, material: Mapping[str, Any]) -> Key:
        """The key of `material`. Raises ConfigError as `normalise` does."""
        plain = normalise(material)
        return cls(plain, _digits(plain), canonical(plain))


def cache_key(material: Mapping[str, Any]) -> str:
    """SHA-256 over the schema and the canonical JSON of `material`, as 64 hex digits.

    Raises:
        ConfigError: a value that JSON cannot express exactly; the error names the place, for example
            `material.settings[2]`.
    """
    return _digits(normalise(material))


def _digits(plain: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({"material": plain, "schema": SCHEMA})).hexdigest()


def canonical(value: JSON) -> bytes:
    """The one text of a JSON value: sorted keys, no spaces, ASCII.

    `value` must already be plain JSON (see `normalise`).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def normalise(material: Any, place: str = "material", depth: int = 0) -> Any:
    """`material` as plain dict, list, str, int, float, bool and None; tuples become lists.

    Raises:
        ConfigError: sets, bytes, non-finite floats, keys that are not strings, other objects, or nesting deeper than
            32.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{place}: key material may be nested {MAX_DEPTH} deep; flatten it", key=place)
    if material is None or isinstance(material, bool):
        return material
    if isinstance(material, str):
        return str.__str__(material)
    if isinstance(material, int):
        return int(material)
    if isinstance(material, float):
        if not math.isfinite(material):
            raise ConfigError(f"{place}: key material must be finite, got {material!r}; write it as text", key=place)
        return float(material)
    if isinstance(material, Mapping):
        return {_text_key(key, place): normalise(item, f"{place}.{key}", depth + 1) for key, item in material.items()}
    if isinstance(material, (list, tuple)):
        return [normalise(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(material)]
    raise ConfigError(
        f"{place}: key material must be JSON (dict, list, str, int, float, bool, None), got {type(material).__name__}; "
        "sort a set into a list, write other objects as text",
        key=place,
    )


def _text_key(key: Any, place: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(f"{place}: keys must be str, got {key!r} of type {type(key).__name__}", key=place)
    return str.__str__(key)


def label(name: str) -> str:
    """A model name as it stands in a file name: other characters become `-`, at most 64, never starting with a dot, no
    device of Windows (`nul.x` becomes `model-nul.x`).
    """
    text = _NAME.sub("-", name)[:64].lstrip(".") or "model"
    return text if unusable_name(f"{text}_", windows=True) is None else f"model-{text}"[:64]


def entry_name(name: str, key: str) -> str:
    """Directory name of an entry, `<model>_<first 16 hex digits of the key>`."""
    return f"{label(name)}_{key[:16]}"


def is_entry_name(text: str) -> bool:
    """Returns whether a directory name has the form that `entry_name` gives."""
    return _ENTRY.fullmatch(text) is not None
