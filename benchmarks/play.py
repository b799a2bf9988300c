"""Measures play: frames per second and milliseconds from key to picture, and upstream's model size against PyTorch.

Shipped model: the whole pipeline, called as fast as it goes (`loop`), then behind the real server and codec with a
client on loopback that presses keys at recorded times (`page`). A key's time ends when the first picture that has seen
it has arrived. `eager` launches every kernel from Python; `captured` replays CUDA graphs, which is the default.

Upstream's size (configs/dit_v4.yml, random weights): latents alone, without a decoder. `eager` is a cache that grows
and moves, as before the ring. `torch.compile` compiles the model and has our ring: with the growing cache it would be
compiled again for each length, reach its limit of 8, and run eagerly from then on. Ours is the ring, captured, and
compiled and captured.

A row whose frames differ from eager's by more than rounding fails the run.

Usage:
    python -m benchmarks.play --out build/play.json            # about 4 minutes on an H200; writes build/play.md too
    python -m benchmarks.play --seconds 300 --no-upstream      # five minutes of steady play
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestServer
from rich.table import Table
from torch import Tensor

from benchmarks import harness
from owl_wms.configs import load_world_config
from owl_wms.inference.build import build_pipeline
from owl_wms.inference.messages import unpack_header
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.inference.server import ServerSettings, make_app
from owl_wms.inference.session import Pace
from owl_wms.models import get_model_cls
from owl_wms.nn.kv_cache import KVCache
from owl_wms.nn.setting import latent_grid
from owl_wms.sampling import Guidance, get_sd3_euler, zlerp
from owl_wms.sampling import frames as frames_module
from owl_wms.sampling.captured import may_capture
from owl_wms.sampling.frames import FrameLoop

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "examples" / "world" / "game_rft.yml"
UPSTREAM = ROOT / "configs" / "dit_v4.yml"
UPSTREAM_WINDOW = 64
UNCAPPED_FPS = 240.0
COMPARED_FRAMES = 4
# bf16 pictures of two ways to compute the same: mean difference in levels of 255.
LARGEST_DIFFERENCE = 2.0
LARGEST_RELATIVE = 0.1
Keep = Callable[[dict[str, Any]], None]


# ---- the shipped model


def shipped(captured: bool, args: argparse.Namespace) -> InteractivePipeline:
    """Returns the pipeline of `owl-wms play`, or the same without CUDA graphs and without compiled programs."""
    if not captured:
        frames_module.may_capture = lambda model: False
    try:
        device = torch.device(args.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weights = WORLD.with_suffix(".safetensors")
        return build_pipeline(WORLD, weights, device=device, dtype=dtype, tensorrt=captured, steps=args.steps)
    finally:
        frames_module.may_capture = may_capture


def loop(pipeline: InteractivePipeline, frames: int) -> tuple[dict[str, float], list[np.ndarray]]:
    """Returns medians in milliseconds over `frames` frames, frames per second, and the first pictures of a world."""
    mouse, buttons = torch.tensor([0.2, 0.0]), torch.eye(len(pipeline.controls))[0]
    pipeline.restart()
    first = [pipeline(mouse, buttons).image for _ in range(COMPARED_FRAMES)]
    for _ in range(40):
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


def key_times(seconds: float) -> list[float]:
    """Returns the recorded client's keys: a press or release every 30 to 120 ms, the same in every run."""
    drawn, at, times = random.Random(7), 0.5, []
    while at < seconds:
        times.append(at)
        at += drawn.uniform(0.03, 0.12)
    return times


async def page(pipeline: InteractivePipeline, seconds: float, fps: float) -> dict[str, float]:
    """Returns frames per second (mean, and the worst second), and key to picture in milliseconds, p50 and p95."""
    pipeline.restart()
    settings = ServerSettings(pace=Pace(fps=fps))
    server = TestServer(make_app(lambda: pipeline, settings), host="127.0.0.1")
    await server.start_server()
    address = f"http://127.0.0.1:{server.port}"
    arrived: list[float] = []
    sizes: list[int] = []
    delays: list[float] = []
    waiting: list[float] = []
    try:
        async with (
            ClientSession() as client,
            client.ws_connect(f"{address}/{settings.token}/ws", origin=address) as socket,
        ):
            began = time.perf_counter()

            async def press() -> None:
                for number, at in enumerate(key_times(seconds)):
                    await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
                    now = time.perf_counter() * 1e3
                    waiting.append(now)
                    held = [pipeline.controls[0].name] if number % 2 else []
                    await socket.send_json({"type": "input", "buttons": held, "mouse": [0.02, 0.0], "sent": now})

            keys = asyncio.create_task(press())
            while time.perf_counter() - began < seconds:
                message = await socket.receive(timeout=120)
                if message.type != WSMsgType.BINARY:
                    continue
                now = time.perf_counter()
                header = unpack_header(message.data)
                await socket.send_json({"type": "ack", "index": int(header["index"])})
                arrived.append(now - began)
                sizes.append(len(message.data))
                while waiting and waiting[0] <= header["sent"]:
                    delays.append(now * 1e3 - waiting.pop(0))
            await keys
    finally:
        await server.close()
    whole = [sum(second <= at < second + 1 for at in arrived) for second in range(1, int(seconds))]
    ranks = statistics.quantiles(delays, n=20) if len(delays) > 1 else [float("nan")] * 19
    return {
        "page_fps": len(arrived) / seconds,
        "worst_second_fps": min(whole, default=0),
        "key_ms_p50": ranks[9],
        "key_ms_p95": ranks[18],
        "frame_bytes": statistics.median(sizes) if sizes else 0,
    }


def measure_shipped(args: argparse.Namespace, keep: Keep) -> list[str]:
    """Keeps a row for each way; returns the failures."""
    failures, wanted = [], None
    for captured in (False, True):
        began = time.perf_counter()
        pipeline = shipped(captured, args)
        loaded = time.perf_counter() - began
        row: dict[str, Any] = {"model": "shipped", "way": "captured" if captured else "eager", "steps": pipeline.steps}
        timed, pictures = loop(pipeline, args.frames if captured else min(60, args.frames))
        row |= timed | {"load_seconds": loaded, "replayed": pipeline.replayed}
        if wanted is None:
            wanted = pictures
        difference = max(float(np.abs(a.astype(int) - b).mean()) for a, b in zip(pictures, wanted, strict=True))
        row["difference_levels"] = difference
        if not difference <= LARGEST_DIFFERENCE:
            failures.append(f"shipped, {row['way']}: pictures differ from eager's by {difference:.2f} levels")
        if captured and args.device.startswith("cuda") and not pipeline.replayed:
            failures.append("shipped, captured: nothing was replayed")
        row |= asyncio.run(page(pipeline, args.seconds if captured else min(8.0, args.seconds), UNCAPPED_FPS))
        if captured:
            own = float(load_world_config(WORLD).train.fps)
            at_rate = asyncio.run(page(pipeline, min(10.0, args.seconds), own))
            row |= {f"own_rate_{name}": value for name, value in at_rate.items()} | {"own_rate": own}
        row |= pipeline.describe()
        keep(row)
    return failures


# ---- upstream's size


class GrowingLoop:
    """Makes frames with `KVCache`: new shapes for every frame while it fills, moved to the front when it is full."""

    def __init__(self, guidance: Guidance, config: Any, deltas: Tensor, noise: float) -> None:
        self._guidance, self._deltas, self._noise = guidance, deltas, noise
        self._cache = KVCache(config, max_window=UPSTREAM_WINDOW)

    def begin(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> None:
        """Stores a context."""
        noisy = zlerp(x, self._noise, generator)
        for frame in range(x.shape[1]):
            span = slice(frame, frame + 1)
            self._pass(noisy[:, span], self._noise, mouse[:, span], btn[:, span])

    def _pass(self, x: Tensor, level: float, mouse: Tensor, btn: Tensor) -> None:
        self._cache.enable_cache_updates()
        t = torch.full(x.shape[:2], level, dtype=torch.float32, device=x.device)
        self._guidance.velocity((x,), t, mouse, btn, self._cache)
        self._cache.disable_cache_updates()

    def denoise(self, mouse: Tensor, btn: Tensor, like: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the next frame."""
        frame = torch.randn(like.shape, device=like.device, dtype=like.dtype, generator=generator)
        t = torch.ones(frame.shape[:2], dtype=torch.float32, device=frame.device)
        for delta in self._deltas.tolist():
            (velocity,) = self._guidance.velocity((frame,), t, mouse, btn, self._cache)
            frame, t = frame - delta * velocity, t - delta
        return frame

    def remember(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> None:
        """Stores a frame."""
        self._pass(zlerp(x, self._noise, generator), self._noise, mouse, btn)


def measure_upstream(args: argparse.Namespace, keep: Keep) -> list[str]:
    """Keeps a row for each way to run a model of upstream's published size; returns the failures."""
    world = load_world_config(args.upstream)
    config, given = world.model, dict(world.train.sampler_kwargs or {})
    device = torch.device(args.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    core = get_model_cls(config.model_id)(config).core.eval().requires_grad_(False).to(device=device, dtype=dtype)
    steps = given.get("n_steps", 4) if args.steps is None else args.steps
    deltas, noise, scale = get_sd3_euler(steps), given.get("noise_prev", 0.2), given.get("cfg_scale", 1.0)
    plain, compiled = Guidance(model=core, scale=scale), Guidance(model=torch.compile(core), scale=scale)
    x = torch.randn(1, UPSTREAM_WINDOW, config.channels, *latent_grid(config), device=device, dtype=dtype)
    mouse = torch.zeros(1, UPSTREAM_WINDOW, 2, device=device, dtype=dtype)
    btn = torch.zeros(1, UPSTREAM_WINDOW, config.n_buttons, device=device, dtype=dtype)

    def ring(guidance: Guidance, capture: bool) -> FrameLoop:
        return FrameLoop(
            guidance,
            deltas=deltas,
            noise_prev=noise,
            max_window=UPSTREAM_WINDOW,
            capture=capture,
            fixed=True,
            prefill=plain,
        )

    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: GrowingLoop(plain, config, deltas, noise),
        "torch.compile": lambda: ring(compiled, False),
        "ring, captured": lambda: ring(plain, True),
        "ring, compiled and captured": lambda: ring(compiled, True),
    }
    failures, wanted = [], None
    for name, make in ways.items():
        began = time.perf_counter()
        row = {"model": args.upstream.name, "way": name, "steps": steps}
        with torch.no_grad():
            try:
                row |= _time_latents(make(), x, mouse, btn, args.frames)
            except Exception as error:  # a rival that does not run on this machine is a row without numbers
                if name.startswith("ring") or name == "eager":
                    failures.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                keep(row)
                continue
        first = row.pop("first")
        wanted = first if wanted is None else wanted
        row["difference_relative"] = float((first - wanted).norm() / wanted.norm())
        if not row["difference_relative"] <= LARGEST_RELATIVE:
            failures.append(f"{name}: its first frame differs from eager's by {row['difference_relative']:.3f}")
        row["prepare_seconds"] = time.perf_counter() - began - row["timed_seconds"]
        keep(row)
        torch.cuda.empty_cache() if device.type == "cuda" else None
    return failures


def _time_latents(made: Any, x: Tensor, mouse: Tensor, btn: Tensor, frames: int) -> dict[str, Any]:
    generator = torch.Generator(x.device).manual_seed(1)
    made.begin(x, mouse, btn, generator)
    controls = mouse[:, :1], btn[:, :1]
    extra = (x[:, :1],) if isinstance(made, GrowingLoop) else ()

    def one() -> Tensor:
        latent: Tensor = made.denoise(*controls, *extra, generator)
        made.remember(latent, *controls, generator)
        return latent

    first = one().float()
    for _ in range(UPSTREAM_WINDOW // 4):  # compiling, capturing, and every shape that moving to the front needs
        one()
    walls = []
    while len(walls) < frames and sum(walls) < 8:
        began = time.perf_counter()
        one()
        _wait(x.device)
        walls.append(time.perf_counter() - began)
    return {
        "first": first,
        "loop_fps": len(walls) / sum(walls),
        "frame_ms": statistics.median(walls) * 1e3,
        "timed_seconds": sum(walls),
        "replayed": getattr(made, "replayed", 0),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the report

COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda r: r["model"]),
    ("way", lambda r: r["way"]),
    ("steps", lambda r: str(r["steps"])),
    ("frames/s", lambda r: _number(r, "loop_fps", 1)),
    ("ms per frame", lambda r: _number(r, "frame_ms", 2)),
    ("model ms", lambda r: _number(r, "model_ms", 2)),
    ("decode ms", lambda r: _number(r, "decode_ms", 2)),
    ("page frames/s", lambda r: _number(r, "page_fps", 1)),
    ("worst second", lambda r: _number(r, "worst_second_fps", 0)),
    ("key to picture ms p50 / p95", lambda r: _pair(r, "")),
    ("at its own rate", lambda r: _pair(r, "own_rate_")),
    ("difference", lambda r: _number(r, "difference_levels", 2) + _number(r, "difference_relative", 4)),
)


def _number(row: dict[str, Any], name: str, places: int) -> str:
    return f"{row[name]:.{places}f}" if name in row else "failed" if name == "loop_fps" else ""


def _pair(row: dict[str, Any], prefix: str) -> str:
    names = f"{prefix}key_ms_p50", f"{prefix}key_ms_p95"
    return " / ".join(f"{row[name]:.0f}" for name in names) if names[0] in row else ""


def markdown(result: dict[str, Any]) -> str:
    """Returns the document as Markdown."""
    lines = [[title for title, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[cell(row) for _, cell in COLUMNS] for row in result["rows"]]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"# Play\n\n{harness.origin(result)}\n\n{table}"


def show(result: dict[str, Any], out: Path | None) -> None:
    """Prints the table, and writes it beside the JSON as Markdown."""
    table = Table(*[title for title, _ in COLUMNS])
    for row in result["rows"]:
        table.add_row(*[cell(row) for _, cell in COLUMNS])
    harness.console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="sampling steps per frame; the configuration's when left out")
    parser.add_argument("--frames", type=int, default=300, help="frames timed in each loop")
    parser.add_argument("--seconds", type=float, default=20.0, help="of play through the page's server")
    parser.add_argument("--upstream", type=Path, default=UPSTREAM, help="YAML of the model with random weights")
    parser.add_argument("--no-upstream", action="store_true", help="leave the model with random weights out")
    parser.add_argument("--no-shipped", action="store_true", help="leave the shipped model out")
    parser.add_argument("--out", type=Path, help="JSON file; a table of the same name, .md, is written beside it")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []

    def keep(row: dict[str, Any]) -> None:
        """Writes what there is, so that a time limit costs the rows that are missing and no others."""
        rows.append(row)
        if args.out is not None:
            harness.write(harness.document("play", None, rows, failures=failures), args.out)

    for left_out, measure in ((args.no_shipped, measure_shipped), (args.no_upstream, measure_upstream)):
        if not left_out:
            failures += measure(args, keep)
    result = harness.document("play", None, rows, failures=failures)
    show(result, args.out)
    harness.finish(result, args.out)
    for failure in failures:
        print(f"wrong: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
