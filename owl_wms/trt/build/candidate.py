"""`Candidate`: one plan at one precision, with everything that its build showed; a row of the report.

Usage:
    candidate = Candidate(plan="tensorrt", precision="fp16")
    candidate.to_json()     # JSON-ready, for the manifest
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from owl_wms.trt.build.isolate import Isolation
from owl_wms.trt.library.compiler import Partition


@dataclass(kw_only=True)
class Candidate:
    """A plan at one precision, built (or not).

    Attributes:
        program: callable; None if it failed or is not needed any longer.
        exported: saved instead of `program` if Torch-TensorRT compiled nothing.
        partition: the split between TensorRT and PyTorch.
        rewrites: how often each rewrite was applied.
        kept: modules left in PyTorch, `kept_reason` the failure that made that necessary.
        isolation: the search for those modules; None if nothing failed.
        probes: modules that failed when they were built alone, and why.
        reason: why it cannot be used; empty if it can.
        parity: of `Reference.check`.
        latency_ms, graph_latency_ms: medians per call, plain and as a CUDA graph; None if not timed.
        graph_reason: why there is no CUDA graph.
    """

    plan: str
    precision: str
    program: Any = None
    exported: ExportedProgram | None = None
    partition: Partition | None = None
    rewrites: dict[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    kept_reason: str = ""
    isolation: Isolation | None = None
    probes: dict[str, str] = field(default_factory=dict)
    build_seconds: float = 0.0
    reason: str = ""
    parity: dict[str, Any] = field(default_factory=dict)
    latency_ms: float | None = None
    graph_latency_ms: float | None = None
    graph_reason: str = ""

    def key(self, kind: str) -> str:
        """Returns the name of an attempt with this plan and precision, for a `BuildJournal`."""
        return f"{kind}|{self.plan}|{self.precision}"

    def best_ms(self) -> float:
        """The better of plain and graphed latency in milliseconds; infinity when it was not timed."""
        return min(ms for ms in (self.latency_ms, self.graph_latency_ms, float("inf")) if ms is not None)

    def to_json(self) -> dict[str, Any]:
        """The row of the report: what was built, how fast, how near, and what stayed in PyTorch and why."""
        partition = self.partition
        return {
            "plan": self.plan,
            "precision": self.precision,
            "usable": self.program is not None and not self.reason,
            "reason": self.reason,
            "build_seconds": round(self.build_seconds, 3),
            "latency_ms": self.latency_ms,
            "graph_latency_ms": self.graph_latency_ms,
            "graph_reason": self.graph_reason,
            "library": self.exported is None,
            "engines": partition.engines if partition else 0,
            "engine_operators": partition.engine_operators if partition else 0,
            "pytorch_operators": [list(pair) for pair in partition.pytorch_operators] if partition else [],
            "rewrites": self.rewrites,
            "kept_modules": list(self.kept),
            "kept_reason": self.kept_reason,
            "kept_minimal": self.isolation.minimal if self.isolation else True,
            "failed_alone": self.probes,
            "attempts": [
                {"kept": list(a.kept), "reason": a.reason, "seconds": round(a.seconds, 3)}
                for a in (self.isolation.attempts if self.isolation else ())
            ],
            "parity": self.parity,
        }
