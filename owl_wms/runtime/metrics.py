"""Exports the counters to Prometheus, when `prometheus-client` is installed; otherwise does nothing.

Why a module: collectors live in one process-wide registry that refuses a second registration, so they are made once, on
first use, and found again if this module is imported twice.

Usage:
    metrics.count("chunks_program", 1)      # owl_decode_chunks_program_total
    metrics.failure("build")                # owl_decode_failures_total{stage="build"}
"""

from __future__ import annotations

import functools
from typing import Any

COUNTS = {
    "decodes": "decode calls answered",
    "frames": "frames decoded",
    "chunks_program": "batches computed by a compiled program",
    "chunks_pytorch": "batches computed by PyTorch",
    "hits": "programs loaded from the cache",
    "builds": "programs built",
    "fallbacks": "batches PyTorch answered because the compiled path failed",
    "canaries": "frames compared with PyTorch's while their program was in use",
    "canary_misses": "frames of those that were wrong",
    "non_finite": "frames of batches in which PyTorch's values are not finite",
}
"""The counters of `DecodeStats`, each with its help text for Prometheus."""


@functools.cache
def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
    """Returns the process's counter of this name, or None without `prometheus-client`."""
    try:
        import prometheus_client
    except ImportError:
        return None
    try:
        return prometheus_client.Counter(name, text, labels)
    except ValueError:  # registered by an earlier import of this module
        return prometheus_client.REGISTRY._names_to_collectors.get(name)


def count(name: str, by: int) -> None:
    """Add to `owl_decode_<name>_total`; names without a help text are not exported."""
    found = counter(f"owl_decode_{name}", COUNTS[name]) if name in COUNTS else None
    if found is not None:
        found.inc(by)


def failure(stage: str) -> None:
    """Add one to `owl_decode_failures_total{stage=...}`."""
    found = counter("owl_decode_failures", "failures of the compiled path by stage", ("stage",))
    if found is not None:
        found.labels(stage=stage).inc()
