"""The work inside the child process: lower, compile, run, isolate, check, time, save, reload.

Why one file of its own: `child.py` deals with processes and messages, this with the program. Everything that may fail
is reported through the `Journal` before it is tried, so that the parent knows what was going on when the process died.

Usage (inside the child, on the GPU):
    report = Worker(folded_fp32, spec, journal, "cuda:0").build(Path("out"))
"""

from __future__ import annotations

import gc
import hashlib
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.export import ExportedProgram

from owl_wms.errors import FastPathError
from owl_wms.trt import importer, lower, plans
from owl_wms.trt.candidate import Candidate
from owl_wms.trt.cuda_graph import GraphedProgram
from owl_wms.trt.export import export_decoder
from owl_wms.trt.isolate import smallest_kept
from owl_wms.trt.load import load_program
from owl_wms.trt.parity import PSNR_GATE_DB, Reference, latents
from owl_wms.trt.shapes import record_shapes
from owl_wms.trt.spec import BuildSpec, dtype_of
from owl_wms.trt.timing import interleaved

PROGRAM_NAME = "program.pt2"
# A graph costs memory and a copy of the output; it is recommended where it saves at least this share of the time.
GRAPH_GAIN = 0.03
PROBE_SECONDS = 25.0
# Once a plan is usable, no further one is begun after this share of the time: a late build must not cost the program
# that exists.
ENOUGH_SHARE = 0.5


class Journal(Protocol):
    """Where the worker says what it does; the parent reads it."""

    def stage(self, name: str, **details: Any) -> None:
        """A stage begins."""

    def attempt(self, key: str) -> str | None:
        """An attempt that may kill the process begins; returns the outcome if an earlier process already made it."""

    def outcome(self, key: str, reason: str) -> None:
        """The attempt ended; "" when it worked."""


class Worker:
    """Builds every plan of a spec for one folded fp32 decoder and keeps the fastest that passes parity."""

    def __init__(self, folded: nn.Module, spec: BuildSpec, journal: Journal, device: torch.device | str) -> None:
        self.spec = spec
        self.journal = journal
        self.device = torch.device(device)
        self.probed: dict[str, str] = {}
        self.enough = time.monotonic() + ENOUGH_SHARE * spec.timeout_seconds
        self.folded = folded.to(self.device).eval().requires_grad_(False)

    def build(self, out_dir: Path) -> dict[str, Any]:
        """Write `out_dir/program.pt2` and return the report. Raises FastPathError with the stage that ended it."""
        begin = time.monotonic()
        everything: list[Candidate] = []
        best: Candidate | None = None
        eager_ms = 0.0
        refusals: list[str] = []
        for precision in self.spec.wanted_precisions():
            try:
                found, eager_ms = self.at_precision(precision)
            except FastPathError as error:
                refusals.append(f"{precision}: {error.reason}")
                continue
            everything += found
            usable = [c for c in found if c.program is not None and not c.reason]
            refusals += [f"{c.plan} at {precision}: {c.reason}" for c in found if c.reason]
            if usable:
                best = min(usable, key=Candidate.best_ms)
                break
        if best is None:
            stage = "parity" if any(c.parity and not c.parity["passed"] for c in everything) else "build"
            raise FastPathError(
                stage, "; ".join(refusals) or "no plan was built", "see the report's candidates for every attempt"
            )
        candidates = [c.to_json() for c in everything]
        for candidate in everything:
            if candidate is not best:
                candidate.program = None
        self.release()
        report = {**best.to_json(), **self.save(best, out_dir)}
        graph_ms, plain_ms = best.graph_latency_ms, best.latency_ms
        report.update(
            {
                "input_shape": list(self.spec.input_shape),
                "input_dtype": str(dtype_of(best.precision)).removeprefix("torch."),
                "requested_precision": self.spec.precision,
                "tensorrt": importer.status().version,
                "eager_latency_ms": eager_ms,
                "cuda_graph": graph_ms is not None and plain_ms is not None and graph_ms < (1 - GRAPH_GAIN) * plain_ms,
                "candidates": candidates,
                "total_seconds": round(time.monotonic() - begin, 3),
            }
        )
        return report

    def at_precision(self, precision: str) -> tuple[list[Candidate], float]:
        """All plans at one precision, checked and timed together with eager; `(candidates, eager's median ms)`."""
        chosen = plans.candidates(self.folded, self.spec, precision)
        self.journal.stage("reference", precision=precision)
        dtype = dtype_of(precision)
        eager = plans.cast_copy(self.folded, precision).eval()
        reference = Reference.measure(
            self.folded,
            eager,
            self.spec.input_shape,
            dtype,
            self.device,
            self.spec.seed,
            psnr_gate_db=PSNR_GATE_DB.get(precision),
        )
        if not reference.eager_is_finite() and self.spec.precision == "auto":
            raise FastPathError("parity", f"eager PyTorch overflows at {precision}", "use bf16")
        found: list[Candidate] = []
        for plan in chosen:
            if time.monotonic() > self.enough and any(not done.reason for done in found):
                found.append(
                    Candidate(plan=plan.name, precision=precision, reason="not tried: the build's time was spent")
                )
                continue
            candidate = self.candidate(plan, precision)
            if candidate.program is not None and not candidate.reason:
                self.journal.stage("parity", plan=plan.name, precision=precision)
                candidate.parity = reference.check(candidate.program)
                candidate.reason = "" if candidate.parity["passed"] else f"parity: {candidate.parity['reason']}"
            if candidate.reason:
                candidate.program = None
                self.release()
            found.append(candidate)
        z = reference.inputs[min(1, len(reference.inputs) - 1)]
        del reference
        self.journal.stage("timing", precision=precision)
        return found, self.time(found, eager, z)

    def time(self, found: list[Candidate], eager: nn.Module, z: torch.Tensor) -> float:
        """Fill in latencies of usable candidates, plain and as CUDA graph, interleaved with eager."""
        runs: dict[str, Any] = {"eager": eager}
        for candidate in (c for c in found if c.program is not None):
            runs[candidate.plan] = candidate.program
            graphed = GraphedProgram(candidate.program, z)
            candidate.graph_reason = graphed.reason
            if graphed.graphed:
                runs[f"{candidate.plan} graphed"] = graphed
        times = interleaved(runs, z)
        for candidate in found:
            candidate.latency_ms = times.get(candidate.plan)
            candidate.graph_latency_ms = times.get(f"{candidate.plan} graphed")
        return times["eager"]

    def candidate(self, plan: plans.Plan, precision: str) -> Candidate:
        """Lower, build and first-run one plan, isolating what fails. Never raises for a failing plan; its `reason` says
        why.
        """
        begin = time.monotonic()
        candidate = Candidate(plan=plan.name, precision=precision)
        built: dict[frozenset[str], tuple[Any, lower.Partition]] = {}
        try:
            self.journal.stage("lower", plan=plan.name, precision=precision)
            module, candidate.rewrites = plan.lower(self.folded, self.spec, precision)
            z = latents(self.spec.input_shape, 1.0, dtype_of(precision), self.device, self.spec.seed)
            exported = export_decoder(module, z)
        except Exception as error:
            candidate.reason = _reason(error)
            return candidate
        settings = {**self.spec.compile_settings(precision), **plan.settings}

        def works(kept: frozenset[str]) -> str:
            key = f"build|{plan.name}|{precision}|{','.join(sorted(kept))}"
            built.clear()
            self.release()
            known = self.journal.attempt(key)
            if known:
                return known
            try:
                self.journal.stage("compile", plan=plan.name, precision=precision, kept=len(kept))
                program, partition = lower.compile_exported(
                    exported, z, settings, kept=sorted(kept), progress=self._progress(plan.name)
                )
                self.journal.stage("first run", plan=plan.name, precision=precision)
                self._run(program, z)
                built[kept] = (program, partition)
                reason = ""
            except Exception as error:
                reason = _reason(error)
                self.check_context()
            self.journal.outcome(key, reason)
            return reason

        failure = works(frozenset())
        kept = frozenset[str]()
        if failure and plan.isolates and self.spec.isolation_tries:
            candidate.kept_reason = failure
            groups = like_units(module, exported)
            candidate.probes = self.probe(plan, module, groups, precision, settings)
            self.journal.stage("isolation", plan=plan.name, precision=precision, suspects=len(candidate.probes))
            candidate.isolation = smallest_kept(
                groups,
                works,
                max_tries=self.spec.isolation_tries,
                deadline=time.monotonic() + self.spec.isolation_seconds,
                suspects=candidate.probes,
                reason=failure,
            )
            if candidate.isolation.kept is not None:
                kept = frozenset(candidate.isolation.kept)
                failure = "" if kept in built else works(kept)
                candidate.kept = tuple(sorted(kept))
        candidate.reason = failure
        if not failure:
            candidate.program, candidate.partition = built[kept]
        candidate.build_seconds = time.monotonic() - begin
        return candidate

    def probe(
        self, plan: plans.Plan, module: nn.Module, groups: list[list[str]], precision: str, settings: dict[str, Any]
    ) -> dict[str, str]:
        """Build one leaf module of each group alone; `{module path: reason}` for all modules of failing groups."""
        shapes = record_shapes(module, self.spec.input_shape)
        children = dict(module.named_modules())
        failing: dict[str, str] = {}
        deadline = time.monotonic() + PROBE_SECONDS
        for group in groups:
            leaves = [path for path in group if path in shapes and next(children[path].children(), None) is None]
            if not leaves:
                continue
            leaf, shape = children[leaves[0]], shapes[leaves[0]]
            # Keyed by what is probed: another plan's module of the same kind and shape has the same answer.
            key = f"probe|{precision}|{shape}|{_kind(leaf, [])}"
            if key not in self.probed and time.monotonic() > deadline:
                continue
            reason = self.probed.get(key)
            if reason is None:
                reason = self.journal.attempt(key)
            if reason is None:
                reason = self._probe_one(leaf, shape, precision, settings)
                self.journal.outcome(key, reason)
            self.probed[key] = reason
            if reason:
                failing.update(dict.fromkeys(group, reason))
        return failing

    def _probe_one(self, leaf: nn.Module, shape: tuple[int, ...], precision: str, settings: dict[str, Any]) -> str:
        try:
            x = latents(shape, 1.0, dtype_of(precision), self.device, self.spec.seed)
            exported = export_decoder(nn.Sequential(leaf), x)
            program, _ = lower.compile_exported(exported, x, {**settings, "min_block_size": 1})
            self._run(program, x)
        except Exception as error:
            self.check_context()
            return _reason(error)
        return ""

    def save(self, best: Candidate, out_dir: Path) -> dict[str, Any]:
        """Write, reload from bytes and compare; the numbers for the report. Raises FastPathError "save", "load" or
        "parity".
        """
        z = latents(self.spec.input_shape, 1.0, dtype_of(best.precision), self.device, self.spec.seed)
        wanted = self._run(best.program, z)
        path = out_dir / PROGRAM_NAME
        self.journal.stage("save", plan=best.plan)
        begin = time.monotonic()
        try:
            lower.save_program(best.program, path, z)
        except Exception as error:
            raise FastPathError("save", _reason(error), "report this with the decoder's configuration") from error
        save_seconds = time.monotonic() - begin
        best.program = None
        self.release()
        self.journal.stage("reload", plan=best.plan)
        begin = time.monotonic()
        loaded = load_program(path.read_bytes(), self.device)
        load_seconds = time.monotonic() - begin
        equal = torch.equal(self._run(loaded, z), wanted)
        if not equal:
            raise FastPathError("parity", "the reloaded program does not repeat the built one bit for bit", "rebuild")
        return {
            "save_seconds": round(save_seconds, 3),
            "load_seconds": round(load_seconds, 3),
            "program_bytes": path.stat().st_size,
            "reload_bit_equal": equal,
            "output_sha256": output_digest(wanted),
            "output_shape": list(wanted.shape),
            "output_dtype": str(wanted.dtype).removeprefix("torch."),
        }

    def _run(self, program: Any, z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = program(z)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return x

    def check_context(self) -> None:
        """After a failure: a CUDA context with a sticky error fails everything from now on, so the process must end."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.zeros(1, device=self.device).add_(1).item()
        except Exception as error:
            raise BrokenContext(_reason(error)) from error

    def release(self) -> None:
        """Give freed engines and activations back to the GPU, so that the next build finds the memory."""
        gc.collect()
        torch.cuda.empty_cache()

    def _progress(self, plan: str) -> lower.Progress:
        last = [0.0]

        def tell(phase: str, step: int, steps: int) -> None:
            now = time.monotonic()
            if now - last[0] > 0.5:
                last[0] = now
                self.journal.stage("tensorrt", plan=plan, phase=phase, step=step, steps=steps)

        return tell


class BrokenContext(BaseException):
    """The CUDA context is unusable; not an Exception, so that no attempt mistakes it for its own failure."""


def like_units(module: nn.Module, exported: ExportedProgram) -> list[list[str]]:
    """Module paths that call operators, grouped by what they are: a leaf's type, configuration and tensor shapes, else
    the operators.
    """
    groups: dict[str, list[str]] = {}
    children = dict(module.named_modules())
    for path, operators in lower.operators_by_module(exported).items():
        groups.setdefault(_kind(children.get(path), operators), []).append(path)
    return list(groups.values())


def _kind(child: nn.Module | None, operators: list[str]) -> str:
    if child is None or next(child.children(), None) is not None:
        return f"{type(child).__name__} {sorted(set(operators))}"
    tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
    return f"{type(child).__name__} {child.extra_repr()} {[(key, tuple(t.shape)) for key, t in tensors]}"


def output_digest(x: torch.Tensor) -> str:
    """SHA-256 of an output's bytes, by which another process can tell that it computes the same."""
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"[:600] if lines else type(error).__name__
