"""`owl-wms decode`: a file of latents becomes a clip.

Usage:
    owl-wms decode clip.pt --vae-config configs/vae/dec_dist.yml --checkpoint dec.pt --out clip.mp4
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def decode(
    latents: Annotated[Path, typer.Argument(help="Latents \\[b,n,c,h,w] or \\[n,c,h,w]: .pt, .npy or .safetensors.")],
    vae_config: Annotated[Path, typer.Option(help="YAML of the autoencoder.")],
    checkpoint: Annotated[Path, typer.Option(help="Its weights: decoder, full model or training checkpoint.")],
    out: Annotated[Path, typer.Option(help="The clip to write, .mp4.")] = Path("clip.mp4"),
    png: Annotated[Path | None, typer.Option(help="Also write a contact sheet of up to eight frames.")] = None,
    depth: Annotated[bool, typer.Option(help="Also write the depth channel, grey, as OUT_depth.mp4.")] = False,
    scale: Annotated[float, typer.Option(help="Multiply latents by this first (upstream's vae_scale).")] = 1.0,
    fps: Annotated[float, typer.Option(help="Frames a second of the clip, 1 to 240.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Frames decoded at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16 on a GPU, else fp32.")] = None,
    tensorrt: Annotated[bool, typer.Option(help="Use the compiled decoder where one can be had.")] = True,
) -> None:
    """Decode latents to a video clip."""
    import torch

    from owl_wms.cli import _shared as shared
    from owl_wms.configs import load_vae_model
    from owl_wms.errors import ConfigError
    from owl_wms.media.arrays import load_latents
    from owl_wms.media.pictures import contact_sheet, depth_bytes, save_picture, to_bytes
    from owl_wms.media.video import VideoWriter
    from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
    from owl_wms.vae.landscape import other_latent_size

    console = Console(stderr=True)
    where = shared.choose_device(device)
    precision = shared.choose_dtype(dtype, where)
    depth_out = out.with_stem(out.stem + "_depth")
    shared.check_destination(out, ".mp4")
    if depth:
        shared.check_destination(depth_out, ".mp4")
    if png is not None:
        shared.check_destination(png, ".png", ".jpg")
    shared.check_number("--scale", scale, shared.SCALES)
    shared.check_number("--fps", fps, shared.FPS)
    model = load_vae_model(vae_config)
    if depth and getattr(model, "channels", 3) < 4:
        raise ConfigError(f"--depth: {vae_config} decodes {model.channels} channels, depth is the fourth", key="depth")
    values = load_latents(latents, channels=model.latent_channels) * scale
    remark = other_latent_size(model, values.shape[3], values.shape[4])
    if remark is not None:
        console.print(f"{latents}: {remark}", markup=False, highlight=False, soft_wrap=True)
    decoder = get_decoder_only(None, vae_config, checkpoint, device=where, dtype=precision)
    run = make_batched_decode_fn(shared.quick_on(where, decoder), batch_size, use_tensorrt=tensorrt)

    count = values.shape[0] * values.shape[1]
    shown = {round(i * (count - 1) / max(1, min(8, count) - 1)) for i in range(min(8, count))}
    kept, seconds, done = [], 0.0, 0
    with ExitStack() as stack:
        clip = stack.enter_context(VideoWriter(out, fps))
        depth_clip = stack.enter_context(VideoWriter(depth_out, fps)) if depth else None
        bar = stack.enter_context(shared.progress(console))
        task = bar.add_task("decoding", total=count)
        for frames, took in shared.decode_pieces(run, values, 4 * batch_size):
            seconds += took
            clip.write(to_bytes(frames[:, :3]))
            if depth_clip is not None:
                depth_clip.write(to_bytes(frames[:, 3:4].expand(-1, 3, -1, -1)))
            kept += [frames[i].float().cpu() for i in range(len(frames)) if png is not None and done + i in shown]
            done += len(frames)
            bar.advance(task, len(frames))
    if png is not None:
        pictures = torch.stack(kept)
        rows = {"decoded": to_bytes(pictures[:, :3])}
        if pictures.shape[1] > 3:
            rows["depth"] = depth_bytes(pictures[:, 3])
        save_picture(png, contact_sheet(rows, times=[f"frame {i}" for i in sorted(shown)]))
    console.print(f"{out}: {count} frames, {count / seconds:.1f} frames/s decoded", highlight=False, soft_wrap=True)
    for label, text in shared.stats_rows(run.stats()):
        console.print(f"  {label}: {text}", markup=False, highlight=False, soft_wrap=True)
