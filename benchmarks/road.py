"""Measures what a user runs: from a file of latents to files of frames, in trainers, and from a cold start.

Every part runs in a process of its own, and the results are written after each, so that one that fails or a time limit
costs its own figures alone.

Usage:
    python -m benchmarks.road --out build/road            on a machine with a GPU; at most 8 minutes
    python -m benchmarks.road --cpu --out build/road      small counts on the CPU: does the road hold together
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import decoders, harness

CONFIGS = {
    "dist": (decoders.VAE_CONFIGS / "dec_dist.yml", None),
    "base": (decoders.VAE_CONFIGS / "base.yml", None),
    "small": (decoders.SMALL, None),
    "demo": (decoders.DEMO / "demo_vae.yml", decoders.DEMO / "demo_vae.safetensors"),
}
PART_SECONDS = 150.0
STARTS = 3
"""Cached starts that are measured; their median counts."""
STAGES = ("read", "decode", "copy", "encode", "write")
# Before this road was built, same machine: 4,000 latents of the demo decoder to a clip, 30 of 89.7 s its first build.
BEFORE = {"seconds": 89.7, "frames": 4000, "decoder": "demo"}
# Starts at commit c65b72e, same kind of machine, before call lists: seconds of START_STAGES.
START_STAGES = ("import owl_wms", "CUDA", "weights", "program and first batch")
STARTS_BEFORE = {
    "dist cached": (0.44, 0.15, 4.06, 1.03),
    "base cached": (0.51, 0.14, 4.78, 2.21),
    "dist built": (0.45, 0.20, 4.39, 18.94),
    "base built": (0.53, 0.16, 4.91, 30.10),
}
# At least so many times as fast as torch.compile in trainers; at most so many seconds to the first frames of a new
# process whose program is stored, and of one that builds it.
WANTED = {"dist": (3.6, 2.0, 15.0), "base": (2.0, 3.5, 30.0)}


class Road:
    """Runs parts, keeps their results in one document, and writes it after each."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.ending = time.monotonic() + args.seconds
        self.result: dict[str, Any] = harness.document("road", None, [], parts={}, cores=os.cpu_count())
        self.parts: dict[str, Any] = self.result["parts"]

    def settings(self, decoder: str, **more: Any) -> dict[str, Any]:
        """Returns what the parts and the command need to know."""
        config, checkpoint = CONFIGS[decoder]
        return {
            "work": str(self.work),
            "device": "cpu" if self.args.cpu else "cuda",
            "decoder": decoder,
            "config": str(config),
            "checkpoint": str(checkpoint or self.work / f"{decoder}.safetensors"),
            "latents": str(self.work / f"{decoder}_latents.npy"),
            "array": str(self.work / f"{decoder}.npy"),
            "frames": self.args.frames,
            "batch": self.args.batch,
            "rounds": 2 if self.args.cpu else 3,
            **more,
        }

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Adds a part's result and writes the document."""
        self.parts[name] = found
        harness.write(self.result, self.args.out.with_suffix(".json"))
        said = found.get("failed") or found.get("skipped")
        harness.console.print(f"{name}: {said or 'done'}", markup=False)

    def run(self, name: str, command: list[str], read: Callable[[subprocess.CompletedProcess[str]], Any]) -> None:
        """Runs a command unless its result is there or time is up; a failure is a result."""
        left = self.ending - time.monotonic()
        if self.args.only and not any(name.startswith(only) for only in self.args.only):
            return
        if left < 10:
            self.keep(name, {"skipped": f"no time left of {self.args.seconds} s"})
            return
        environment = {**os.environ, "TENSORRT_CACHE_DIR": str(self.work / "cache")}
        begun = time.monotonic()
        try:
            ran = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=min(left, PART_SECONDS),
                env=environment,
                cwd=decoders.ROOT,
                check=False,
            )
            found = read(ran) if ran.returncode == 0 else {"failed": _tail(ran.stderr)}
        except subprocess.TimeoutExpired:
            found = {"failed": f"not done after {min(left, PART_SECONDS):.0f} s"}
        except Exception as error:  # whatever it printed instead of a result
            found = {"failed": f"{type(error).__name__}: {error}"}
        self.keep(name, {**found, "wall_seconds": time.monotonic() - begun})

    def part(self, name: str, part: str, decoder: str, **more: Any) -> None:
        """Runs a part of `road_parts`."""
        given = json.dumps(self.settings(decoder, begun=time.time(), **more))
        command = [sys.executable, "-m", "benchmarks.road_parts", part, given]
        self.run(name, command, lambda ran: json.loads(ran.stdout.strip().splitlines()[-1]))

    def decode(self, name: str, decoder: str, out: Path) -> None:
        """Runs `owl-wms decode` as a user does."""
        s = self.settings(decoder)
        command = [sys.executable, "-m", "owl_wms", "decode", s["latents"], "--vae-config", s["config"]]
        command += ["--checkpoint", s["checkpoint"], "--out", str(out), "--overwrite", "--device", s["device"]]
        self.run(name, [*command, "--batch-size", str(s["batch"])], lambda ran: _said(ran.stderr))


def _said(text: str) -> dict[str, Any]:
    """Figures of what `owl-wms decode` prints."""
    text = " ".join(text.split())
    rate = re.search(r"(\d+) frames, ([\d.]+) frames/s", text)
    if rate is None:
        return {"failed": f"said no rate: {text[-300:]}"}
    whole = re.search(r"time: ([\d.]+) s;", text)
    spent = {stage: float(found[1]) for stage in STAGES if (found := re.search(rf"{stage} ([\d.]+) s", text))}
    by = re.search(r"decoded by: (\S+)", text)
    return {
        "frames": int(rate[1]),
        "frames_per_second": float(rate[2]),
        "seconds": float(whole[1]) if whole else None,
        "spent": spent,
        "backend": by[1] if by else "",
    }


def _tail(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-500:] or "no message"


def measure(road: Road) -> None:
    """Returns all parts, most wanted first."""
    args = road.args
    for decoder in args.decoders:
        road.part(f"files {decoder}", "files", decoder)
        if not args.cpu:
            road.part(f"first {decoder} built", "first", decoder)
        for number in range(STARTS):
            road.part(f"first {decoder} cached{f' {number + 1}' if number else ''}", "first", decoder)
        road.part(f"steps {decoder}", "steps", decoder)
    streamed = [decoder for decoder in args.decoders if decoder != "base"]
    for decoder in streamed:
        road.part(f"rate {decoder}", "rate", decoder)
        if args.cpu:
            road.part(f"command {decoder}", "command", decoder, frames=100, rounds=5)
        road.decode(f"npy {decoder}", decoder, road.work / f"{decoder}.npy")
        if args.video:
            road.decode(f"mp4 {decoder}", decoder, road.work / f"{decoder}.mp4")
            road.part(f"x264 {decoder}", "x264", decoder)
        else:
            road.keep(f"mp4 {decoder}", {"skipped": "PyAV is not installed here"})
        for name in (f"{decoder}.npy", f"{decoder}.mp4", "rate.npy", "memory.mp4"):
            (road.work / name).unlink(missing_ok=True)
    for decoder in streamed[:1]:
        if not args.cpu:
            road.part(f"background {decoder}", "background", decoder)
        road.part(f"memory {decoder}", "memory", decoder, frames=args.long)
    for decoder in args.decoders:
        if decoder in ("dist", "base") and not args.cpu:
            road.part(f"training {decoder}", "training", decoder, whole=decoder == "dist")


def _ratio(a: Any, b: Any) -> float | None:
    return a / b if isinstance(a, float) and isinstance(b, float) and b else None


class Goals:
    """Rows (what, found, wanted, met) about the parts of a run; what was not measured says so."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts
        self.rows: list[tuple[str, str, str, str]] = []

    def get(self, part: str, *keys: str) -> Any:
        """Returns a figure of a part; None if it was not measured."""
        found = self.parts.get(part, {})
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def add(
        self, what: str, value: float | None, form: str, wanted: str, met: Callable[[float], bool], part: str
    ) -> None:
        """Adds the row of one value, shown as `form` says; without a value, why its part has none."""
        if value is None:
            said = self.get(part, "failed") or self.get(part, "skipped") or "not measured"
            self.rows.append((what, str(said)[:90], wanted, "-"))
        else:
            self.rows.append((what, form.format(value), wanted, "yes" if met(value) else "NO"))


def table(parts: dict[str, Any], names: list[str]) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the `Goals` of these decoders."""
    goals = Goals(parts)
    for name in names:
        if name != "base":
            _add_clips(goals, name)
    for name in names:
        if name in WANTED:
            _add_trainers_and_starts(goals, name)
    return goals.rows


def _add_clips(goals: Goals, name: str) -> None:
    get, rate, npy, mp4, memory = goals.get, f"rate {name}", f"npy {name}", f"mp4 {name}", f"memory {name}"
    own = get(rate, "frames_per_second", "function, bf16")
    least = 0.95 if name == "small" else 0.8
    rows = [
        ("decode function to bytes", get(rate, "frames_per_second", "function, bytes"), rate),
        ("decode_stream", get(rate, "frames_per_second", "stream"), rate),
        ("decode_stream to .npy", get(rate, "frames_per_second", "stream to .npy"), rate),
    ]
    if name != "small":  # by the clock on the wall, while the others are by the processor's: the rows below
        rows.append(("owl-wms decode to .npy", get(npy, "frames_per_second"), npy))
    for what, got, part in rows:
        text = f"{{:.0%}} of the decode function ({got or 0:.1f} of {own or 0:.1f} frames/s)"
        goals.add(f"{name}: {what}", _ratio(got, own), text, f">= {least:.0%}", _least(least), part)
    command = f"command {name}"
    for clock in ("processor", "clock") if command in goals.parts else ():
        text = f"{{:.0%}} of the decode function by the {clock} (median of {get(command, 'rounds')}; "
        text += f"load of the machine {get(command, 'load') or 0:.0f})"
        goals.add(
            f"{name}: owl-wms decode to .npy", get(command, "ratio", clock), text, ">= 95%", _least(0.95), command
        )
    if name != "small":  # there decoder and encoder share two cores
        got, fed = get(mp4, "frames_per_second"), get(f"x264 {name}", "frames_per_second")
        limit = min(fed, own) if fed and own else None
        text = f"{{:.0%}} of {'x264' if limit == fed else 'the decode function'} ({got or 0:.1f} of {limit or 0:.1f}"
        text += f" frames/s; x264 fed from memory {fed or 0:.0f})"
        goals.add(f"{name}: owl-wms decode to .mp4", _ratio(got, limit), text, ">= 90 %", _least(0.9), mp4)
    early = get(memory, "early_mib")
    grown = (get(memory, "end_mib") or 0) - early if early else None
    text = f"{{:+.0f}} MiB over {get(memory, 'frames')} frames"
    goals.add(f"{name}: memory from 10 % to 100 % of the clip", grown, text, "flat", lambda mib: mib < 64, memory)


def _add_trainers_and_starts(goals: Goals, name: str) -> None:
    times, *limits = WANTED[name]
    get, training, background = goals.get, f"training {name}", f"background {name}"
    ms, error = get(training, "ms") or {}, get(training, "relative_error") or {}
    ours = ms.get("compile_for_training")
    text = f"{{:.2f}}x torch.compile, {ours or 0:.2f} ms, error {error.get('compile_for_training', 0):.1e}"
    text += f" (eager {ms.get('eager', 0):.2f} ms, {error.get('eager', 0):.1e})"
    over = _ratio(ms.get("torch.compile"), ours)
    goals.add(f"{name}: compile_for_training", over, text, f">= {times}x", _least(times), training)
    first = f"{name}: first decode"
    for what, limit in zip(("cached", "built"), limits, strict=True):
        part = f"first {name} {what}"
        starts = [get(f"{part}{number}", "after_torch") for number in ("", " 2", " 3")]
        after = median(known) if (known := [seconds for seconds in starts if seconds is not None]) else None
        goals.add(f"{first}, {what}, after import torch", after, "{:.2f} s", f"<= {limit} s", _most(limit), part)
    text = "{:.2f} s, by PyTorch; the program takes over after "
    text += f"{get(background, 'swapped_after_torch') or 0:.1f} s"
    what = f"{first}, built in the background, after import torch"
    goals.add(what, get(background, "after_torch"), text, f"<= {limits[1]} s", _most(limits[1]), background)


def _least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


def _most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


def wrong(parts: dict[str, Any]) -> list[str]:
    """Returns what is not slow but wrong."""
    found = []
    for name, part in parts.items():
        for key in ("same_bytes", "kernel_is_the_reference"):
            if part.get(key) is False:
                found.append(f"{name}: {key} is false")
        if part.get("no_call_list") and part["backend"] == "tensorrt":
            found.append(f"{name}: its program has no call list: {part['no_call_list']}")
        errors = part.get("relative_error", {})
        ours, eager = errors.get("compile_for_training", 0.0), errors.get("eager", 0.0)
        if ours > 2 * eager:
            found.append(f"{name}: error {ours:.1e} exceeds twice eager's {eager:.1e}")
    return found


def main() -> int:
    """Entry point; 1 where a result is wrong."""
    from benchmarks import road_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/road"), help="NAME of NAME.json, .md and .png")
    parser.add_argument("--cpu", action="store_true", help="small counts on the CPU, with a small decoder")
    parser.add_argument("--decoders", nargs="+", choices=list(CONFIGS), help="in this order (default: dist base demo)")
    parser.add_argument("--frames", type=int, help="latents of a clip (default: 4,000; 64 on a CPU)")
    parser.add_argument("--long", type=int, help="latents of the memory test (default: 100,000; 320 on a CPU)")
    parser.add_argument("--batch", type=int, help="frames per batch (default: 8)")
    parser.add_argument("--seconds", type=float, default=460, help="time for all parts together")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so, such as 'rate' or 'first base'")
    parser.add_argument("--ram-disk", type=Path, default=Path("/dev/shm"), help="where files are written")
    args = parser.parse_args()
    if not args.cpu:
        harness.require_gpu(parser)
    args.decoders = args.decoders or (["small"] if args.cpu else ["dist", "base", "demo"])
    args.frames, args.long = args.frames or (64 if args.cpu else 4000), args.long or (320 if args.cpu else 100_000)
    args.batch = args.batch or 8
    try:
        import av  # noqa: F401

        args.video = True
    except ImportError:
        args.video = False
    work = Path(tempfile.mkdtemp(prefix="owl_road_", dir=args.ram_disk if args.ram_disk.is_dir() else None))
    road = Road(args, work)
    road.result["decoders"] = args.decoders
    try:
        measure(road)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        road_report.write(road.result, args.decoders, args.out)
    for row in table(road.parts, args.decoders):
        harness.console.print("  ".join((row[3].rjust(3), row[0].ljust(46), row[1], f"[{row[2]}]")), markup=False)
    mistakes = wrong(road.parts)
    for mistake in mistakes:
        harness.console.print(f"WRONG: {mistake}", markup=False)
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
