"""`owl-wms demo`: the repository's own game, encoded, decoded through the bridge, and shown beside itself.

Why: one command that does the main job on real input, with nothing downloaded, and says what did it.

Usage: `owl-wms demo` writes demo/clip.mp4 (source left, decoded right) and demo/sheet.png, and prints a table.
The sheet has the frames of the clip that show most, see `owl_wms/game/views.py`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from owl_wms.cli import say
from owl_wms.cli._bounds import MOST_FRAMES
from owl_wms.cli._options import Device, TensorRT
from owl_wms.configs.paths import DEMO_VAE

if TYPE_CHECKING:
    from torch import Tensor

_HELD_OUT = 1_000_000  # training used seeds from here on


def demo(
    out: Annotated[Path, typer.Option(help="Folder for clip.mp4 and sheet.png.")] = Path("demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=_HELD_OUT - 1, help="Seed of the game's world; none of these was trained on.")
    ] = 7,
    frames: Annotated[int, typer.Option(min=2, help="Frames to show.")] = 32,
    every: Annotated[int, typer.Option(min=1, max=60, help="Show every n-th of the game's 60 frames per second.")] = 4,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=MOST_FRAMES, help="Frames per batch. Default: 8 on a GPU, 2 on a CPU.")
    ] = None,
    device: Device = None,
    tensorrt: TensorRT = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the clip and the sheet of an earlier run.")] = False,
) -> None:
    """Render a game clip, encode it, decode it through the bridge, show both."""
    import torch

    from owl_wms.cli import _shared as shared
    from owl_wms.errors import DataError
    from owl_wms.game.views import best_of_each
    from owl_wms.runtime import decode_stream
    from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
    from owl_wms.vae.on_cpu import channels_last_on_cpu

    config, checkpoint = DEMO_VAE
    if not checkpoint.is_file():
        raise DataError(f"{checkpoint}: the demo's weights are missing; run it from a source checkout", path=checkpoint)
    for name in ("clip.mp4", "sheet.png"):
        shared.check_destination(out / name, ".mp4", ".png")
        shared.check_absent(out / name, overwrite=overwrite)
    console = Console(stderr=True)
    where = shared.choose_device(device)
    dtype = shared.choose_dtype(None, where)
    # On a CPU small batches are faster: the activations of eight frames leave the caches many times over.
    batch_size = batch_size or (2 if where.type == "cpu" else 8)
    encoder = shared.encoder_of(config, checkpoint, where, dtype)
    decoder = channels_last_on_cpu(get_decoder_only(None, config, checkpoint, device=where, dtype=dtype), where)
    run = make_batched_decode_fn(decoder, batch_size, use_tensorrt=tensorrt, timing=True, check="error")

    with torch.inference_mode(), shared.progress(console) as bar:
        task = bar.add_task("rendering", total=frames)
        source, scores = render_clip(seed, frames, every, where, lambda: bar.advance(task))
        task = bar.add_task("encoding", total=frames)
        latents = []
        for part in source.split(batch_size):
            latents.append(encoder(part.to(dtype)))
            bar.advance(task, len(part))
        task = bar.add_task("decoding", total=frames)
        decoded, begun = [], time.perf_counter()
        for part in decode_stream(run, torch.cat(latents)[None], batches=1):
            decoded.append(part.float().clamp(-1, 1))
            bar.advance(task, len(part))
        seconds = time.perf_counter() - begun
    result = torch.cat(decoded).to(source.device)
    _write(out, source, result, best_of_each(scores, min(4, frames)), every)
    Console().print(_table(source, result, seconds, run.stats(), where))
    say(console, f"wrote {out / 'clip.mp4'} (source left, decoded right) and {out / 'sheet.png'}")


def render_clip(seed: int, frames: int, every: int, device: Any, tick: Any) -> tuple[Tensor, Tensor]:
    """Renders scripted play in the world of `seed`; `tick()` is called per frame.

    Returns:
        float32 [frames, 4, 360, 640] in [-1, 1], and how much each of them shows, float32 [frames].
    """
    import torch

    from owl_wms.game.controls import ScriptedPlayer
    from owl_wms.game.render import render
    from owl_wms.game.views import interest
    from owl_wms.game.world import GameWorld

    world = GameWorld(seed, device=device)
    player = ScriptedPlayer(world)
    shown, scores = [], []
    for _ in range(frames):
        for _ in range(every):
            world.step(*player.controls())
        shown.append(render(world))
        scores.append(interest(world))
        tick()
    return torch.cat(shown), torch.cat(scores)


def _write(out: Path, source: Tensor, decoded: Tensor, chosen: list[int], every: int) -> None:
    """Writes the clip, and the sheet of the `chosen` frames."""
    from owl_wms.game.world import FRAMES_PER_SECOND
    from owl_wms.media.pictures import (
        contact_sheet,
        depth_bytes,
        difference_bytes,
        save_picture,
        side_by_side,
        to_bytes,
    )
    from owl_wms.media.video import VideoWriter

    with VideoWriter(out / "clip.mp4", FRAMES_PER_SECOND / every) as clip:
        clip.write(side_by_side({"source": to_bytes(source[:, :3]), "decoded": to_bytes(decoded[:, :3])}))
    a, b = source[chosen], decoded[chosen]
    rows = {
        "source": to_bytes(a[:, :3]),
        "decoded": to_bytes(b[:, :3]),
        "depth, decoded": depth_bytes(b[:, 3]),
        "difference x4": difference_bytes(a[:, :3], b[:, :3]),
    }
    times = [f"{(place + 1) * every / FRAMES_PER_SECOND:.2f} s" for place in chosen]
    save_picture(out / "sheet.png", contact_sheet(rows, times=times, width=400))


def _table(source: Tensor, decoded: Tensor, seconds: float, stats: Any, device: Any) -> Table:
    from owl_wms.cli import _shared as shared
    from owl_wms.media.metrics import depth_error, psnr, ssim

    batches = stats.latency_ms
    table = Table(title="owl-wms demo", show_header=False)
    quality = psnr(decoded[:, :3], source[:, :3])
    rows = [
        ("frames", f"{len(source)} of {source.shape[2]}x{source.shape[3]}, RGB and depth"),
        ("frames/s decoded", f"{len(source) / seconds:.1f}, the first batch and its program included"),
        ("ms per batch", f"{batches['p50']:.1f}, median of {batches['samples']}; worst {batches['p99']:.1f}"),
        ("peak memory", shared.peak_memory(device)),
        ("PSNR", f"{quality.mean():.2f} dB (worst frame {quality.min():.2f})"),
        ("SSIM", f"{ssim(decoded[:, :3], source[:, :3]).mean():.4f}"),
        ("depth error", f"{depth_error(decoded[:, 3], source[:, 3]).mean():.4f} of a range of 2, mean absolute"),
    ]
    for label, text in shared.stats_rows(stats) + rows:
        table.add_row(label, text)
    return table
