"""Frames a second of play, from controls to compressed picture at the client, with TensorRT on and off.

Each row is one pipeline. `loop` calls it as fast as it goes; `page` puts the real server, codec and a WebSocket client
on loopback around it. Shares are of the wall time of a frame in the loop; model and decode times are the device's own
(CUDA events).

Usage:
    python -m benchmarks.play                                                        # random weights, shipped sizes
    python -m benchmarks.play --config examples/world/game_rft.yml --checkpoint examples/world/game_rft.safetensors
    python -m benchmarks.play --decoder dist --decoder base --frames 300 --out build/play.json
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, WSMsgType
from aiohttp.test_utils import TestServer
from rich.table import Table

from benchmarks import decoders, harness
from owl_wms.configs import load_world_config
from owl_wms.inference.build import load_core, make_decode
from owl_wms.inference.context import Context
from owl_wms.inference.messages import unpack_header
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.inference.server import ServerSettings, make_app
from owl_wms.inference.session import Pace
from owl_wms.models import get_model_cls
from owl_wms.utils.owl_vae_bridge import make_batched_decode_fn
from owl_wms.vae import fold_weight_norm

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "examples" / "world" / "game_rft.yml"
CONTEXT_FRAMES = 12
WARM_UP = 10


def make_core(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of the arguments; random weights when no checkpoint is given."""
    if args.checkpoint is not None:
        return load_core(args.config, args.checkpoint, device, dtype)
    config = load_world_config(args.config).model
    torch.manual_seed(0)
    return get_model_cls(config.model_id)(config).core.eval().requires_grad_(False).to(device=device, dtype=dtype)


def decode_fn(name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, tensorrt: bool) -> Any:
    """A named decoder of the benchmarks, or the configuration's own, one frame at a time."""
    world = load_world_config(args.config)
    shape = (world.model.channels, world.model.sample_size, world.model.sample_size)
    if name == "config":
        return make_decode(world, args.config, device, dtype, tensorrt=tensorrt)
    decoder = fold_weight_norm(decoders.subject(name).make()).requires_grad_(False).to(device=device, dtype=dtype)
    decode = make_batched_decode_fn(decoder, 1, use_tensorrt=tensorrt)
    decode.prepare(shape)
    return decode


def loop(pipeline: InteractivePipeline, frames: int) -> dict[str, float]:
    """Medians in milliseconds over `frames` frames, and frames a second."""
    mouse, buttons = torch.tensor([0.2, 0.0]), torch.eye(11)[0]
    for _ in range(WARM_UP):
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
        "decode_share": sum(decodes) / (seconds * 1e3),
    }


async def page(pipeline: InteractivePipeline, seconds: float) -> dict[str, float]:
    """Frames a second and median milliseconds from input to picture at a client that acknowledges at once."""
    settings = ServerSettings(pace=Pace(fps=240))
    server = TestServer(make_app(lambda: pipeline, settings), host="127.0.0.1")
    await server.start_server()
    address = f"http://127.0.0.1:{server.port}"
    count, delays, sizes = 0, [], []
    try:
        async with (
            ClientSession() as client,
            client.ws_connect(f"{address}/{settings.token}/ws", origin=address) as socket,
        ):
            end = time.perf_counter() + seconds
            while (now := time.perf_counter()) < end:
                await socket.send_json({"type": "input", "buttons": ["W"], "mouse": [0.1, 0.0], "sent": now * 1e3})
                message = await socket.receive(timeout=60)
                if message.type != WSMsgType.BINARY:
                    continue
                header = unpack_header(message.data)
                await socket.send_json({"type": "ack", "index": int(header["index"])})
                count += 1
                sizes.append(len(message.data))
                if header["sent"]:
                    delays.append(time.perf_counter() * 1e3 - header["sent"])
    finally:
        await server.close()
    return {
        "page_fps": count / seconds,
        "page_latency_ms": statistics.median(delays) if delays else float("nan"),
        "page_bytes": statistics.median(sizes) if sizes else 0,
    }


def measure(name: str, tensorrt: bool, args: argparse.Namespace, core: Any, device: torch.device) -> dict[str, Any]:
    """One row."""
    dtype = next(core.parameters()).dtype
    decode = decode_fn(name, args, device, dtype, tensorrt)
    config, train = core.config, load_world_config(args.config).train
    given = dict(train.sampler_kwargs or {})
    side = config.sample_size
    context = Context(
        latents=torch.randn(1, CONTEXT_FRAMES, config.channels, side, side, generator=torch.Generator().manual_seed(0)),
        mouse=torch.zeros(1, CONTEXT_FRAMES, 2),
        buttons=torch.zeros(1, CONTEXT_FRAMES, config.n_buttons),
    )
    pipeline = InteractivePipeline(
        core,
        decode,
        [context],
        image_scale=train.vae_scale,
        steps=args.steps or given.get("n_steps", 4),
        max_window=given.get("max_window"),
    )
    steps = pipeline.steps
    result: dict[str, Any] = {"decoder": name, "tensorrt": tensorrt, "steps": steps, **loop(pipeline, args.frames)}
    result |= asyncio.run(page(pipeline, args.seconds))
    stats = decode.stats()
    return result | {"backend": stats.backend, "reason": stats.reason}


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("decoder", lambda r: r["decoder"]),
    ("TensorRT", lambda r: "on" if r["tensorrt"] else "off"),
    ("ran by", lambda r: r["backend"]),
    ("steps", lambda r: str(r["steps"])),
    ("loop fps", lambda r: f"{r['loop_fps']:.1f}"),
    ("frame ms", lambda r: f"{r['frame_ms']:.2f}"),
    ("model ms", lambda r: f"{r['model_ms']:.2f}"),
    ("decode ms", lambda r: f"{r['decode_ms']:.2f}"),
    ("decode share", lambda r: f"{r['decode_share']:.0%}"),
    ("page fps", lambda r: f"{r['page_fps']:.1f}"),
    ("page latency ms", lambda r: f"{r['page_latency_ms']:.1f}"),
)


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(*[title for title, _ in COLUMNS])
    for row in rows:
        table.add_row(*[cell(row) for _, cell in COLUMNS])
    harness.console.print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML of the world model")
    parser.add_argument("--checkpoint", type=Path, help="its weights; random when left out")
    parser.add_argument(
        "--decoder",
        action="append",
        choices=["config", *decoders.SUBJECTS],
        help="may be repeated; 'config' is the YAML's own (default: config)",
    )
    parser.add_argument("--steps", type=int, help="sampling steps a frame; the YAML's when left out")
    parser.add_argument("--frames", type=int, default=120, help="frames timed in the loop")
    parser.add_argument("--seconds", type=float, default=3.0, help="of play through the page's server")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tensorrt", choices=["both", "on", "off"], default="both")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    core = make_core(args, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    modes = {"both": (False, True), "on": (True,), "off": (False,)}[args.tensorrt]
    rows = [measure(name, mode, args, core, device) for name in args.decoder or ["config"] for mode in modes]
    show(rows)
    parameters = sum(p.numel() for p in core.parameters())
    harness.finish(
        harness.document("play", None, rows, parameters=parameters, random_weights=args.checkpoint is None), args.out
    )


if __name__ == "__main__":
    main()
