"""The public deep-compression autoencoder through diffusers (`vae_id: dcae`), from a local folder or the hub.

Why it exists: upstream uses the string "dcae" for two things. As `model_id` it is the autoencoder of
`owl_wms.vae.dcae`; as `vae_id` it is diffusers' `AutoencoderDC` at f64c128. diffusers is imported only here and only
when it is asked for.

Usage:
    decoder = load_hub_decoder("models/dc-ae-f64c128")     # a folder with config.json and weights
    decoder = load_hub_decoder(None)                       # from the hub (or its local cache)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from owl_wms.errors import CheckpointError, ConfigError

HUB_ID = "mit-han-lab/dc-ae-f64c128-mix-1.0-diffusers"


def load_hub_decoder(source: Path | str | None = None) -> nn.Module:
    """diffusers' decoder, float32 on the CPU in eval mode: `z [B, 128, s, s] -> x [B, 3, 64 s, 64 s]`.

    Args:
        source: a folder that diffusers can read, a hub id, or None for `HUB_ID`.

    Raises:
        ConfigError: diffusers is not installed.
        CheckpointError: the folder or hub id cannot be loaded.
    """
    return _with_channels(_load(source), "decoder")


def load_hub_encoder(source: Path | str | None = None) -> nn.Module:
    """diffusers' encoder, `x [B, 3, H, W] -> z [B, 128, H / 64, W / 64]`.

    Arguments and errors as `load_hub_decoder`.
    """
    return _with_channels(_load(source), "encoder")


def _load(source: Path | str | None) -> Any:
    try:
        cls = importlib.import_module("diffusers").AutoencoderDC
    except (ImportError, AttributeError) as err:
        raise ConfigError(
            f'vae_id "dcae" needs the package diffusers with AutoencoderDC: {err}; install diffusers',
            key="train.vae_id",
        ) from err
    name = str(source) if source is not None else HUB_ID
    if source is not None and (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise CheckpointError(f"{name}: no such folder", path=name)
    try:
        return cls.from_pretrained(name)
    except Exception as err:  # network, cache, config and weight problems all arrive here, as many classes
        raise CheckpointError(
            f"{name}: diffusers cannot load it: {str(err).strip().splitlines()[0]}", path=name
        ) from err


def _with_channels(model: Any, part: str) -> nn.Module:
    """The half alone, with the channel counts that the bridge checks latents against."""
    half = getattr(model, part).float().eval()
    half.latent_channels = int(model.config.latent_channels)
    half.out_channels = int(model.config.in_channels)
    return half
