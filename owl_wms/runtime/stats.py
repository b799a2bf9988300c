"""Counts what a decode function does, and logs each kind of failure once.

Why: a compiled path that is not used without a word looks like a slow machine. The counters say what ran, how often,
and why the other way was not taken.

Usage:
    ledger = Ledger()
    ledger.add("chunks_program")
    ledger.failure(FastPathError("build", "...", "..."))
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from owl_wms.errors import FastPathError, NonFiniteError
from owl_wms.runtime import metrics
from owl_wms.runtime.slot import Slot

SWITCHED_OFF = "compiled programs are switched off by the settings (enabled=False)"
_LOG = logging.getLogger("owl_wms.runtime")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStats:
    """State of one decode function.

    Attributes:
        backend: what decodes now: the toolchain's name (`tensorrt`), or `pytorch`; `none` before the first decode.
        reason: why that one, one sentence.
        decodes, frames: calls, and frames that they returned.
        chunks_program, chunks_pytorch: batches by what computed them.
        hits: programs found in the cache.
        builds: programs built by this object.
        fallbacks: batches that PyTorch decoded because the compiled path failed.
        non_finite: frames of batches in which PyTorch's own values were not finite, as far as was looked.
        canaries, canary_misses: frames that were compared with PyTorch's (`check="canary"`), and those found wrong.
        failures: count by stage (`import`, `export`, `build`, `parity`, `save`, `load`, `run`).
        latency_ms: `p50`, `p90`, `p99`, `samples` of one batch; None unless timing was asked for.
        cache_bytes: size of the programs in use, as files.
        build_seconds, load_seconds: spent in this process.
        programs: one dict per latent shape: `shape`, `state`, `reason`, `entry`, `plan`, `precision`; `not_kept`: why a
            program does not stand in the cache, empty when it does; `stages`: where the seconds of its build went.
    """

    backend: str
    reason: str
    decodes: int
    frames: int
    chunks_program: int
    chunks_pytorch: int
    hits: int
    builds: int
    fallbacks: int
    canaries: int
    canary_misses: int
    non_finite: int
    failures: dict[str, int]
    latency_ms: dict[str, float] | None
    cache_bytes: int
    build_seconds: float
    load_seconds: float
    programs: tuple[dict[str, Any], ...]


class Ledger:
    """Thread-safe counters, failures by stage, and one warning per kind of failure."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        self._logged: set[str] = set()

    def add(self, name: str, by: int = 1) -> None:
        """Adds to a counter of `DecodeStats`, and to the one of Prometheus."""
        with self._guard:
            self._counts[name] += by
        metrics.count(name, by)

    def spend(self, name: str, seconds: float) -> None:
        """Adds seconds of `build` or `load`."""
        with self._guard:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def count(self, name: str) -> int:
        with self._guard:
            return self._counts[name]

    def seconds(self, name: str) -> float:
        with self._guard:
            return round(self._seconds.get(name, 0.0), 3)

    def failures(self) -> dict[str, int]:
        with self._guard:
            return dict(self._failures)

    def failure(self, error: FastPathError, kind: str = "", *, raised: bool = False) -> None:
        """Count a failure and warn unless this kind (the stage, if not said) already was warned of.

        `raised`: the caller gets the error itself, and PyTorch decodes nothing, so there is no warning.
        """
        with self._guard:
            self._failures[error.stage] += 1
            first = (kind or error.stage) not in self._logged
            self._logged.add(kind or error.stage)
        metrics.failure(error.stage)
        if first and not raised:
            remedy = error.remedy or "see owl-wms doctor"
            _LOG.warning("%sPyTorch decodes instead, because %s; %s", rank_prefix(), error.sentence, remedy)

    def non_finite(self, subject: str, kind: str, dtype: torch.dtype | None, *, first: int, raised: bool) -> None:
        """Warn once per kind that PyTorch's own values are not finite, or raise NonFiniteError with frame `first`.

        `subject` begins the sentence, with its verb: "frames 0 to 7 have".
        """
        name = str(dtype).removeprefix("torch.")
        wider = "decode in a wider dtype (bf16, fp32)" if dtype == torch.float16 else "look at the latents and weights"
        text = f"{subject} values that are not finite (NaN or infinite) in {name}; {wider}"
        if raised:
            raise NonFiniteError(text, frame=first)
        self.warn(kind, text)

    def note(self, kind: str, text: str, level: int = logging.INFO) -> None:
        """Log something once per kind."""
        with self._guard:
            if kind in self._logged:
                return
            self._logged.add(kind)
        _LOG.log(level, "%s%s", rank_prefix(), text)

    def warn(self, kind: str, text: str) -> None:
        """Log a warning once per kind."""
        self.note(kind, text, logging.WARNING)


def summarise(
    ledger: Ledger, slots: Sequence[Slot], *, toolchain: str, enabled: bool, latency_ms: dict[str, float] | None
) -> DecodeStats:
    """The state of a decode function with these counters and programs."""
    ready = [slot for slot in slots if slot.state == "ready"]
    backend = toolchain if ready else "pytorch"
    reasons = [text for slot in ready or slots if (text := slot.describe())]
    if not enabled:
        backend, reasons = "pytorch", [SWITCHED_OFF]
    elif not reasons:
        backend, reasons = "none", ["nothing was decoded yet"]
    return DecodeStats(
        backend=backend,
        reason=reasons[-1],
        **{name: ledger.count(name) for name in metrics.COUNTS},
        failures=ledger.failures(),
        latency_ms=latency_ms,
        cache_bytes=sum(loaded.file_bytes for slot in ready if (loaded := slot.loaded) is not None),
        build_seconds=ledger.seconds("build"),
        load_seconds=ledger.seconds("load"),
        programs=tuple(_describe(slot) for slot in slots),
    )


def _describe(slot: Slot) -> dict[str, Any]:
    loaded = slot.loaded
    return {
        "shape": list(slot.request.input_shape),
        "state": slot.state,
        "reason": slot.describe(),
        "entry": None if loaded is None else loaded.name,
        "plan": None if loaded is None else loaded.report.get("plan"),
        "precision": None if loaded is None else loaded.report.get("precision"),
        "stages": {} if loaded is None else loaded.report.get("stages", {}),
        "not_kept": None if loaded is None else loaded.not_kept,
    }


def rank_prefix() -> str:
    """`rank 3: ` inside an initialised process group, so that interleaved logs can be told apart; no communication."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return f"rank {torch.distributed.get_rank()}: "
    return ""
