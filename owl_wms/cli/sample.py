"""`owl-wms sample`: a clip from a world model, without a page.

Usage:
    owl-wms sample examples/world/game_rft.yml examples/world/game_rft.safetensors --frames 100 --out clip.mp4
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from owl_wms.cli import _bounds as bounds
from owl_wms.cli import say
from owl_wms.cli._options import CfgScale, Context, Device, Dtype, TensorRT


def sample(
    config: Annotated[Path, typer.Argument(help="YAML of the world model.")],
    checkpoint: Annotated[Path, typer.Argument(help="Weights of the world model.")],
    out: Annotated[Path, typer.Option(help="The clip to write, .mp4.")] = Path("sample.mp4"),
    frames: Annotated[int, typer.Option(min=1, max=1_000_000, help="Frames to generate.")] = 60,
    context: Context = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler id; the configuration's if left out.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps per frame.")] = None,
    cfg_scale: CfgScale = None,
    seed: Annotated[int, typer.Option(help="Random seed of noise, beginning and controls.")] = 0,
    latents: Annotated[Path | None, typer.Option(help="Also write latents, mouse and buttons, .safetensors.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    tensorrt: TensorRT = True,
    overwrite: Annotated[bool, typer.Option(help="Replace existing outputs.")] = False,
) -> None:
    """Sample a clip from a world model, its context included, under recorded controls or the scripted player's."""
    import torch

    from owl_wms.cli import _shared as shared
    from owl_wms.game.controls import scripted_controls
    from owl_wms.inference.build import latent_space, load_core, make_contexts, make_decode
    from owl_wms.inference.configured import load_video_config
    from owl_wms.inference.context import fit_buttons
    from owl_wms.media.arrays import save_array
    from owl_wms.media.facts import Facts
    from owl_wms.media.video import VideoWriter
    from owl_wms.runtime import decode_pieces
    from owl_wms.runtime.steps import frames_of, frames_per_latent

    console = Console(stderr=True)
    shared.check_destination(out, ".mp4")
    shared.check_absent(out, overwrite=overwrite)
    if latents is not None:
        shared.check_destination(latents, ".safetensors")
        shared.check_not_read(latents, context, checkpoint)
        shared.check_absent(latents, overwrite=overwrite)
    bounds.check_number("--cfg-scale", cfg_scale, bounds.GUIDANCE)
    bounds.check_number("--seed", seed, bounds.SEEDS)
    where = shared.choose_device(device)
    precision = shared.choose_dtype(dtype, where)
    world = load_video_config(config)
    run = _make_sampler(world.train, sampler, frames, steps, cfg_scale)
    core = load_core(config, checkpoint, where, precision)
    decode = make_decode(world, config, where, precision, tensorrt=tensorrt, batch_size=8, check="error")
    begin = make_contexts(world, config, where, precision, path=context, seed=seed)[0].to(where, precision)

    after = begin.controls_after(frames)
    if after is None:
        mouse, buttons = scripted_controls(seed=seed, n=frames)
        after = mouse[None].to(begin.mouse), fit_buttons(buttons[None].to(begin.buttons), world.model.n_buttons)
    controls = torch.cat([begin.mouse, after[0]], 1), torch.cat([begin.buttons, after[1]], 1)
    generator = torch.Generator(where).manual_seed(seed)
    with shared.progress(console) as bar:
        task = bar.add_task("sampling", total=frames)
        result = run(
            core,
            begin.latents,
            *controls,
            generator=generator,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        stored = latent_space(world, config).to(where).to_stored(result.latents)
        task = bar.add_task("decoding", total=frames_of(decode.decoder, stored.shape[1]))
        with VideoWriter(out, world.train.fps * frames_per_latent(decode.decoder)) as clip:
            for pictures in decode_pieces(decode, stored):
                clip.write(pictures)
                bar.advance(task, len(pictures))
    if latents is not None:
        tensors = {"latents": stored, "mouse": result.mouse, "buttons": result.buttons}
        facts = Facts(fps=world.train.fps, vae_scale=1.0, layout="b n c h w")  # they are what the decoder takes
        save_array(latents, {name: tensor.float() for name, tensor in tensors.items()}, facts=facts)
    say(console, f"{out}: {begin.latents.shape[1]} frames of context and {frames} sampled")


def _make_sampler(train: Any, sampler: str | None, frames: int, steps: int | None, cfg_scale: float | None) -> Any:
    """Returns the sampler as (core, latents, mouse, buttons, **options) -> SampleResult."""
    from owl_wms.sampling import continue_video, get_sampler_cls

    chosen = sampler or train.sampler_id or "av_caching"
    kind = get_sampler_cls(chosen)
    # Another sampler than the configuration's does not understand its arguments.
    options = dict(train.sampler_kwargs or {}) if chosen == train.sampler_id else {}
    options |= {"num_frames": frames, "only_return_generated": False}
    if steps is not None:
        options |= {"n_steps": steps, **({"custom_schedule": None} if "custom_schedule" in options else {})}
    if cfg_scale is not None:
        options["cfg_scale"] = cfg_scale
    return partial(continue_video, kind(**options))
