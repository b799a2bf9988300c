"""Measures play: frames per second and milliseconds from key to picture, and upstream's model size against PyTorch.

Shipped model: the whole pipeline, called as fast as it goes (`loop`), then behind the real server and codec
(`benchmarks.play_page`). `eager` launches every kernel from Python; `captured` replays CUDA graphs, which is the
default. Upstream's size: `benchmarks.play_upstream`.

A row whose frames differ from eager's by more than rounding fails the run. Rows are written as they grow: a time limit
costs what is missing and nothing else.

Usage:
    python -m benchmarks.play --out build/play.json            # about 5 minutes on an H200; writes build/play.md too
    python -m benchmarks.play --seconds 300 --no-upstream      # five minutes of steady play
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.play_page import page
from benchmarks.play_upstream import measure_upstream
from benchmarks.report import table_lines
from owl_wms.configs import load_world_config
from owl_wms.inference.build import build_pipeline, quick_dtype
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.sampling import frames as frames_module
from owl_wms.sampling.captured import may_capture

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "examples" / "world" / "game_rft.yml"
UPSTREAM = ROOT / "configs" / "dit_v4.yml"
UNCAPPED_FPS = 240.0
COMPARED_FRAMES = 4
# bf16 pictures of two ways to compute the same: mean difference in levels of 255.
LARGEST_DIFFERENCE = 2.0
Keep = Callable[[dict[str, Any]], None]


# ---- the shipped model


def shipped(captured: bool, args: argparse.Namespace) -> InteractivePipeline:
    """Returns the pipeline of `owl-wms play`, or the same without CUDA graphs and without compiled programs."""
    if not captured:
        frames_module.may_capture = lambda model: False
    try:
        device = torch.device(args.device)
        dtype = torch.bfloat16 if device.type == "cuda" else quick_dtype(device, torch.float32)
        weights = WORLD.with_suffix(".safetensors")
        return build_pipeline(WORLD, weights, device=device, dtype=dtype, tensorrt=captured, steps=args.steps)
    finally:
        frames_module.may_capture = may_capture


def loop(pipeline: InteractivePipeline, frames: int) -> tuple[dict[str, float], list[np.ndarray]]:
    """Returns medians in milliseconds over `frames` frames, frames per second, and the first pictures of a world."""
    mouse, buttons = torch.tensor([0.2, 0.0]), torch.eye(len(pipeline.controls))[0]
    pipeline.restart()
    first = [pipeline(mouse, buttons).image for _ in range(COMPARED_FRAMES)]
    for _ in range(min(40, frames)):
        pipeline(mouse, buttons)
    walls, models, decodes = [], [], []
    began = time.perf_counter()
    for _ in range(frames):
        start = time.perf_counter()
        frame = pipeline(mouse, buttons)
        walls.append((time.perf_counter() - start) * 1e3)
        models.append(frame.model_ms)
        decodes.append(frame.decode_ms)
    seconds = time.perf_counter() - began
    return {
        "loop_fps": frames / seconds,
        "frame_ms": statistics.median(walls),
        "model_ms": statistics.median(models),
        "decode_ms": statistics.median(decodes),
    }, first


def measure_shipped(args: argparse.Namespace, keep: Keep) -> list[str]:
    """Keeps a row for each way; returns the failures."""
    failures: list[str] = []
    wanted: list[np.ndarray] | None = None
    for captured in (False, True):
        row: dict[str, Any] = {"model": "shipped", "way": "captured" if captured else "eager"}
        try:
            pictures = _play(captured, args, row, keep)
        except Exception as error:  # what is known of the row so far is kept
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            failures.append(f"shipped, {row['way']}: {row['failed']}")
            keep(row)
            continue
        wanted = pictures if wanted is None else wanted
        difference = max(float(np.abs(a.astype(int) - b).mean()) for a, b in zip(pictures, wanted, strict=True))
        row["difference_levels"] = difference
        if not difference <= LARGEST_DIFFERENCE:
            failures.append(f"shipped, {row['way']}: pictures differ from eager's by {difference:.2f} levels")
        if captured and args.device.startswith("cuda") and not row["replayed"]:
            failures.append("shipped, captured: nothing was replayed")
        keep(row)
    return failures


def _play(captured: bool, args: argparse.Namespace, row: dict[str, Any], keep: Keep) -> list[np.ndarray]:
    """Fills a row, kept whenever it has grown; returns the first pictures of a world."""
    began = time.perf_counter()
    pipeline = shipped(captured, args)
    row |= {"load_seconds": time.perf_counter() - began, **pipeline.describe()}
    timed, pictures = loop(pipeline, args.frames if captured else min(60, args.frames))
    row |= timed | {"replayed": pipeline.replayed}
    keep(row)

    def play(seconds: float, fps: float, prefix: str) -> None:
        def tell(found: dict[str, Any]) -> None:
            row.update({f"{prefix}{name}": value for name, value in found.items()})
            keep(row)

        tell(asyncio.run(page(pipeline, seconds, fps, tell)))

    play(args.seconds if captured else min(8.0, args.seconds), UNCAPPED_FPS, "")
    if captured:
        row["own_rate"] = own = float(load_world_config(WORLD).train.fps)
        play(min(10.0, args.seconds), own, "own_rate_")
    return pictures


# ---- the report


def _number(row: dict[str, Any], name: str, places: int) -> str:
    return f"{row[name]:.{places}f}" if name in row else "failed" if name == "loop_fps" else ""


def _pair(row: dict[str, Any], prefix: str) -> str:
    names = f"{prefix}key_ms_p50", f"{prefix}key_ms_p95"
    return " / ".join(f"{row[name]:.0f}" for name in names) if names[0] in row else ""


def _memory(row: dict[str, Any]) -> str:
    names = [f"{where}_mib_per_1000_frames" for where in ("rss", "gpu_allocated")]
    return ", ".join(f"{row[name]:+.2f}" for name in names if name in row)


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("way", lambda r: r["way"]),
    ("steps", lambda r: str(r.get("steps", ""))),
    ("frames/s", lambda r: _number(r, "loop_fps", 1)),
    ("in turns", lambda r: _number(r, "turns_fps", 1)),
    ("ms per frame", lambda r: _number(r, "frame_ms", 2)),
    ("model ms", lambda r: _number(r, "model_ms", 2)),
    ("decode ms", lambda r: _number(r, "decode_ms", 2)),
    ("page frames/s", lambda r: _number(r, "page_fps", 1)),
    ("worst second", lambda r: _number(r, "worst_second_fps", 0)),
    ("slowest 1 %", lambda r: _number(r, "slowest_hundredth_fps", 1)),
    ("seconds, frames", lambda r: f"{r['page_seconds']:.0f}, {r['page_frames']}" if "page_seconds" in r else ""),
    ("MiB per 1000 frames, host, GPU", _memory),
    ("key to picture ms p50 / p95", lambda r: _pair(r, "")),
    ("at its own rate", lambda r: _pair(r, "own_rate_")),
    ("difference", lambda r: _number(r, "difference_levels", 2) + _number(r, "difference_relative", 4)),
)


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown."""
    shown = [(title, cell) for title, cell in COLUMNS if any(cell(row) for row in result["rows"])]
    lines = table_lines([title for title, _ in shown], [[cell(row) for _, cell in shown] for row in result["rows"]])
    for row in result["rows"]:
        if row.get("parts"):
            names = [name for name in row["parts"][0] if name != "second"]
            cells = [[f"{part['second']:.0f}", *(f"{part[name]:.1f}" for name in names)] for part in row["parts"]]
            lines += ["", f"{row['model']}, {row['way']}, by time:", "", *table_lines(["until second", *names], cells)]
    return "\n".join(["# Play", "", harness.origin(result), "", *lines]) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    """Writes the JSON and, beside it, the table; each at once, so that a kill leaves a whole file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps(result, indent=1, sort_keys=True) + "\n"
    # The table is of what the file says, whose names are sorted: whoever renders it again gets the same text.
    for path, text in ((out, document), (out.with_suffix(".md"), markdown(json.loads(document)))):
        draft = path.with_name(path.name + ".part")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="sampling steps per frame; the configuration's when left out")
    parser.add_argument("--frames", type=int, default=300, help="frames timed in each loop, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="of play through the page's server")
    parser.add_argument("--upstream", type=Path, default=UPSTREAM, help="YAML of the model with random weights")
    parser.add_argument("--upstream-seconds", type=float, default=240.0, help="for all ways to run it, compiling too")
    parser.add_argument("--no-upstream", action="store_true", help="leave the model with random weights out")
    parser.add_argument("--no-shipped", action="store_true", help="leave the shipped model out")
    parser.add_argument("--out", type=Path, help="JSON file; a table of the same name, .md, is written beside it")
    args = parser.parse_args()
    result = harness.document("play", None, [], failures=[])

    def keep(row: dict[str, Any]) -> None:
        if not any(row is known for known in result["rows"]):
            result["rows"].append(row)
        if args.out is not None:
            write(result, args.out)

    for left_out, measure in ((args.no_shipped, measure_shipped), (args.no_upstream, measure_upstream)):
        if not left_out:
            result["failures"] += measure(args, keep)
    if args.out is not None:
        write(result, args.out)
    harness.show([title for title, _ in COLUMNS], [[cell(row) for _, cell in COLUMNS] for row in result["rows"]])
    harness.finish(result, None)
    for failure in result["failures"]:
        print(f"wrong: {failure}", file=sys.stderr)
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
