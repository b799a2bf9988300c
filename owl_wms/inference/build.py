"""From files to something that can be played: model, decoder and beginnings put together as a configuration says.

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

from owl_wms.configs import TrainingConfig, WorldConfig, load_vae_model, load_world_config
from owl_wms.configs.paths import find_beside
from owl_wms.configs.world import with_files_found
from owl_wms.errors import ConfigError
from owl_wms.game.world import FRAMES_PER_SECOND
from owl_wms.inference.context import Context, load_contexts, render_context
from owl_wms.inference.pipeline import InteractivePipeline
from owl_wms.inference.source import GameSource
from owl_wms.models.latents import LatentSpace
from owl_wms.models.load import load_model
from owl_wms.runtime import VideoDecode
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from owl_wms.vae import fold_weight_norm, load_encoder
from owl_wms.vae.load import HUB_VAE_ID

CONTEXT_FRAMES = 12
CONTEXTS = 3


def load_video_config(cfg_path: Path | str) -> WorldConfig:
    """A configuration whose model makes pictures alone, which is all that playing and sampling clips can show.

    Raises:
        ConfigError: the file cannot be used, or its model makes sound too.
    """
    config = load_world_config(cfg_path)
    if config.model.model_id != "game_rft":
        raise ConfigError(
            f"{cfg_path}: model.model_id is {config.model.model_id}; only game_rft, which makes video alone, can be "
            "played or sampled here",
            path=cfg_path,
            key="model.model_id",
        )
    return config


def load_core(cfg_path: Path | str, ckpt_path: Path | str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The core of a model, frozen, in eval mode."""
    return load_model(cfg_path, ckpt_path).core.eval().requires_grad_(False).to(device=device, dtype=dtype)


def _named(train: TrainingConfig, key: str, cfg_path: Path | str) -> Path | None:
    """A file of the autoencoder that the configuration names; whoever plays a copy of it has not named that file."""
    found = find_beside(getattr(train, key), cfg_path)
    if found is not None and not found.exists() and train.vae_id != HUB_VAE_ID:  # what is no folder is a hub id there
        text = f"{cfg_path}: train.{key}: {found}: no such file, from here or from a folder above the configuration"
        raise ConfigError(text, path=cfg_path, key=f"train.{key}")
    return found


def make_decode(
    config: WorldConfig,
    cfg_path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    tensorrt: bool = True,
    batch_size: int = 1,
    output: str = "bf16",
) -> VideoDecode:
    """Returns the configuration's decoder behind the bridge; its program is found or built here.

    `batch_size` and `output` are as in `make_batched_decode_fn`; play decodes one frame at a time.
    """
    train, model = config.train, config.model
    cfg, ckpt = _named(train, "vae_cfg_path", cfg_path), _named(train, "vae_ckpt_path", cfg_path)
    decoder = _quick(get_decoder_only(train.vae_id, cfg, ckpt, device=device, dtype=dtype), device)
    decode = make_batched_decode_fn(
        decoder, batch_size, use_tensorrt=tensorrt and train.use_tensorrt, config=train, output=output
    )
    channels = latent_space(config, cfg_path).stored_channels(model.channels)
    decode.prepare((channels, model.sample_size, model.sample_size))
    return decode


def make_encode(
    config: WorldConfig, cfg_path: Path | str, device: torch.device | str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The encoder that belongs to the configuration's decoder: [k, 4, 360, 640] to [k, c, h, w] fp32.

    Raises:
        ConfigError: it wants more channels than the game has.
        CheckpointError: the file has no encoder; give a context file instead.
    """
    train = config.train
    vae_path = _named(train, "vae_cfg_path", cfg_path)
    channels = 3 if vae_path is None else getattr(load_vae_model(vae_path), "channels", 3)
    if channels > 4:
        raise ConfigError(
            f"{vae_path}: encodes {channels} channels, the game has 4; give a context file", path=vae_path
        )
    encoder = load_encoder(train.vae_id, vae_path, _named(train, "vae_ckpt_path", cfg_path))
    encoder = _quick(fold_weight_norm(encoder).requires_grad_(False).to(device=device, dtype=dtype), device)

    def encode(frames: Tensor) -> Tensor:
        return encoder(frames[:, :channels].to(dtype)).float()

    return encode


def make_contexts(
    config: WorldConfig,
    cfg_path: Path | str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    path: Path | str | None = None,
    count: int = CONTEXTS,
    frames: int = CONTEXT_FRAMES,
    seed: int = 0,
) -> list[Context]:
    """Beginnings from a file, or `count` of them rendered at the configuration's frame rate.

    Raises:
        ConfigError: rendered latents would not fit the model.
        DataError: the file cannot be used.
    """
    model, train = config.model, config.train
    space = latent_space(config, cfg_path)
    channels = space.stored_channels(model.channels)
    if path is not None:
        found = load_contexts(
            path, channels=channels, side=model.sample_size, n_buttons=model.n_buttons, scale=train.vae_scale
        )
        return [_whitened(context, space) for context in found]
    encode = make_encode(config, cfg_path, device, dtype)
    made = [
        render_context(
            encode,
            frames=frames,
            scale=train.vae_scale,
            repeat=max(1, round(FRAMES_PER_SECOND / train.fps)),
            seed=seed + index,
            n_buttons=model.n_buttons,
            device=device,
        )
        for index in range(count)
    ]
    wanted = (channels, model.sample_size, model.sample_size)
    if tuple(made[0].latents.shape[2:]) != wanted:
        raise ConfigError(f"the model takes latents {wanted}, the encoder gives {tuple(made[0].latents.shape[2:])}")
    return [_whitened(context, space) for context in made]


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
) -> InteractivePipeline:
    """An interactive pipeline from files; what is None comes from the configuration's `sampler_kwargs`.

    Args:
        cfg_path: YAML with `model` and `train` sections.
        ckpt_path: the model's weights.
        device, dtype: where and in what to compute.
        context: file of beginnings; None renders them.
        steps, cfg_scale, max_window: see `InteractivePipeline`.
        tensorrt: False decodes with PyTorch.
        seed: of noise and of rendered beginnings.

    Raises:
        ConfigError, CheckpointError, DataError: a file cannot be used; ConfigError too for a model with sound.
    """
    config = load_video_config(cfg_path)
    given = dict(config.train.sampler_kwargs or {})
    # A CPU takes half a second to encode a frame, and playing should begin soon.
    count = CONTEXTS if torch.device(device).type == "cuda" else 1
    return InteractivePipeline(
        load_core(cfg_path, ckpt_path, device, dtype),
        make_decode(config, cfg_path, device, dtype, tensorrt=tensorrt),
        make_contexts(config, cfg_path, device, dtype, path=context, seed=seed, count=count),
        image_scale=config.train.vae_scale,
        whitener=latent_space(config, cfg_path).whitener,
        steps=given.get("n_steps", 4) if steps is None else steps,
        schedule=given.get("custom_schedule") if steps is None else None,
        cfg_scale=given.get("cfg_scale", 1.0) if cfg_scale is None else cfg_scale,
        max_level=given.get("max_level", 1.0),
        noise_prev=given.get("noise_prev", 0.2),
        max_window=given.get("max_window") if max_window is None else max_window,
        seed=seed,
    )


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
    """The rendered game, through an autoencoder when one is given, at game speed for `fps` pictures a second."""
    repeat = max(1, round(FRAMES_PER_SECOND / fps))
    if vae_config is None or vae_checkpoint is None:
        return GameSource(seed, repeat=repeat, device=device)
    encoder = fold_weight_norm(load_encoder(None, vae_config, vae_checkpoint)).requires_grad_(False)
    encoder = _quick(encoder.to(device=device, dtype=dtype), device)
    decoder = _quick(get_decoder_only(None, vae_config, vae_checkpoint, device=device, dtype=dtype), device)
    channels = getattr(load_vae_model(vae_config), "channels", 3)
    return GameSource(
        seed,
        repeat=repeat,
        encode=lambda x: encoder(x[:, :channels].to(dtype)),
        decode=make_batched_decode_fn(decoder, 1, use_tensorrt=tensorrt),
        device=device,
    )


def _quick(module: nn.Module, device: torch.device | str) -> nn.Module:
    """On a CPU these convolutions run two to three times faster channels last."""
    return module.to(memory_format=torch.channels_last) if torch.device(device).type == "cpu" else module  # type: ignore[call-overload]
