"""Compiled programs on disk: sealed, verified before use, shared by processes, never the reason that a decode fails.

Why own code: of the caches that were looked at, none has all of a complete key, durable atomic writes, a checksum
verified before use, quarantine, single flight and a trusted directory (docs/cache.md). Imports no torch.

Usage:
    store = CacheStore("trt_cache")
    entry = store.get_or_build("dcae", Key.of(material), build)
    data = entry.read("program.pt2")
"""

from __future__ import annotations

from owl_wms.cache.entry import Entry, Miss
from owl_wms.cache.evict import Shrunk
from owl_wms.cache.key import SCHEMA, Key, cache_key, canonical, entry_name
from owl_wms.cache.manifest import Manifest
from owl_wms.cache.store import DEFAULT_MAX_BYTES, LOCK_TIMEOUT_SECONDS, CacheStore, NoStore
from owl_wms.cache.survey import EntryInfo

__all__ = [
    "CacheStore",
    "Entry",
    "Miss",
    "EntryInfo",
    "Key",
    "Manifest",
    "NoStore",
    "Shrunk",
    "cache_key",
    "canonical",
    "entry_name",
    "SCHEMA",
    "DEFAULT_MAX_BYTES",
    "LOCK_TIMEOUT_SECONDS",
]
