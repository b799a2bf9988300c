"""`owl-wms decode`: a file of latents becomes a clip, an array, pictures or a stream on standard output.

Usage:
    owl-wms decode clip.pt --vae-config configs/vae/dec_dist.yml --checkpoint dec.pt --out clip.mp4
    owl-wms decode clip.pt --family taehv --checkpoint taew2_1.pth
    owl-wms decode clip.npy --vae-config C --checkpoint K --out - | ffmpeg -i - -c:v libx265 clip.mkv
"""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from owl_wms.cli import _bounds as bounds
from owl_wms.cli import say
from owl_wms.cli._options import Device, Dtype, TensorRT


def decode(
    latents: Annotated[Path, typer.Argument(help="Latents \\[b,n,c,h,w] or \\[n,c,h,w]: .pt, .npy or .safetensors.")],
    checkpoint: Annotated[Path, typer.Option(help="Weights of the decoder, the full model, or a training checkpoint.")],
    vae_config: Annotated[Path | None, typer.Option(help="YAML of the autoencoder; not needed with --family.")] = None,
    family: Annotated[str | None, typer.Option(help="taehv: the decoder's sizes are read from its checkpoint.")] = None,
    out: Annotated[
        Path, typer.Option(help="NAME.mp4, .npy, .y4m or .raw; a folder for pictures; - for standard output.")
    ] = Path("clip.mp4"),
    form: Annotated[
        str | None, typer.Option("--format", help="png or jpg in a folder; y4m or raw on standard output.")
    ] = None,
    each: Annotated[bool, typer.Option(help="Write every clip of \\[b,n,...] to a file of its own.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace existing outputs.")] = False,
    png: Annotated[Path | None, typer.Option(help="Also write a contact sheet of up to eight frames.")] = None,
    depth: Annotated[bool, typer.Option(help="Also write the depth channel, grey, as OUT_depth.mp4.")] = False,
    scale: Annotated[
        float | None, typer.Option(help="Multiply latents by this first (vae_scale). Default: the file's, else 1.")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of the clip, 1 to 240. Default: the file's, else 60."),
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="libx264 (CPU), h264_nvenc (GPU), or auto: the GPU's, if it has one.")
    ] = "libx264",
    crf: Annotated[int, typer.Option(help="Quality of the clip: 0 is lossless, 51 the worst.")] = 16,
    preset: Annotated[
        str | None, typer.Option(help="Encoder preset. Default: veryfast (libx264), p4 (h264_nvenc).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=bounds.MOST_FRAMES, help="Frames decoded at once.")] = 8,
    device: Device = None,
    dtype: Dtype = None,
    tensorrt: TensorRT = True,
) -> None:
    """Decode latents to a video clip, an array of bytes, pictures, or a pipe.

    Latents are read piece by piece, so a file larger than memory decodes. A .npy array is uint8 \\[n,H,W,C] with every
    channel of the decoder (\\[b,n,H,W,C] for several clips); clips and pictures show the first three.
    """
    from owl_wms.cli import _shared as shared
    from owl_wms.configs import load_vae_model
    from owl_wms.errors import ConfigError
    from owl_wms.files import at_home
    from owl_wms.media import sinks
    from owl_wms.media.latents import LatentFile
    from owl_wms.media.video import choose_encoder
    from owl_wms.runtime import clip_decoder, decode_pieces
    from owl_wms.runtime.steps import frames_of
    from owl_wms.settings import TensorRTConfig
    from owl_wms.timing import Spent
    from owl_wms.utils.owl_vae_bridge import get_decoder_only
    from owl_wms.vae.landscape import other_latent_size
    from owl_wms.vae.on_cpu import channels_last_on_cpu

    # What can be refused is refused before weights are loaded; only --family has its sizes from them.
    latents, console = at_home(latents), Console(stderr=True)
    where = shared.choose_device(device)
    precision = shared.choose_dtype(dtype, where)
    chosen = sinks.form_of(out, form)
    if os.path.isdir(latents):
        remedy = "give one of its files, or decode all of them with owl-wms decode-dataset"
        raise ConfigError(f"{latents}: is a folder, one file of latents is wanted: {remedy}", path=latents)
    bounds.check_number("--scale", scale, bounds.SCALES)
    bounds.check_number("--fps", fps, bounds.FPS)
    bounds.check_number("--crf", crf, (0, 51))
    if chosen == "mp4":
        encoder, preset = choose_encoder(encoder, preset)
    if depth and chosen != "mp4":
        raise ConfigError(f"--depth goes with a clip, .mp4; --out {out} is {chosen}", key="depth")
    shared.check_family(family, vae_config)
    load = partial(get_decoder_only, family, vae_config, checkpoint, device=where, dtype=precision)
    decoder: Any = load() if vae_config is None else None
    model: Any = decoder.config if vae_config is None else load_vae_model(vae_config)
    scale, fps = _scale_and_rate(latents, checkpoint, scale, fps, getattr(model, "frames_per_latent", 1), console)
    channels = getattr(model, "channels", 3)
    if depth and channels < 4:
        raise ConfigError(
            f"--depth: {vae_config or checkpoint} decodes {channels} channels, depth is the fourth", key="depth"
        )
    if channels < 3 and (png is not None or chosen not in ("npy", "raw")):
        shown = "channels" if channels > 1 else "channel"
        text = f"decodes {channels} {shown}, a picture has red, green and blue; --out FILE.npy without --png takes any"
        raise ConfigError(f"{vae_config or checkpoint}: {text}", path=vae_config or checkpoint)
    source = LatentFile(latents, channels=model.latent_channels)
    clips, length, latent_channels, height, width = source.shape
    if png is not None:
        shared.check_destination(png, ".png", ".jpg")
        shared.check_absent(png, overwrite=overwrite)
    written = (out, out.with_stem(out.stem + "_depth")) if depth else (out,)
    for path in written:
        for name in sinks.outputs(path, clips, each):
            shared.check_not_read(name, latents)
            shared.check_output(name, chosen, overwrite=overwrite)
    remark = other_latent_size(model, height, width)
    if remark is not None:
        say(console, f"{latents}: {remark}")

    decoder, spent = channels_last_on_cpu(load() if decoder is None else decoder, where), Spent()
    settings = TensorRTConfig.resolve(enabled=None if tensorrt else False)
    run = clip_decoder(decoder, batch_size=batch_size, settings=settings, check="error")
    # Held by a name, so that an interrupt removes half files before it waits for a decode that has begun.
    pieces = decode_pieces(run, source, scale=scale, spent=spent)
    shape = clips, frames_of(decoder, length)
    count = math.prod(shape)
    sheet = shared.Sheet(count)
    make = partial(sinks.open_sink, shape=shape, fps=fps, form=form, each=each, encoder=encoder, crf=crf)
    made = [make(path, preset=preset, spent=spent) for path in written]
    with ExitStack() as stack:
        colour_sink, *depth_sinks = [stack.enter_context(sink) for sink in made]
        bar = stack.enter_context(shared.progress(console))
        task = bar.add_task("decoding", total=count)
        run.prepare((latent_channels, height, width))  # a build is not part of the rate
        begun = time.perf_counter()
        for frames in pieces:
            colour_sink.write(frames)
            for sink in depth_sinks:
                sink.write(frames[..., 3:4].expand(-1, -1, -1, 3))
            sheet.take(frames)
            bar.advance(task, len(frames))
    seconds = time.perf_counter() - begun
    if png is not None:
        sheet.save(png)
    where_to = "standard output" if out == sinks.STDOUT else out
    say(console, f"{where_to}: {count} frames, {count / seconds:.1f} frames/s")
    for label, text in [("time", shared.time_split(spent, seconds)), *shared.stats_rows(run.stats())]:
        say(console, f"  {label}: {text}")


def _scale_and_rate(
    latents: Path, checkpoint: Path, scale: float | None, fps: float | None, each_latent: int, console: Console
) -> tuple[float, float]:
    """Returns the factor on the latents and the clip's frames per second: as given, else as the file states them.

    Says where the file contradicts what is given, the checkpoint included. A file's rate is that of latents, of which
    each becomes `each_latent` frames.
    """
    from owl_wms.media.facts import Facts
    from owl_wms.media.read_facts import read_facts, weights_digest

    facts = read_facts(latents) if latents.is_file() else Facts()  # what is missing is told by its reader
    digest = weights_digest(checkpoint) if facts.vae_sha256 else None
    for difference in facts.otherwise(vae_scale=scale, fps=fps and fps / each_latent, vae_sha256=digest):
        say(console, f"{latents}: {difference}")
    scale = scale if scale is not None else facts.vae_scale or 1.0
    fps = fps if fps is not None else (facts.fps or 0) * each_latent or 60.0
    bounds.check_number("--scale", scale, bounds.SCALES)
    bounds.check_number("--fps", fps, bounds.FPS)
    return scale, fps
