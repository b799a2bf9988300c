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
from typing import Any, cast

import torch
from torch import nn

from owl_wms.configs.paths import expanded
from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.interrupts import raise_interrupt
from owl_wms.vae.checkpoint import check_values

CONFIG = "config.json"
HUB_ID = "mit-han-lab/dc-ae-f64c128-mix-1.0-diffusers"


def load_hub_decoder(source: Path | str | None = None) -> nn.Module:
    """diffusers' decoder, float32 on the CPU in eval mode: `z [B, 128, s, s] -> x [B, 3, 64 s, 64 s]`.

    Args:
        source: a folder that diffusers can read (`~` and variables are expanded), one of a whole pipeline (its `vae` is
            taken), a hub id, or None for `HUB_ID`.

    Raises:
        ConfigError: diffusers is not installed.
        CheckpointError: the folder or hub id cannot be loaded, or the decoder's weights are not all in it and finite.
    """
    return _load(source, "decoder")


def load_hub_encoder(source: Path | str | None = None) -> nn.Module:
    """diffusers' encoder, `x [B, 3, H, W] -> z [B, 128, H / 64, W / 64]`.

    Arguments and errors as `load_hub_decoder`.
    """
    return _load(source, "encoder")


def _load(source: Path | str | None, part: str) -> nn.Module:
    try:
        cls = importlib.import_module("diffusers").AutoencoderDC
    except (ImportError, AttributeError) as err:
        raise ConfigError(
            f'vae_id "dcae" needs the package diffusers with AutoencoderDC: {err}; install diffusers',
            key="train.vae_id",
        ) from err
    name = _place(source)
    try:
        # Not mapped: weights over a mapped file change when the file is written again. Without a dtype they would be
        # rounded to the process's default one.
        model, report = cls.from_pretrained(
            name, output_loading_info=True, disable_mmap=True, torch_dtype=torch.float32
        )
    except Exception as err:  # network, cache, config and weight problems all arrive here, as many classes
        raise_interrupt(err)
        reason = next(iter(str(err).strip().splitlines()), type(err).__name__)
        raise CheckpointError(f"{name}: diffusers cannot load it: {reason}", path=name) from err
    # diffusers fills weights that are missing with random numbers and only logs it.
    for kind, remark in (
        ("missing", "is missing from"),
        ("mismatched", "has another shape in"),
        ("unexpected", "is unknown, but in"),
    ):
        keys = [key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"]]
        wrong = next((key for key in keys if key.startswith(f"{part}.")), None)
        if wrong is not None:
            raise CheckpointError(f"{name}: {wrong} {remark} the weights of the {part}", path=name, mismatch=wrong)
    half: Any = getattr(model, part).float().eval()
    check_values(half, name)
    # The bridge checks latents against these.
    half.latent_channels = int(model.config.latent_channels)
    half.out_channels = int(model.config.in_channels)
    return cast(nn.Module, half)


def _place(source: Path | str | None) -> str:
    """Returns the folder that a path means, or the hub id.

    Raises:
        CheckpointError: a path at which there is no folder, or a text that is no path (see `expanded`).
    """
    if source is None:
        return HUB_ID
    try:
        path = expanded(source)
    except ValueError as error:
        raise CheckpointError(f"{source}: is a name {error}", path=str(source)) from None
    if path.is_dir():
        inner = path / "vae"  # of a whole pipeline, as diffusers saves it
        return str(inner if not (path / CONFIG).exists() and (inner / CONFIG).exists() else path)
    if path.is_file():
        text = f"{path}: is a file; a folder is wanted, with config.json and the weights, as diffusers saves it"
        raise CheckpointError(text, path=path)
    if path.is_absolute() or str(source).startswith("."):
        raise CheckpointError(f"{path}: no such folder", path=path)
    return str(source)
