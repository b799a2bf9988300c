"""Reads the parts of a configuration that a game needs, before torch is loaded: errors in it are reported at once.

Usage:
    config = load_video_config("examples/world/game_rft.yml")
    frames_per_second(config, "examples/world/game_rft.yml")       # 20.0
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from owl_wms.configs import (
    HUB_VAE_ID,
    TAEHV_VAE_ID,
    TAEHVConfig,
    TrainingConfig,
    WorldConfig,
    load_vae_model,
    load_world_config,
)
from owl_wms.configs.paths import find_beside
from owl_wms.configs.strict import PositiveInt, StrictModel, parse
from owl_wms.errors import ConfigError


class PlayedSampler(StrictModel):
    """Holds the part of `train.sampler_kwargs` that play reads, for `InteractivePipeline`."""

    n_steps: PositiveInt = 4
    order: Literal[1, 2] = 1
    custom_schedule: tuple[float, ...] | None = None
    cfg_scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    max_level: Annotated[float, Field(gt=0, le=1)] = 1.0
    noise_prev: Annotated[float, Field(ge=0, le=1)] = 0.2
    max_window: PositiveInt | None = None


def played_sampler(config: WorldConfig, cfg_path: Path | str) -> PlayedSampler:
    """Returns the sampling that a configuration asks for.

    Raises:
        ConfigError: a value of another type, or out of range.
    """
    given = config.train.sampler_kwargs or {}
    known = {name: given[name] for name in PlayedSampler.model_fields if name in given}
    return parse(PlayedSampler, known, path=cfg_path, prefix="train.sampler_kwargs")


def load_video_config(cfg_path: Path | str) -> WorldConfig:
    """Reads a configuration whose model makes video alone, and whose autoencoder can be found.

    Raises:
        ConfigError: the file cannot be used, its model makes sound too, or it names no autoencoder or absent files.
    """
    config = load_world_config(cfg_path)
    if config.model.model_id != "game_rft":
        raise ConfigError(
            f"{cfg_path}: model.model_id is {config.model.model_id}; only game_rft, which makes video alone, can be "
            "played or sampled here",
            path=cfg_path,
            key="model.model_id",
        )
    train = config.train
    needed = {HUB_VAE_ID: (), TAEHV_VAE_ID: ("vae_ckpt_path",)}.get(
        train.vae_id or "", ("vae_cfg_path", "vae_ckpt_path")
    )
    missing = [f"train.{key}" for key in needed if named_file(train, key, cfg_path) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        text = f"{cfg_path}: {' and '.join(missing)} {verb} missing, and without the autoencoder there are no frames"
        remedy = "write the paths of its YAML file and its weights there"
        raise ConfigError(f"{text}: {remedy}", path=cfg_path, key=missing[0])
    return config


def named_file(train: TrainingConfig, key: str, cfg_path: Path | str) -> Path | None:
    """Returns a file of the autoencoder that the configuration names; None if it names none.

    Raises:
        ConfigError: no such file.
    """
    found = find_beside(getattr(train, key), cfg_path)
    if found is not None and not found.exists() and train.vae_id != HUB_VAE_ID:  # what is no folder is a hub id there
        text = f"{cfg_path}: train.{key}: {found}: no such file, from here or from a folder above the configuration"
        raise ConfigError(text, path=cfg_path, key=f"train.{key}")
    return found


def frames_per_second(config: WorldConfig, cfg_path: Path | str) -> float:
    """Returns the rate of the frames that the configuration's decoder makes of `train.fps` latents per second.

    Raises:
        ConfigError, CheckpointError: the decoder is not known.
    """
    decoder = streaming_config(config, cfg_path)
    return float(config.train.fps * (1 if decoder is None else decoder.frames_per_latent))


def streaming_config(config: WorldConfig, cfg_path: Path | str) -> TAEHVConfig | None:
    """Returns the decoder's configuration if its frames depend on those before."""
    vae_path = named_file(config.train, "vae_cfg_path", cfg_path)
    if vae_path is not None:
        model = load_vae_model(vae_path)
        return model if isinstance(model, TAEHVConfig) else None
    if config.train.vae_id != TAEHV_VAE_ID:
        return None
    from owl_wms.vae.load import read_taehv_config  # looks into the weights, and that needs torch

    weights = named_file(config.train, "vae_ckpt_path", cfg_path)
    return None if weights is None else read_taehv_config(weights)
