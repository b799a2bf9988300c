"""Measures every decoder family in one sitting: one commit, one card, one table, beside eager and compiled PyTorch.

Each family lives in a process of its own, so that a failure costs its rows and no others, and keeps its kernels from
batch to batch. First everything that is not timed, side by side: torch.compile fills its cache with what it makes of
each shape, and the families compute their fp32 frames. Then the families measure one after the other, most wanted rows
first, and the result is written after each panel. Our forms are the fused ones as CUDA graphs, which is the plan `ops`.

Usage:
    python -m benchmarks.table --out result.json --seconds 500
    python -m benchmarks.table --out result.json --ready FILE --after FILE  # another measurement in between
    python -m benchmarks.table --toy      # a small decoder on a CPU: every process runs, and the times say nothing
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, decoder, harness
from benchmarks.aside import Aside
from benchmarks.decoders import subject

EAGER, COMPILED, REDUCED = "eager bf16", "torch.compile bf16", "torch.compile reduce-overhead bf16"
HALF, ALL = ("bf16", "fp16"), ("bf16", "fp16", "int8", "fp8")
CORES_PER_COMPILER = 3
PANEL_SECONDS = 120
"""A panel that takes longer hangs: its process is ended."""
LEAST_SECONDS = 12
"""With less time left, no panel begins."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One decoder at one batch size: precisions of our rows, the compiled rivals, and timed calls of each."""

    decoder: str
    batch: int
    precisions: tuple[str, ...] = ALL
    rivals: tuple[str, ...] = (COMPILED,)
    rounds: int = 30


PANELS = (
    Panel(decoder="dist", batch=8),
    Panel(decoder="base", batch=8, rounds=10),
    Panel(decoder="sana", batch=8, rounds=12, precisions=HALF),
    Panel(decoder="dist_learned", batch=8),
    Panel(decoder="base_learned", batch=8, rounds=8),
    Panel(decoder="distill_vae", batch=8),
    Panel(decoder="demo", batch=8),
    Panel(decoder="dist", batch=1, rivals=(COMPILED, REDUCED), rounds=60),
    Panel(decoder="dist", batch=4),
    Panel(decoder="base", batch=1, rivals=(COMPILED, REDUCED), rounds=20),
    Panel(decoder="base", batch=4, rounds=12),
    Panel(decoder="sana", batch=1, rivals=(COMPILED, REDUCED), rounds=20, precisions=HALF),
    Panel(decoder="sana", batch=4, rounds=12, precisions=HALF),
    Panel(decoder="dist_learned", batch=1, rivals=()),
    Panel(decoder="base_learned", batch=1, rivals=(), rounds=12),
    Panel(decoder="distill_vae", batch=1, rivals=()),
    Panel(decoder="demo", batch=1, rivals=()),
    Panel(decoder="dist_learned", batch=4, rivals=()),
    Panel(decoder="base_learned", batch=4, rivals=(), rounds=8),
    Panel(decoder="distill_vae", batch=4, rivals=()),
    Panel(decoder="demo", batch=4, rivals=()),
)
TOY = (
    Panel(decoder="small", batch=2, rounds=2),
    Panel(decoder="small", batch=1, rounds=2, rivals=(), precisions=("bf16", "int8")),
)


class Compiled:
    """What torch.compile makes of one shape, in its cache; `seconds` of the first call, which compiled."""

    def __init__(self, name: str, batch: int, rival: str, device: str) -> None:
        chosen = subject(name)
        run, _ = baselines.candidates(chosen.make().to(device), 0)[rival]()
        z = torch.randn(batch, *chosen.latent_shape, device=device).bfloat16()
        begin = time.perf_counter()
        with torch.no_grad():
            run(z)
        harness.wait(z.device)
        self._seconds = time.perf_counter() - begin

    def seconds(self) -> float:
        """How long it took."""
        return self._seconds


class Family:
    """One decoder in its process, with latents and fp32 frames for its largest batch."""

    def __init__(self, name: str, largest: int, device: str) -> None:
        self._device = device
        self._prepared = decoder.Prepared.of(name, largest, device)
        torch.cuda.empty_cache()  # the others' processes share the card's memory

    def ceilings(self) -> harness.Ceilings:
        """What the card does at best, now."""
        return harness.measure_ceilings(device=self._device)

    def measure(self, panel: Panel, ceilings: harness.Ceilings, load_seconds: float) -> list[dict[str, Any]]:
        """Rows of one batch size."""
        asked = argparse.Namespace(
            baselines=[EAGER, *panel.rivals],
            precision=panel.precisions,
            rounds=panel.rounds,
            load_seconds=load_seconds,
            max_autotune_seconds=0,
            older=[],
            plans=[],
            each_plan=False,
            in_process=True,
        )
        rows = decoder.measure(self._prepared, panel.batch, asked, ceilings)
        torch.cuda.empty_cache()
        return [dataclasses.asdict(row) for row in rows]


Shape = tuple[str, int, str]
"""Decoder, batch size and rival."""


def compile_all(shapes: Sequence[Shape], device: str, until: float) -> dict[Shape, float]:
    """Fills torch.compile's cache, several shapes at once, the first ones first.

    Returns:
        Seconds of each that was ready by `until` (as `time.monotonic` counts) and did not fail.
    """
    waiting = list(shapes)
    running: dict[Shape, Aside] = {}
    ready: dict[Shape, float] = {}
    most = max(1, (os.cpu_count() or 1) // CORES_PER_COMPILER)
    while (waiting or running) and time.monotonic() < until:
        while waiting and len(running) < most:
            shape = waiting.pop(0)
            running[shape] = Aside(Compiled)
            running[shape].begin("new", *shape, device)
        time.sleep(0.2)
        for shape in [shape for shape, process in running.items() if process.done(0)]:
            process = running.pop(shape)
            try:
                process.end()
                ready[shape] = process.ask("seconds")
            except (RuntimeError, OSError) as error:
                harness.console.print(f"{shape}: {error}")
            process.close(5)
    for process in running.values():
        process.close(0)
    return ready


class Sitting:
    """The processes of all families, and the rows so far."""

    def __init__(self, panels: Sequence[Panel], device: str, load_seconds: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ceilings: harness.Ceilings | None = None
        self._device, self._load_seconds = device, load_seconds
        self._largest = {panel.decoder: 0 for panel in panels}
        for panel in panels:
            self._largest[panel.decoder] = max(panel.batch, self._largest[panel.decoder])
        self._families = {name: self._start(name) for name in self._largest}

    def _start(self, name: str) -> Aside:
        family = Aside(Family)
        family.begin("new", name, self._largest[name], self._device)
        return family

    def wait(self, until: float) -> None:
        """Until every family has its fp32 frames; one that fails or is late is told, and gets no rows."""
        for name, family in list(self._families.items()):
            try:
                if not family.done(until - time.monotonic()):
                    raise RuntimeError("not ready in time")
                family.end()
            except RuntimeError as error:
                harness.console.print(f"{name}: {error}")
                self._families.pop(name).close(0)

    def measure(self, panel: Panel, ready: dict[Shape, float], until: float) -> None:
        """Adds the rows of a panel; one whose process fails or hangs has one row that says so."""
        in_time = {rival: ready.get((panel.decoder, panel.batch, rival)) for rival in panel.rivals}
        missing = [rival for rival, seconds in in_time.items() if seconds is None]
        asked = dataclasses.replace(panel, rivals=tuple(rival for rival in panel.rivals if rival not in missing))
        refused = {rival: "not compiled in the time there was" for rival in missing}
        rows: list[dict[str, Any]] = []
        try:
            family = self._families[panel.decoder]
            if self.ceilings is None:
                self.ceilings = family.ask("ceilings")
            family.begin("measure", asked, self.ceilings, self._load_seconds)
            if not family.done(min(PANEL_SECONDS, until - time.monotonic())):
                raise RuntimeError("not measured in the time there was")
            rows = family.end()
        except (KeyError, RuntimeError, OSError) as error:
            reason = "its process did not start" if isinstance(error, KeyError) else str(error)
            refused |= {f"ours {precision}": reason for precision in panel.precisions}
            if panel.decoder in self._families:  # its device may be lost to it: a new one for the next batch
                self._families.pop(panel.decoder).close(0)
        for row in rows:
            if row["candidate"] in in_time and not row["refused"]:
                row["figures"]["ready_seconds"] = in_time[row["candidate"]]  # without a cache
        shared = {"decoder": panel.decoder, "batch": panel.batch, "figures": {}}
        rows += [{**shared, "candidate": candidate, "refused": reason} for candidate, reason in refused.items()]
        self.rows += [{"commit": harness.commit(), **row} for row in rows]

    def close(self) -> None:
        """Ends the processes."""
        for family in self._families.values():
            family.close(5)


def wait_for(file: Path, until: float) -> None:
    """Until the file is there."""
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)


def main() -> None:
    """Parse arguments, measure, print tables and the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", nargs="+", default=[], help="families; all when left out")
    parser.add_argument("--batch", nargs="+", type=int, default=[], help="batch sizes; all when left out")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no panel begins or goes on")
    parser.add_argument("--prepare-seconds", type=float, default=240, help="after which no rival is waited for")
    parser.add_argument("--load-seconds", type=float, default=1.0, help="of unbroken load before it is measured")
    parser.add_argument("--ready", type=Path, help="file that is made when nothing runs any more that is not timed")
    parser.add_argument("--after", type=Path, help="file that is waited for before the first panel is measured")
    parser.add_argument("--toy", action="store_true", help="on a CPU: a small decoder unless --decoder names others")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin = time.monotonic()
    until = begin + args.seconds
    if not args.toy:
        harness.require_gpu(parser)
    device = "cpu" if args.toy else "cuda"
    panels = [
        dataclasses.replace(panel, rounds=2) if args.toy else panel
        for panel in (TOY if args.toy and not args.decoder else PANELS)
        if (not args.decoder or panel.decoder in args.decoder) and (not args.batch or panel.batch in args.batch)
    ]
    if not panels:
        parser.error("no panel has that decoder and batch size")

    sitting = Sitting(panels, device, args.load_seconds)
    shapes = [(panel.decoder, panel.batch, rival) for panel in panels for rival in panel.rivals]
    ready = compile_all(shapes, device, begin + args.prepare_seconds)
    sitting.wait(max(begin + args.prepare_seconds, time.monotonic() + 30))
    harness.console.print(f"prepared after {time.monotonic() - begin:.0f} s: {len(ready)} of {len(shapes)} compiled")
    if args.ready is not None:
        args.ready.touch()
    if args.after is not None:
        wait_for(args.after, until)
    result = harness.document("decoder", None, [])
    for panel in panels:
        since = time.monotonic()
        if since + LEAST_SECONDS > until:
            break
        sitting.measure(panel, ready, until)
        now = time.monotonic()
        harness.console.print(f"{panel.decoder}, batch {panel.batch}: {now - since:.0f} s, {now - begin:.0f} s in all")
        ceilings = None if sitting.ceilings is None else dataclasses.asdict(sitting.ceilings)
        result |= {"ceilings": ceilings, "rows": sitting.rows}
        if args.out is not None:
            harness.write(result, args.out)
    sitting.close()
    decoder.show([decoder.Row(**{key: row[key] for key in row if key != "commit"}) for row in sitting.rows])
    harness.finish(result, args.out)


if __name__ == "__main__":
    main()
