"""Lists the entries of the cache and why each would or would not be used, for `owl-wms trt list` and `verify`.

Why it reads and never loads: a listing must be safe on a cache that another version, machine or attacker filled. Only
manifests are parsed (and payloads hashed on request); a reason is text, found by comparing the key material with the
present machine.

Usage:
    for info in survey(path, cache_fd, None, env.describe_machine()):
        info.name, info.status, info.reason
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owl_wms.cache import evict, fs
from owl_wms.cache.entry import inspect
from owl_wms.cache.key import is_entry_name
from owl_wms.cache.manifest import ForeignSchemaError, Manifest
from owl_wms.errors import CacheCorruptError

_COMPARED = (
    "torch",
    "torch_tensorrt",
    "tensorrt",
    "triton",
    "cuda",
    "nvrtc",
    "cudnn",
    "driver",
    "gpu",
    "compute_capability",
    "sm_count",
    "python",
)
"""Facts of the machine that a program depends on, in the order in which a user wants to hear of them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EntryInfo:
    """One entry as an operator sees it.

    Attributes:
        name: directory name.
        path: its directory.
        size_bytes: of all its files.
        last_used_unix: seconds since 1970 by the clock of the last user; 0 when unknown.
        status: `ok`, `miss` (sound, but not for this machine), `corrupt`, or `unreadable`.
        reason: why it is not `ok`; empty when it is.
        manifest: its facts, None when they cannot be trusted.
    """

    name: str
    path: Path
    size_bytes: int
    last_used_unix: int
    status: str
    reason: str
    manifest: Manifest | None


def survey(
    cache_path: Path,
    cache_fd: int,
    hmac_key: bytes | None,
    current: Mapping[str, Any] | None,
    *,
    payload: bool = False,
    prefix: str = "",
) -> list[EntryInfo]:
    """Every entry whose name begins with `prefix`, most recently used first. `payload` hashes the programs too."""
    marks = evict.last_used(cache_fd)
    found = []
    names = [name for name in fs.listdir(cache_fd) if is_entry_name(name) and name.startswith(prefix)]
    for name in sorted(names, key=lambda name: -marks.get(name, 0)):
        manifest: Manifest | None = None
        try:
            manifest = inspect(name, cache_path, cache_fd, hmac_key, payload=payload)
            reason = difference(manifest.material, current or {})
            status = "miss" if reason else "ok"
        except ForeignSchemaError as error:
            status, reason = "miss", str(error)
        except CacheCorruptError as error:
            status, reason = "corrupt", str(error)
        except OSError as error:
            status, reason = "unreadable", str(error)
        found.append(
            EntryInfo(
                name=name,
                path=cache_path / name,
                size_bytes=fs.tree_size(name, cache_fd),
                last_used_unix=marks.get(name, 0) // 10**9,
                status=status,
                reason=reason,
                manifest=manifest,
            )
        )
    return found


def difference(material: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Facts of the machine in which an entry's material differs from `current`, as text; empty when none does.

    The facts are looked for at the top of the material and in its sub-objects (`machine`, `versions`, ...); only names
    that occur on both sides are compared.
    """
    facts = dict(_facts(material))
    said = []
    for key in _COMPARED:
        if key in facts and key in current and facts[key] != current[key]:
            said.append(f"{key} was {facts[key]}, is {current[key]}")
    return "; ".join(said)


def _facts(material: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for value in material.values():
        if isinstance(value, Mapping):
            pairs.extend(_facts(value))
    pairs.extend((key, value) for key, value in material.items() if not isinstance(value, Mapping))
    return [(key, value) for key, value in pairs if key in _COMPARED]
