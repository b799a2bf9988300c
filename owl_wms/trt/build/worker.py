"""Builds a program inside the build process: lower, compile, run, isolate, check, time; `save.py` writes what won.

Why one file of its own: `child.py` deals with processes and messages, this with the program. Every step that may fail
is announced through the `BuildJournal` before it is tried, so that the caller knows the step in which the process died.

Usage (inside the build process, on the GPU):
    report = Worker(fp32_copy(decoder, "cuda:0"), recording, request, journal).build(Path("out"))
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.state import State
from owl_wms.timing import interleaved
from owl_wms.trt import plans
from owl_wms.trt.build import attempts
from owl_wms.trt.build.candidate import Candidate
from owl_wms.trt.build.isolate import Isolation, Works, smallest_kept
from owl_wms.trt.build.journal import BuildJournal
from owl_wms.trt.build.probe import Prober, like_modules
from owl_wms.trt.build.save import save
from owl_wms.trt.check.chain import STEPS, Chain
from owl_wms.trt.check.parity import PSNR_GATE_DB, Reference, example
from owl_wms.trt.graph.export import export_decoder
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.library import compiler, importer
from owl_wms.trt.run import kernels
from owl_wms.trt.run.cuda_graph import GraphedProgram
from owl_wms.trt.run.step_graph import GraphedStep
from owl_wms.trt.spec import compile_settings, dtype_of

# A graph costs memory and a copy of the output; it is recommended where it saves at least this share of the time.
GRAPH_GAIN = 0.03
# Bounds of the search for a module that cannot be compiled: the builds that it makes, and its seconds: time for a few
# builds where one takes long (a large decoder takes 40 s), but no build is begun after this share of the whole time.
ISOLATION_TRIES, ISOLATION_SECONDS, ISOLATION_BUILDS, ISOLATION_SHARE = 16, 60.0, 4, 0.6
# Once a plan is usable, no further one is begun after this share of the time, or these seconds, and none is searched
# for what fails in it: a late build must not cost the program that exists, nor make a user wait for two minutes.
ENOUGH_SHARE, ENOUGH_SECONDS = 0.5, 60.0


class Worker:
    """Builds every plan that applies to one decoder and chooses the fastest that passes the parity check.

    Args:
        fp32: the decoder, folded, in fp32, on the request's device.
        recording: of the decoder as its caller runs it.
        request: what is wanted.
        journal: receives the steps that begin and end.
        missing: why Torch-TensorRT cannot be used in this process; None where it can.
    """

    def __init__(
        self,
        fp32: nn.Module,
        recording: Recording,
        request: Request,
        journal: BuildJournal,
        missing: FastPathError | None = None,
    ) -> None:
        self.folded = fp32
        self.recording = recording
        self.request = request
        self.journal = journal
        self.missing = missing
        self.device = torch.device(request.device)
        self.prober = Prober(request, journal, self.device)
        begin = time.monotonic()
        self.enough = begin + min(ENOUGH_SHARE * request.timeout_seconds, ENOUGH_SECONDS)
        self.last_try = begin + ISOLATION_SHARE * request.timeout_seconds
        self.usable = False

    def build(self, out_dir: Path) -> dict[str, Any]:
        """Write `out_dir/program.pt2` and return the report. Raises FastPathError with the stage that ended it."""
        begin = time.monotonic()
        everything: list[Candidate] = []
        best: Candidate | None = None
        eager_ms: float | None = None
        refusals: list[str] = []
        selection = plans.select(self.folded, self.request, self.recording, self.missing)
        for precision, chosen in selection.plans.items():
            try:
                found, eager_ms = self.at_precision(precision, chosen)
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
            stage = "parity" if any(c.reason.startswith("parity:") for c in everything) else "build"
            raise FastPathError(
                stage,
                "; ".join(refusals) or "no plan was built",
                "choose another precision, or run `owl-wms trt build`, which prints every failed attempt",
            )
        candidates = [c.to_json() for c in everything]
        for candidate in everything:
            if candidate is not best:
                candidate.program = None
        attempts.release()
        self.journal.attempt(best.key("plan"))
        report = {**best.to_json(), **save(best, out_dir, self.request, self.journal, self.device)}
        self.journal.outcome(best.key("plan"), "")
        graph_ms, plain_ms = best.graph_latency_ms, best.latency_ms
        report.update(
            {
                "input_shape": list(self.request.input_shape),
                "input_dtype": str(dtype_of(best.precision)).removeprefix("torch."),
                "requested_precision": self.request.precision,
                "tensorrt": importer.status().version,
                "eager_latency_ms": eager_ms,
                "cuda_graph": graph_ms is not None and plain_ms is not None and graph_ms < (1 - GRAPH_GAIN) * plain_ms,
                "candidates": candidates,
                "refused": dict(selection.refused),
                "kernels_refused": kernels.refused(),
                "total_seconds": round(time.monotonic() - begin, 3),
            }
        )
        return report

    def at_precision(self, precision: str, chosen: tuple[plans.Plan, ...]) -> tuple[list[Candidate], float | None]:
        """Plans at one precision, checked and timed together with eager; `(candidates, eager's median ms)`.

        What fails or dies on the way costs the plan that did; `build_candidate`, `judge` and `time` say how.
        """
        self.journal.stage("reference", precision=precision)
        dtype = dtype_of(precision)
        eager = plans.cast_copy(self.folded, precision).eval()
        reference = Reference.measure(
            self.chained(self.folded),
            self.chained(eager),
            self.checked_shape(),
            dtype,
            self.device,
            self.request.seed,
            psnr_gate_db=PSNR_GATE_DB.get(precision),
        )
        if not reference.eager_is_finite() and self.request.precision == "auto":
            raise FastPathError("parity", f"eager PyTorch overflows at {precision}", "use bf16")
        found: list[Candidate] = []
        settled = ""
        for plan in chosen:
            spent = "the build's time was spent" if time.monotonic() > self.enough and self.usable else ""
            if settled or spent:
                reason = f"not tried: {settled or spent}"
                found.append(Candidate(plan=plan.name, precision=precision, reason=reason))
                continue
            candidate = Candidate(plan=plan.name, precision=precision)
            # Around everything that is done with the plan, so that whatever kills the process is not tried again.
            candidate.reason = self.journal.attempt(candidate.key("plan")) or ""
            if not candidate.reason:
                candidate = self.build_candidate(plan, precision)
                if candidate.program is not None and not candidate.reason:
                    self.judge(candidate, reference)
                self.journal.outcome(candidate.key("plan"), candidate.reason)
            if candidate.reason:
                candidate.program = None
                attempts.release()
            else:
                self.usable = True
                settled = self.settled(plan)
            found.append(candidate)
        z = reference.inputs[min(1, len(reference.inputs) - 1)][: self.request.input_shape[0]]
        del reference
        self.journal.stage("timing", precision=precision)
        return found, self.time(found, eager, z, precision)

    def settled(self, plan: plans.Plan) -> str:
        """Returns why no plan after this one, which is usable, needs to be built; empty where one may be faster."""
        # Steps were never compared, and what was measured had all of our kernels.
        if self.request.plans or self.device.type != "cuda" or self.request.state or kernels.refused():
            return ""
        capability = torch.cuda.get_device_capability(self.device)
        return f"{plan.name} was faster in every measurement on such a GPU" if capability in plan.settles_on else ""

    def judge(self, candidate: Candidate, reference: Reference) -> None:
        """Checks a built candidate for parity; its `reason` says what failed, also if the program raised.

        Raises:
            BrokenContext: the process has to end.
        """
        self.journal.stage("parity", plan=candidate.plan, precision=candidate.precision)
        try:
            candidate.parity = reference.check(self.chained(candidate.program))
            failure = candidate.parity["reason"]
        except Exception as error:  # out of memory on these latents, say; the next plan may need less
            failure = attempts.reason_of(error)
            attempts.check_context(self.device)
        candidate.reason = f"parity: {failure}" if failure else ""

    def time(self, found: list[Candidate], eager: nn.Module, z: torch.Tensor, precision: str) -> float | None:
        """Fill in latencies of usable candidates, plain and as CUDA graph, interleaved with eager; eager's is returned.

        Whatever fails or kills the process is left out: a candidate loses its program, or its graph alone, or the
        comparison loses eager (None). Raises BrokenContext when the process has to end.
        """
        timed = [c for c in found if c.program is not None]
        runs: dict[str, Any] = {"eager": self.with_state(eager, precision)}
        keys = {"eager": f"eager|{precision}"}
        for candidate in timed:
            runs[candidate.plan] = self.with_state(candidate.program, precision)
            keys[candidate.plan] = candidate.key("plan")
            graphed = self.captured(candidate, z)
            if graphed is not None:
                runs[f"{candidate.plan} graphed"], keys[f"{candidate.plan} graphed"] = graphed, candidate.key("graph")
        failures: dict[str, str] = {}

        def measure(name: str, run: Callable[[], float]) -> float | None:
            ms = None
            failure = self.journal.attempt(keys[name]) or ""
            if not failure:
                try:
                    ms = run()
                except Exception as error:
                    failure = attempts.reason_of(error)
                    attempts.check_context(self.device)
                self.journal.outcome(keys[name], failure)
            if failure:
                failures[name] = failure
            return ms

        # Alone, a candidate has nothing to win: its milliseconds say whether a graph pays, which fewer calls show.
        times = interleaved(runs, z, measure=measure, budget_seconds=3.0 if len(timed) > 1 else 1.0)
        for candidate in timed:
            candidate.latency_ms = times.get(candidate.plan)
            candidate.graph_latency_ms = times.get(f"{candidate.plan} graphed")
            candidate.graph_reason = failures.get(f"{candidate.plan} graphed", candidate.graph_reason)
            if candidate.plan in failures:
                candidate.reason = f"timing: {failures[candidate.plan]}"
                candidate.program = None
        return times.get("eager")

    def captured(self, candidate: Candidate, z: torch.Tensor) -> Callable[[torch.Tensor], Any] | None:
        """The candidate's program as a CUDA graph; None where it cannot be one, and `graph_reason` says why."""
        candidate.graph_reason = self.journal.attempt(candidate.key("graph")) or ""
        if candidate.graph_reason:
            return None
        graphed: GraphedProgram | GraphedStep | None
        if self.request.state:
            graphed, candidate.graph_reason = GraphedStep.attempt(candidate.program, self.example(candidate.precision))
        else:
            graphed = GraphedProgram(candidate.program, z)
            candidate.graph_reason = graphed.reason
        if candidate.graph_reason:
            attempts.check_context(self.device)
        self.journal.outcome(candidate.key("graph"), candidate.graph_reason)
        return None if candidate.graph_reason or graphed is None else self.with_state(graphed, candidate.precision)

    # ---- streaming decoders: a step takes a state after the latents and returns the next one after the frames

    def example(self, precision: str) -> tuple[torch.Tensor, ...]:
        """Seeded latents of one call, followed by a state where there is one."""
        request = self.request
        return example(request.input_shape, request.state, dtype_of(precision), self.device, request.seed)

    def chained(self, decode: Any) -> Any:
        """Returns the module that the parity check runs: the decoder, or `chain.STEPS` steps of it."""
        return Chain(decode, self.request.state) if self.request.state else decode

    def checked_shape(self) -> tuple[int, ...]:
        """Shape of the latents that the parity check decodes."""
        streams, *latent = self.request.input_shape
        return (streams * STEPS, *latent) if self.request.state else self.request.input_shape

    def with_state(self, decode: Callable[..., Any], precision: str) -> Callable[[torch.Tensor], Any]:
        """`decode` as a function of latents alone: from the same state each time, or as a stream where it keeps one."""
        if not self.request.state:
            return decode
        state: State = self.example(precision)[1:]
        if not isinstance(decode, GraphedStep):
            return lambda z: decode(z, *state)

        def stepped(z: torch.Tensor) -> torch.Tensor:
            nonlocal state
            frames, state = decode.step_in_place(z, state)
            return frames

        return stepped

    def build_candidate(self, plan: plans.Plan, precision: str) -> Candidate:
        """Lowers, builds and first runs one plan, and isolates what fails. A plan that fails has a `reason`.

        Raises:
            BrokenContext: the process has to end.
        """
        begin = time.monotonic()
        candidate = Candidate(plan=plan.name, precision=precision)
        built: dict[frozenset[str], tuple[Any, compiler.Partition]] = {}
        try:
            self.journal.stage("lower", plan=plan.name, precision=precision)
            module, candidate.rewrites = plan.lower(self.folded, self.request, precision, self.recording)
            z, *state = self.example(precision)
            exported = export_decoder(module, z, *state)
            ours = kernels.calls_ours(exported)
        except Exception as error:
            candidate.reason = attempts.reason_of(error)
            attempts.check_context(self.device)  # lowering to 8 bits decodes what it is calibrated on
            return candidate
        settings = {**compile_settings(self.request, precision), **plan.settings}

        def works(kept: frozenset[str]) -> str:
            key = f"build|{plan.name}|{precision}|{','.join(sorted(kept))}"
            built.clear()
            attempts.release()
            known = self.journal.attempt(key)
            if known:
                return known
            try:
                self.journal.stage("compile", plan=plan.name, precision=precision, kept=len(kept))
                if ours and not kept:
                    importlib.import_module("owl_wms.ops.common.ahead").compile_ahead(module, z)
                if plan.library:
                    program, partition = compiler.compile_exported(
                        exported, z, settings, state=state, kept=sorted(kept), progress=self._progress(plan.name)
                    )
                else:
                    candidate.exported = exported
                    program, partition = exported.module(), compiler.left_in_pytorch(exported.graph)
                self.journal.stage("first run", plan=plan.name, precision=precision)
                attempts.run(program, z, *state)
                built[kept] = (program, partition)
                reason = ""
            except Exception as error:
                reason = attempts.reason_of(error)
                attempts.check_context(self.device)
            self.journal.outcome(key, reason)
            return reason

        first = time.monotonic()
        kept, candidate.reason = frozenset[str](), works(frozenset())
        one_build = time.monotonic() - first
        if candidate.reason and plan.isolates:
            classes = like_modules(module, exported)
            candidate.kept_reason = candidate.reason
            candidate.probes = self.prober.probe(module, classes, precision, settings)
            candidate.isolation = self.isolate(candidate, classes, works, one_build)
            if candidate.isolation.kept is not None:
                kept = frozenset(candidate.isolation.kept)
                candidate.reason = "" if kept in built else works(kept)
                candidate.kept = tuple(sorted(kept))
        if not candidate.reason:
            candidate.program, candidate.partition = built[kept]
        candidate.build_seconds = time.monotonic() - begin
        return candidate

    def isolate(
        self, candidate: Candidate, classes: list[list[list[str]]], works: Works, build_seconds: float
    ) -> Isolation:
        """Searches for the modules to leave in PyTorch; a build without any takes `build_seconds`."""
        suspects = candidate.probes
        self.journal.stage("isolation", plan=candidate.plan, precision=candidate.precision, suspects=len(suspects))
        deadline = time.monotonic() + max(ISOLATION_SECONDS, ISOLATION_BUILDS * build_seconds)
        deadline = min(deadline, self.last_try)
        return smallest_kept(
            classes,
            works,
            max_tries=ISOLATION_TRIES,
            deadline=min(deadline, self.enough) if self.usable else deadline,
            suspects=suspects,
            reason=candidate.kept_reason,
        )

    def _progress(self, plan: str) -> compiler.Progress:
        last = [0.0]

        def tell(phase: str, step: int, steps: int) -> None:
            now = time.monotonic()
            if now - last[0] > 0.5:
                last[0] = now
                self.journal.stage("tensorrt", plan=plan, phase=phase, step=step, steps=steps)

        return tell
