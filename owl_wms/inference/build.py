"""Puts model, decoder and beginnings together as a configuration says, so that they can be played.

Usage:
    pipeline = build_pipeline("examples/world/game_rft.yml", "examples/world/game_rft.safetensors", device="cuda")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.configs import WorldConfig, pictures_of
from owl_wms.configs.world import with_files_found
from owl_wms.errors import ConfigError
from owl_wms.game.world import FRAMES_PER_SECOND
from owl_wms.inference.configured import load_video_config, named_file, played_sampler, streaming_config
from owl_wms.inference.context import CONTEXT_FRAMES, Context, load_contexts, render_context
from owl_wms.inference.controls import controls_for
from owl_wms.inference.loading import Progress
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.inference.source import GameSource
from owl_wms.media.arrays import check_encoded
from owl_wms.models.latents import LatentSpace
from owl_wms.models.load import load_model
from owl_wms.nn.setting import latent_grid
from owl_wms.runtime import ClipDecode, clip_decoder
from owl_wms.settings import TensorRTConfig
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from owl_wms.vae import fold_weight_norm, load_encoder
from owl_wms.vae.on_cpu import quick_on_cpu

# Pixels per latent of the autoencoder of `HUB_VAE_ID`, f64, whose frames are square.
HUB_SCALE = 64


def load_core(cfg_path: Path | str, ckpt_path: Path | str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Returns the core of a model, frozen, in eval mode."""
    return load_model(cfg_path, ckpt_path).core.eval().requires_grad_(False).to(device=device, dtype=dtype)


def make_decode(
    config: WorldConfig,
    cfg_path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tensorrt: bool = True,
    batch_size: int = 1,
    check: str = "auto",
) -> ClipDecode:
    """Returns the configuration's decoder as a function to bytes; its program is found or built here.

    `batch_size` and `check` are as in `owl_wms.runtime.clip_decoder`; play decodes one latent at a time.
    """
    train, model = config.train, config.model
    cfg, ckpt = named_file(train, "vae_cfg_path", cfg_path), named_file(train, "vae_ckpt_path", cfg_path)
    decoder = _quick(get_decoder_only(train.vae_id, cfg, ckpt, device=device, dtype=dtype), device)
    settings = TensorRTConfig.resolve(train, enabled=None if tensorrt and train.use_tensorrt else False)
    decode = clip_decoder(decoder, batch_size=batch_size, settings=settings, check=check)
    channels = latent_space(config, cfg_path).stored_channels(model.channels)
    decode.prepare((channels, *latent_grid(model)))
    return decode


def make_encode(
    config: WorldConfig, cfg_path: Path | str, device: torch.device | str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Returns the encoder that belongs to the configuration's decoder: [k, 4, *frame_size] to [k, c, h, w] fp32.

    Raises:
        ConfigError: it takes more channels than the game has, or belongs to a TAEHV, whose encoder is not built here.
        CheckpointError: the file has no encoder; give a context file instead.
    """
    train = config.train
    if streaming_config(config, cfg_path) is not None:
        text = "no beginning can be rendered, for the encoder of a TAEHV is not built here; give a file with --context"
        raise ConfigError(f"{cfg_path}: {text}", path=cfg_path, key="train.vae_id")
    vae_path = named_file(train, "vae_cfg_path", cfg_path)
    channels = 3 if vae_path is None else pictures_of(vae_path)[0]
    if channels > 4:
        raise ConfigError(
            f"{vae_path}: encodes {channels} channels, the game has 4; give a context file", path=vae_path
        )
    encoder = _encoder(train.vae_id, vae_path, named_file(train, "vae_ckpt_path", cfg_path), device, dtype)

    def encode(frames: Tensor) -> Tensor:
        latents: Tensor = encoder(frames[:, :channels].to(dtype))
        check_encoded(latents, "the rendered frames", 0, dtype)
        return latents.float()

    return encode


def frame_size(config: WorldConfig, cfg_path: Path | str) -> tuple[int, int]:
    """Returns height and width in pixels of the frames that the configuration's autoencoder takes and gives."""
    vae_path = named_file(config.train, "vae_cfg_path", cfg_path)
    if vae_path is not None:
        return pictures_of(vae_path)[1]
    height, width = latent_grid(config.model)
    return HUB_SCALE * height, HUB_SCALE * width


def make_contexts(
    config: WorldConfig,
    cfg_path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    path: Path | str | None = None,
    seed: int = 0,
) -> list[Context]:
    """Returns the beginnings in a file, the one in a row of a table (`TABLE#12`), or without a path the one of a seed.

    A seed's is rendered at the configuration's frame rate and size.

    Raises:
        ConfigError: rendered latents would not fit the model.
        DataError: the file cannot be used.
    """
    model, train = config.model, config.train
    space = latent_space(config, cfg_path)
    channels = space.stored_channels(model.channels)
    if path is not None:
        names = None if config.controls is None else [button.name for button in config.controls]
        grid, buttons, scale = latent_grid(model), model.n_buttons, train.vae_scale
        found = load_contexts(path, channels=channels, grid=grid, n_buttons=buttons, scale=scale, names=names)
        return [_whitened(context, space) for context in found]
    return [make_renderer(config, cfg_path, device, dtype)(seed)]


def make_renderer(
    config: WorldConfig,
    cfg_path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress = lambda what, done, total: None,
) -> Callable[[int], Context]:
    """Returns a function from a seed to the beginning of its world: `CONTEXT_FRAMES` frames of scripted play.

    Raises:
        ConfigError, CheckpointError: as `make_encode`; the function raises ConfigError for latents of another shape.
    """
    model, train = config.model, config.train
    space = latent_space(config, cfg_path)
    encode, size = make_encode(config, cfg_path, device, dtype), frame_size(config, cfg_path)
    wanted = (space.stored_channels(model.channels), *latent_grid(model))

    def checked(frames: Tensor) -> Tensor:
        latents = encode(frames)
        if tuple(latents.shape[1:]) != wanted:
            found = list(latents.shape[1:])
            raise ConfigError(
                f"{cfg_path}: the model takes latents {list(wanted)}, its VAE encodes to {found}: "
                "train.vae_cfg_path must name the VAE of the model's data"
            )
        return latents

    def make(seed: int) -> Context:
        made = render_context(
            checked,
            frames=CONTEXT_FRAMES,
            scale=train.vae_scale,
            repeat=max(1, round(FRAMES_PER_SECOND / train.fps)),
            seed=seed,
            n_buttons=model.n_buttons,
            size=size,
            device=device,
            progress=lambda done, total: progress("first frames", done, total),
        )
        return _whitened(made, space)

    return make


def latent_space(config: WorldConfig, cfg_path: Path | str) -> LatentSpace:
    """Return the space of the model's latents, its transform found from any working directory.

    Raises:
        CheckpointError: the transform cannot be read.
    """
    return LatentSpace.of(with_files_found(config, cfg_path).train)


def _whitened(context: Context, space: LatentSpace) -> Context:
    """Apply the transform to a beginning that is scaled already."""
    return replace(
        context, latents=LatentSpace(1.0, space.whitener).to(context.latents.device).to_model(context.latents)
    )


def build_pipeline(
    cfg_path: Path | str,
    ckpt_path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    context: Path | str | None = None,
    steps: int | None = None,
    cfg_scale: float | None = None,
    max_window: int | None = None,
    tensorrt: bool = True,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> InteractivePipeline:
    """Returns an interactive pipeline from files. Values that are None come from the configuration's `sampler_kwargs`.

    Args:
        cfg_path: YAML with `model` and `train` sections.
        ckpt_path: the model's weights.
        device, dtype: where and in what to compute.
        context: file of beginnings; None renders them.
        steps, cfg_scale, max_window: see `InteractivePipeline`.
        tensorrt: False decodes with PyTorch.
        seed: of noise and of rendered beginnings.
        progress: called with each thing that is being made, see `owl_wms.inference.loading.Progress`.

    Raises:
        ConfigError, CheckpointError, DataError: a file cannot be used; ConfigError too for a model with sound, and for
            one whose buttons are not the game's without `controls`.
    """
    config = load_video_config(cfg_path)
    controls = controls_for(config, cfg_path)
    given = played_sampler(config, cfg_path)
    progress("model", 0, 0)
    core = load_core(cfg_path, ckpt_path, device, dtype)
    progress("decoder", 0, 0)
    picture = quick_dtype(device, dtype)
    decode = make_decode(config, cfg_path, device, picture, tensorrt=tensorrt, check="canary")
    render = None if context is not None else make_renderer(config, cfg_path, device, picture, progress)
    contexts = make_contexts(config, cfg_path, device, dtype, path=context) if render is None else [render(seed)]
    progress("first passes", 0, 0)
    return InteractivePipeline(
        core,
        decode,
        contexts,
        image_scale=config.train.vae_scale,
        whitener=latent_space(config, cfg_path).whitener,
        steps=given.n_steps if steps is None else steps,
        order=given.order,
        schedule=given.custom_schedule if steps is None else None,
        cfg_scale=given.cfg_scale if cfg_scale is None else cfg_scale,
        max_level=given.max_level,
        noise_prev=given.noise_prev,
        max_window=given.max_window if max_window is None else max_window,
        seed=seed,
        controls=controls,
        new_context=render,
    )


def quick_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """Returns bf16 for fp32 on a CPU that multiplies it, which takes a quarter less time per frame; else the dtype."""
    fast = torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and dtype == torch.float32 else dtype


def build_game(
    *,
    vae_config: Path | None = None,
    vae_checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tensorrt: bool = True,
    fps: float = FRAMES_PER_SECOND,
    seed: int = 0,
) -> GameSource:
    """Returns the rendered game at game speed for `fps` pictures per second; through an autoencoder if one is given."""
    repeat = max(1, round(FRAMES_PER_SECOND / fps))
    if vae_config is None or vae_checkpoint is None:
        return GameSource(seed, repeat=repeat, device=device)
    encoder = _encoder(None, vae_config, vae_checkpoint, device, dtype)
    decoder = _quick(get_decoder_only(None, vae_config, vae_checkpoint, device=device, dtype=dtype), device)
    channels, (height, width) = pictures_of(vae_config)
    return GameSource(
        seed,
        repeat=repeat,
        height=height,
        width=width,
        encode=lambda x: encoder(x[:, :channels].to(dtype)),
        decode=make_batched_decode_fn(decoder, 1, use_tensorrt=tensorrt, check="canary"),
        device=device,
    )


def _encoder(
    vae_id: str | None, cfg: Path | None, ckpt: Path | None, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    encoder = fold_weight_norm(load_encoder(vae_id, cfg, ckpt)).requires_grad_(False)
    return _quick(encoder.to(device=device, dtype=dtype), device)


def _quick(module: nn.Module, device: torch.device | str) -> nn.Module:
    return quick_on_cpu(module) if torch.device(device).type == "cpu" else module
