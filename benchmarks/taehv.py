"""Times streaming TAEHV: milliseconds per latent beside what people run today, and a check of every kernel in it.

    python -m benchmarks.taehv --check                  # one minute: every op against its reference, then whole steps
    python -m benchmarks.taehv --out benchmarks/results/taehv_h200.json       # five minutes; writes .md beside it
    python -m benchmarks.taehv --toy                    # every line of it on a CPU, in bf16; its times mean nothing

Rivals, all fp16, one stream: eager PyTorch; the author's arrangement, which takes one frame at a time through all
layers; torch.compile; the same as a CUDA graph; TensorRT alone as a CUDA graph. All graphs are made by the same class
as ours: they keep the state in their buffers, and the row includes the copy of the frames into a new tensor.
`to bytes` is ours until the frames stand on the host as bytes.

First come our own rows of every form, then the rivals form by form. Whenever a candidate is ready, all of its form are
timed again, in turns, and the file is written: a time limit costs what was not ready.
Exit status 1: a wrong result, or an error above 1.2 times that of eager fp16.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.baselines import time_limit
from benchmarks.harness import (
    Timing,
    console,
    document,
    finish,
    measure_ceilings,
    measure_interleaved,
    require_gpu,
    show,
    timing_of,
)
from benchmarks.taehv_checks import check, long_run
from benchmarks.taehv_forms import CHAIN, FORMS, MOST_ERROR, TOY, TOY_FORMS, Bench, Example
from benchmarks.taehv_profile import choices_text, noted_times, profile_text
from benchmarks.taehv_steps import TO_BYTES, Makers, Step, own, rivals
from owl_wms.fused.taehv import fuse
from owl_wms.power import under_load
from owl_wms.state import State

HEAD_START = 1_000_000  # clock cycles, some 0.6 ms: the launch of a graph is not timed
RIVAL_SECONDS = 50  # in which a rival has to be ready
DRAWING = {"ours", "TensorRT, CUDA graph", "torch.compile, CUDA graph"}  # whose watts are read: they fill the GPU


class Candidate:
    """A step and the state of its own stream; called with a latent it goes on by one step."""

    def __init__(self, step: Step, state: State) -> None:
        self.step, self.state = step, state

    def __call__(self, latent: Tensor) -> Tensor:
        frames, self.state = self.step(latent, self.state)
        return frames


def timed(running: dict[str, Candidate], latents: list[Tensor], bench: Bench) -> dict[str, Timing]:
    """Measures milliseconds of every candidate, one after the other in each round."""
    if bench.device == "cuda":
        return measure_interleaved(dict(running), latents, rounds=bench.rounds, head_start=HEAD_START)
    samples: dict[str, list[float]] = {label: [] for label in running}
    for latent in latents[: bench.rounds]:
        for label, run in running.items():
            begin = time.perf_counter()
            run(latent)
            samples[label].append((time.perf_counter() - begin) * 1e3)
    return {label: timing_of(values) for label, values in samples.items()}


class Course:
    """The measurement of one form: candidates that are ready, their errors, times and watts.

    Args:
        name: of the form.
        profiles: folder for the profile of our step; None for none.
    """

    def __init__(self, name: str, bench: Bench, profiles: Path | None) -> None:
        self.bench, self.example, self._profiles = bench, Example(name, bench), profiles
        with noted_times() as self._choices:
            self.fused = fuse(self.example.decoder, bench.half, self.example.shape)
        self._running: dict[str, Candidate] = {}
        self._errors: dict[str, list[float]] = {}
        self._times: dict[str, Timing] = {}
        self._watts: dict[str, float] = {}

    def add(self, makers: Makers, limit: int = 0) -> None:
        """Makes candidates and times all that are ready; one that does not run is a line that says so."""
        for label, maker in makers.items():
            began = time.monotonic()
            z, start = self.example.latents[0], self.example.start
            try:
                with time_limit(limit or 10_000):
                    step = maker(z, start)
                    if label != TO_BYTES:
                        self._errors[label] = self.example.errors(step)
                candidate = Candidate(step, start)
                candidate(z)
                self._running[label] = candidate
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                console.print(f"{self.example.name}: {label} does not run: {reason}")
                continue
            console.print(f"{self.example.name}: {label} is ready after {time.monotonic() - began:.0f} s", style="dim")
        self._time()

    def _time(self) -> None:
        latents = list(self.example.latents)
        # One that waits for the host has its turn alone: the next one would begin on an idle GPU.
        waiting = {label: run for label, run in self._running.items() if label == TO_BYTES}
        together = {label: run for label, run in self._running.items() if label not in waiting}
        self._times = timed(together, latents, self.bench) | timed(waiting, latents, self.bench)
        if self.bench.device == "cuda":
            for label in together.keys() & DRAWING - self._watts.keys():
                run = functools.partial(self._running[label], latents[0])
                self._watts[label] = under_load(run, latents[0].device, self.bench.power_seconds)["watts"]

    def profile(self) -> None:
        """Writes where the time of our step goes."""
        if self._profiles is None or "ours" not in self._running:
            return
        self._profiles.mkdir(parents=True, exist_ok=True)
        file = self._profiles / f"{re.sub('[^a-z0-9]+', '_', self.example.name)}.txt"
        choices = choices_text(self.fused, self._choices)
        file.write_text(choices, encoding="utf-8")
        try:
            file.write_text(f"{profile_text(self._running['ours'], self.example.latents)}\n{choices}", encoding="utf-8")
        except Exception as error:  # of the profiler: the times do not depend on it
            console.print(f"{self.example.name}: no profile: {type(error).__name__}: {error}")

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row per candidate."""
        rows = []
        for label, measured in self._times.items():
            strays = self._errors.get(label)
            rows.append(
                {
                    "form": self.example.name,
                    "candidate": label,
                    "median_ms": measured.median_ms,
                    "p20_ms": measured.p20_ms,
                    "p80_ms": measured.p80_ms,
                    "error_first": None if strays is None else strays[0],
                    "error_last": None if strays is None else strays[-1],
                    "error_worst": None if strays is None else max(strays),
                    "watts": self._watts.get(label),
                    "wanted_ms": self.example.wanted_ms if label == "ours" else None,
                }
            )
        return rows

    def fine(self) -> bool:
        """Returns whether ours is near enough to fp32."""
        worst = {label: max(strays) for label, strays in self._errors.items()}
        return "ours" in worst and worst["ours"] <= MOST_ERROR * worst.get("eager", 0.0)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table, also printed."""
    lines = []
    for row in rows:
        wanted = f" (wanted {row['wanted_ms']:.2f})" if row["wanted_ms"] else ""
        lines.append(
            (
                row["form"],
                row["candidate"],
                f"{row['median_ms']:.3f}{wanted}",
                f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}",
                *("-" if row[key] is None else f"{row[key]:.2e}" for key in ("error_first", "error_last")),
                "-" if row["watts"] is None else f"{row['watts']:.0f}",
            )
        )
    return show(("form", "candidate", "ms per latent", "p20-p80", "error, step 1", f"step {CHAIN}", "W"), lines)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with references")
    parser.add_argument("--form", action="append", choices=[*FORMS, *TOY_FORMS], help="only these forms")
    parser.add_argument("--toy", action="store_true", help="tiny forms on the CPU: whether it runs, not how fast")
    parser.add_argument("--no-tensorrt", action="store_true", help="leave TensorRT alone out")
    parser.add_argument("--steps", type=int, default=10_000, help="of the long run; 0 leaves it out")
    parser.add_argument("--profiles", type=Path, help="folder for a text per form: kernels of our step by time")
    parser.add_argument("--out", type=Path, help="JSON file; a table in Markdown is written beside it")
    given = parser.parse_args(arguments)
    bench = TOY if given.toy else Bench()
    if not given.toy:
        require_gpu(parser)
    unknown = [name for name in given.form or () if name not in bench.forms]
    if unknown:
        parser.error(f"--form {unknown[0]}: here there are {', '.join(bench.forms)}")
    torch.backends.cuda.matmul.allow_tf32 = False
    if given.check:
        return 0 if check(bench) else 1
    ceilings = None if given.toy else measure_ceilings(torch.float16)
    courses: list[Course] = []
    run: dict[str, Any] | None = None

    def so_far() -> dict[str, Any]:
        result = document("taehv", ceilings, [row for course in courses for row in course.rows()], long_run=run)
        write(result, given.out)
        return result

    for name in given.form or bench.forms:
        try:
            course = Course(name, bench, given.profiles)
        except Exception as error:  # of our kernels, say: the other forms have rows of their own
            console.print(f"{name}: not measured: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            continue
        courses.append(course)
        course.add(own(course.example.decoder, course.fused, bench.half))
        so_far()
        course.profile()
    for course in courses:
        for label, maker in rivals(course.example.decoder, bench.half, not given.no_tensorrt and not given.toy).items():
            course.add({label: maker}, RIVAL_SECONDS)
            so_far()
        with contextlib.suppress(Exception):
            torch._dynamo.reset()  # what it compiled for one form is of no use to the next
        if run is None and given.steps:
            run = long_run(given.steps, bench)
            console.print(
                f"{run['steps']} steps: errors {run['errors'][0]:.2e} to {run['errors'][-1]:.2e}, flat: {run['flat']}"
            )
    result = so_far()
    finish(result, given.out)
    measured = len(courses) == len(given.form or bench.forms) and all(course.fine() for course in courses)
    return 0 if measured and (run is None or run["flat"]) else 1


def write(result: dict[str, Any], out: Path | None) -> None:
    """Writes the result so far and its table in Markdown, and prints the table."""
    text = markdown(result)
    if out is not None:
        harness.write(result, out)
        out.with_suffix(".md").write_text(text, encoding="utf-8")


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown; its table is printed too."""
    return f"# Streaming TAEHV, fp16, one stream\n\n{harness.origin(result)}\n\n{table(result['rows'])}"


if __name__ == "__main__":
    sys.exit(main())
