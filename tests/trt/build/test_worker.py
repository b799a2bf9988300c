"""What one plan's failure or death costs: the plan, and neither the build nor the plans before it.

In this process with stand-ins for programs; the last tests let a real child die.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from owl_wms import timing
from owl_wms.cache import CacheStore, Key
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt import plans
from owl_wms.trt.build import worker
from owl_wms.trt.build.attempts import BrokenContext
from owl_wms.trt.build.candidate import Candidate
from owl_wms.trt.build.isolate import Isolation
from owl_wms.trt.build.worker import Worker
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import fp32_copy
from tests.trt import build_child
from tests.trt.build.test_parent import converts, run

FIRST, SECOND = "tensorrt", build_child.SECOND
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
Decode = Callable[[torch.Tensor], torch.Tensor]


class Death(BaseException):
    """Ends the stand-in of a child as a signal would: nothing catches it."""


class Memory:
    """A journal that answers and remembers as a parent with its children does."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.open: list[str] = []
        self.stages: list[tuple[str, str]] = []

    def stage(self, name: str, **details: Any) -> None:
        self.stages.append((name, details.get("plan", "")))

    def attempt(self, key: str) -> str | None:
        if self.known.get(key):
            return self.known[key]
        self.open.append(key)
        return None

    def outcome(self, key: str, reason: str) -> None:
        self.open.remove(key)
        if reason:
            self.known[key] = reason

    def died(self) -> None:
        """What the parent does with a dead child."""
        self.known[self.open[-1]] = "SIGSEGV"
        self.open = []


def worker_of(decoder: nn.Module, journal: Memory, **asked: Any) -> Worker:
    request = Request(input_shape=(2, 4, 3, 3), device="cpu", **asked)
    return Worker(fp32_copy(decoder, "cpu"), Recording.of(decoder, request.input_shape), request, journal)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`build(journal, second)`: a build of two plans whose second is the decoder changed by `second`."""
    decoder = nn.Conv2d(4, 3, 1)
    monkeypatch.setattr(worker, "save", lambda best, *_: {"kept": best.plan})
    monkeypatch.setitem(plans.PLANS, SECOND, build_child.second_plan())

    def make(journal: Memory, second: Callable[[Decode], Decode], precision: str = "bf16") -> dict[str, Any]:
        work = worker_of(decoder, journal, precision=precision, plans=(FIRST, SECOND))

        def candidate(plan: plans.Plan, at: str) -> Candidate:
            good = plans.cast_copy(work.folded, at).eval()
            journal.stage("made", plan=plan.name)
            return Candidate(plan=plan.name, precision=at, program=good if plan.name == FIRST else second(good))

        monkeypatch.setattr(work, "build_candidate", candidate)
        return work.build(tmp_path)

    return make


def raising(error: BaseException, after: int = 0) -> Callable[[Decode], Decode]:
    """A program that works `after` times and then raises; parity takes three calls, timing more."""

    def change(good: Decode) -> Decode:
        calls = iter(range(10**6))

        def program(z: torch.Tensor) -> torch.Tensor:
            if next(calls) >= after:
                raise error
            return good(z)

        return program

    return change


@pytest.mark.parametrize(("after", "stage"), [(0, "parity"), (2, "parity"), (3, "timing"), (6, "timing")])
def test_running_out_of_memory_costs_the_plan_that_did(build: Any, after: int, stage: str) -> None:
    journal = Memory()
    report = build(journal, raising(OUT_OF_MEMORY, after))
    assert (report["plan"], report["kept"]) == (FIRST, FIRST)
    row = next(c for c in report["candidates"] if c["plan"] == SECOND)
    assert not row["usable"]
    assert row["reason"] == f"{stage}: OutOfMemoryError: CUDA out of memory"
    assert row["latency_ms"] is None
    assert report["latency_ms"] > 0
    assert journal.open == []


@pytest.mark.parametrize("after", [0, 2, 3, 6])
def test_who_takes_over_skips_what_killed_the_last_one(build: Any, after: int) -> None:
    journal = Memory()
    with pytest.raises(Death):
        build(journal, raising(Death(), after))
    assert journal.open == [f"plan|{SECOND}|bf16"]
    journal.died()
    journal.stages.clear()
    report = build(journal, raising(Death(), after))
    assert report["plan"] == FIRST
    assert next(c["reason"] for c in report["candidates"] if c["plan"] == SECOND) == "SIGSEGV"
    assert ("made", SECOND) not in journal.stages, "it is not built again"
    assert journal.open == []


def test_a_death_while_saving_leaves_the_next_best(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(best: Candidate, *_: Any) -> dict[str, Any]:
        if best.plan == FIRST:
            raise Death
        return {"kept": best.plan}

    monkeypatch.setattr(worker, "save", save)
    monkeypatch.setattr(Candidate, "best_ms", lambda self: 1.0 if self.plan == FIRST else 2.0)
    journal = Memory()
    with pytest.raises(Death):
        build(journal, lambda good: good)
    journal.died()
    assert build(journal, lambda good: good)["kept"] == SECOND


def test_a_graph_that_kills_is_left_out_and_its_program_stays(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(program: Any, z: torch.Tensor) -> Any:
        raise Death

    monkeypatch.setattr(worker, "GraphedProgram", capture)
    journal = Memory()
    for plan in (FIRST, SECOND):
        with pytest.raises(Death):
            build(journal, lambda good: good)
        assert journal.open == [f"graph|{plan}|bf16"]
        journal.died()
    report = build(journal, lambda good: good)
    told = [(c["plan"], c["usable"], c["graph_reason"]) for c in report["candidates"]]
    assert told == [(FIRST, True, "SIGSEGV"), (SECOND, True, "SIGSEGV")]
    assert not report["cuda_graph"]


def test_eager_that_cannot_be_timed_costs_its_number_alone(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(runs: dict[str, Any], z: torch.Tensor, **rest: Any) -> dict[str, float]:
        return timing.interleaved({**runs, "eager": raising(OUT_OF_MEMORY)(lambda z: z)}, z, **rest)

    monkeypatch.setattr(worker, "interleaved", interleaved)
    report = build(Memory(), lambda good: good)
    assert report["eager_latency_ms"] is None
    assert [c["plan"] for c in report["candidates"]] == [FIRST, SECOND]
    assert all(c["usable"] and c["latency_ms"] > 0 for c in report["candidates"])


def test_a_context_that_lowering_broke_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def check(_: torch.device) -> None:
        raise BrokenContext("illegal memory access")

    monkeypatch.setattr(worker, "export_decoder", export)
    monkeypatch.setattr(worker.attempts, "check_context", check)
    work = worker_of(nn.Conv2d(4, 3, 1), Memory())
    with pytest.raises(BrokenContext):
        work.build_candidate(plans.PLANS[FIRST], "bf16")


def test_no_plan_left_is_an_error_that_names_the_gate(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: Any) -> dict[str, Any]:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(worker.Reference, "check", check)
    with pytest.raises(FastPathError, match=f"{FIRST} at bf16: parity: OutOfMemoryError") as raised:
        build(Memory(), lambda good: good)
    assert raised.value.stage == "parity"


def test_a_plan_that_overflows_leaves_the_report_whole(build: Any, tmp_path: Path) -> None:
    def overflowing(good: Decode) -> Decode:
        return lambda z: good(z) * (math.inf if z.abs().max() > 3 else 1)

    def into(folder: Path) -> dict[str, Any]:
        (folder / "program.pt2").write_bytes(b"program")
        return json.loads(json.dumps(build(Memory(), overflowing, "auto")))

    report = CacheStore(tmp_path / "cache").get_or_build("dcae", Key.of({"a": 1}), into).manifest.report
    assert (report["plan"], report["precision"], report["cuda_graph"]) == (FIRST, "fp16", False)
    assert report["parity"]["passed"]
    assert report["latency_ms"] > 0
    row = next(c for c in report["candidates"] if c["plan"] == SECOND)
    assert "non-finite" in row["reason"]
    assert row["parity"]["relative_error"] is None


@converts
@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (build_child.DIE_IN_PARITY, "parity"),
        pytest.param(build_child.DIE_IN_TIMING, "timing", marks=pytest.mark.slow),
    ],
)
def test_a_real_death_in_parity_or_timing_costs_the_plan(tmp_path: Path, fault: int, stage: str) -> None:
    report, session, _ = run(tmp_path, "square", precision="fp32", plans=(FIRST, SECOND), seed=fault)
    assert session.restarts == 1
    assert report["plan"] == FIRST
    row = next(c for c in report["candidates"] if c["plan"] == SECOND)
    assert f"SIGSEGV (a segmentation fault) in stage '{stage}'" in row["reason"]


def test_no_further_plan_is_begun_when_one_is_usable_and_time_is_spent(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ENOUGH_SECONDS", 0.0)
    journal = Memory()
    report = build(journal, lambda good: good)
    assert report["plan"] == FIRST
    assert [c["reason"] for c in report["candidates"]] == ["", "not tried: the build's time was spent"]
    assert ("made", SECOND) not in journal.stages


def test_no_plan_is_begun_after_one_that_has_always_won(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "settled", lambda self, plan: "it was faster" if plan.name == FIRST else "")
    journal = Memory()
    report = build(journal, lambda good: good)
    assert report["plan"] == FIRST
    assert [c["reason"] for c in report["candidates"]] == ["", "not tried: it was faster"]
    assert ("made", SECOND) not in journal.stages


@pytest.mark.parametrize(
    ("named", "state", "device", "capability", "settled"),
    [
        ((), (), "cuda:0", (9, 0), True),
        ((), (), "cuda:0", (8, 9), False),
        ((), ((1, 2, 3, 3),), "cuda:0", (9, 0), False),
        (("tensorrt+ops", "tensorrt"), (), "cuda:0", (9, 0), False),
        ((), (), "cpu", (9, 0), False),
    ],
)
def test_our_plan_settles_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
    named: tuple[str, ...],
    state: tuple[tuple[int, ...], ...],
    device: str,
    capability: tuple[int, int],
    settled: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    asked = SimpleNamespace(request=SimpleNamespace(plans=named, state=state), device=torch.device(device))
    assert bool(Worker.settled(asked, plans.PLANS["tensorrt+ops"])) == settled  # type: ignore[arg-type]
    with monkeypatch.context() as lacking:  # what was measured had all of our kernels
        lacking.setattr("owl_wms.trt.run.kernels.refused", lambda: {"resize": "no compiler"})
        assert Worker.settled(asked, plans.PLANS["tensorrt+ops"]) == ""  # type: ignore[arg-type]
    assert Worker.settled(asked, plans.PLANS["tensorrt"]) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("usable", [True, False])
def test_a_usable_plan_bounds_the_search_for_what_fails_in_the_next(
    usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute of isolation is well spent where nothing else works, and keeps a user waiting where something does."""
    asked: list[float] = []

    def smallest_kept(*_: Any, deadline: float, **__: Any) -> Isolation:
        asked.append(deadline)
        return Isolation(kept=None, minimal=False, attempts=())

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(worker, "smallest_kept", smallest_kept)
    monkeypatch.setattr(worker, "ISOLATION_SECONDS", 1000.0)
    monkeypatch.setattr(worker.compiler, "compile_exported", fail)
    work = worker_of(nn.Conv2d(4, 3, 1), Memory())
    monkeypatch.setattr(work.prober, "probe", lambda *_: {})
    work.usable = usable
    assert "no kernel" in work.build_candidate(plans.PLANS["tensorrt"], "bf16").reason
    (deadline,) = asked
    assert (deadline <= work.enough) == usable
