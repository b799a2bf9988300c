"""`owl-wms encode`: a clip, a folder of pictures or an array of frames becomes latents.

Usage:
    owl-wms encode clip.mp4 --vae-config C --checkpoint K --out latents.pt [--depth clip_depth.mp4]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from owl_wms.cli import _bounds as bounds
from owl_wms.cli import say
from owl_wms.cli._options import Device, Dtype

if TYPE_CHECKING:
    from torch import Tensor


def encode(
    frames: Annotated[Path, typer.Argument(help="Video, folder of pictures, or an array file of frames \\[n,C,H,W].")],
    vae_config: Annotated[Path, typer.Option(help="YAML of the autoencoder.")],
    checkpoint: Annotated[Path, typer.Option(help="Weights of the autoencoder, encoder included.")],
    out: Annotated[Path, typer.Option(help="Latents to write: .pt, .npy or .safetensors.")] = Path("latents.pt"),
    depth: Annotated[Path | None, typer.Option(help="Grey clip or folder with the depth channel.")] = None,
    resize: Annotated[bool, typer.Option(help="Scale frames of another size instead of refusing them.")] = False,
    scale: Annotated[float, typer.Option(help="Divide latents by this (upstream's vae_scale).")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, max=bounds.MOST_FRAMES, help="Frames encoded at once.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace existing latents.")] = False,
) -> None:
    """Encode a clip or frames to latents \\[n, c, h, w], float32."""
    import torch

    from owl_wms.cli import _shared as shared
    from owl_wms.configs import pictures_of
    from owl_wms.media.arrays import ARRAY_SUFFIXES, check_encoded, save_array
    from owl_wms.media.facts import Facts
    from owl_wms.media.frames import frame_batches
    from owl_wms.media.read_facts import weights_digest
    from owl_wms.media.watch import VIDEO_SUFFIXES, rate_of
    from owl_wms.runtime.ahead import ahead
    from owl_wms.timing import Spent

    console = Console(stderr=True)
    where = shared.choose_device(device)
    precision = shared.choose_dtype(dtype, where)
    shared.check_destination(out, *ARRAY_SUFFIXES)
    shared.check_not_read(out, frames, depth, checkpoint)
    shared.check_absent(out, overwrite=overwrite)
    bounds.check_number("--scale", scale, bounds.SCALES)
    channels, size = pictures_of(vae_config)
    pieces, spent, begun = [], Spent(), time.perf_counter()
    # The first frames come before the weights: frames that cannot be used are refused at once.
    batches = frame_batches(frames, channels=channels, size=size, batch_size=batch_size, depth=depth, resize=resize)
    with spent.on("read"):
        first = next(batches, None)
    encoder = shared.encoder_of(vae_config, checkpoint, where, precision)

    def read() -> Iterator[Tensor]:
        batch = first
        while batch is not None:
            yield batch
            with spent.on("read"):
                batch = next(batches, None)

    # Pictures are read in another thread while the encoder works.
    with torch.inference_mode(), shared.progress(console) as bar, closing(ahead(read(), depth=2, name="read")) as ready:
        task, done = bar.add_task("encoding", total=None), 0
        for batch in ready:
            with spent.on("encode"):
                pieces.append(encoder(batch.to(where, precision)).float().cpu() / scale)
            check_encoded(pieces[-1], frames, done, precision)
            done += len(batch)
            bar.advance(task, len(batch))
    with spent.on("write"):
        latents = torch.cat(pieces)
        fps = rate_of(frames) if frames.suffix.lower() in VIDEO_SUFFIXES else None
        digest = weights_digest(checkpoint)
        facts = Facts(fps=fps, vae_scale=scale, vae=checkpoint.name, vae_sha256=digest, layout="n c h w")
        save_array(out, latents, facts=facts)
    say(console, f"{out}: {list(latents.shape)}, mean {latents.mean():.3f}, standard deviation {latents.std():.3f}")
    if (remark := bounds.unstated_scale(out.suffix.lower().removeprefix("."), scale)) is not None:
        say(console, f"{out}: {remark}")
    say(console, f"  time: {shared.time_split(spent, time.perf_counter() - begun)}")
