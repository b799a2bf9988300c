"""Weights of a TAEHV in the author's layout: which configuration they are of, and what is loaded of them.

Usage:
    config = config_of(state, path)             # read off names and shapes
    require_fits(config, state, path)           # or a CheckpointError that names the configuration that fits
    decoder.load_state_dict(fit_grow_layers(decoder, state))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from owl_wms.configs.vae import TAEHVConfig
from owl_wms.errors import CheckpointError
from owl_wms.vae import taehv
from owl_wms.vae.taehv import IMAGE_CHANNELS, Grow, TAEHVDecoder

# Latent channels, patch size and frames per latent of the published checkpoints: name of our file, name of the model.
PUBLISHED = {
    (16, 1, 4): ("wan21", "Wan 2.1"),
    (48, 2, 4): ("wan22", "Wan 2.2"),
    (32, 2, 4): ("hunyuan15", "Hunyuan 1.5"),
    (128, 4, 8): ("ltx2", "LTX-2"),
}


def config_of(state: Mapping[str, Tensor], path: object) -> TAEHVConfig:
    """Reads the configuration off a checkpoint's decoder weights, all upsampling switched on that they have.

    Args:
        state: weights of the decoder, keys `N...` in the author's layout.
        path: of the file, for the message.

    Raises:
        CheckpointError: the keys or shapes are not those of a TAEHV decoder.
    """
    form: Literal["normal", "super"] = "super" if "0.weight" in state else "normal"
    first, last, grows, grown = (0, 22, (7, 14, 21), taehv.WIDTHS["super"][1:])
    if form == "normal":
        first, last, grows, grown = (1, 22, (7, 13, 19), taehv.WIDTHS["normal"][:-1])
    keys = (f"{first}.weight", f"{last}.weight", *(f"{i}.conv.weight" for i in grows))
    missing = next((key for key in keys if key not in state or state[key].dim() != 4), None)
    if missing is not None:
        raise CheckpointError(
            f"{path}: is no TAEHV checkpoint: it has no decoder.{missing}; give one of the author's files",
            path=str(path),
            mismatch=missing,
        )
    outputs = len(state[f"{last}.weight"])
    patch = round((outputs / IMAGE_CHANNELS) ** 0.5) or 1
    times = [len(state[f"{i}.conv.weight"]) > width for i, width in zip(grows, grown, strict=True)]
    return TAEHVConfig(
        model_id="taehv",
        latent_channels=state[f"{first}.weight"].shape[1],
        patch_size=patch,
        form=form,
        time_upscale=(times[0], times[1], times[2]),
    )


def require_fits(config: TAEHVConfig, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Refuses weights of another TAEHV than `config` describes, and names the configuration that fits them.

    Weights that make more frames than `config` wants fit (`fit_grow_layers`).

    Args:
        config: what a configuration file says.
        state, path: as in `config_of`.

    Raises:
        CheckpointError: they do not fit, or belong to no TAEHV.
    """
    found = config_of(state, path)
    frames = any(wanted and not has for wanted, has in zip(config.time_upscale, found.time_upscale, strict=True))
    differing = [
        name for name in ("form", "latent_channels", "patch_size") if getattr(config, name) != getattr(found, name)
    ]
    if differing or frames:
        raise CheckpointError(
            f"{path}: these weights are {_described(found)}, and the configuration describes {_described(config)}; "
            f"use {_file_of(found)}, or vae_id taehv (--family taehv) without a configuration",
            path=path,
            mismatch=(*differing, "time_upscale")[0],
        )


def _described(config: TAEHVConfig) -> str:
    name = PUBLISHED.get((config.latent_channels, config.patch_size, config.frames_per_latent))
    said = "" if name is None else f"{name[1]}{', super' if config.form == 'super' else ''}: "
    return (
        f"{said}model_id taehv, form {config.form}, latent_channels {config.latent_channels}, patch_size "
        f"{config.patch_size}, {config.frames_per_latent} frames per latent"
    )


def _file_of(config: TAEHVConfig) -> str:
    name = PUBLISHED.get((config.latent_channels, config.patch_size, config.frames_per_latent))
    if name is None:
        return "a configuration with these values"
    return f"configs/vae/taehv_{name[0]}{'_super' if config.form == 'super' else ''}.yml"


def fit_grow_layers(decoder: TAEHVDecoder, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` with grow layers that make more frames than `decoder` wants cut to their last outputs.

    The last outputs are the latest frame, as in the author's loader: a checkpoint that doubles the frame rate is then
    decoded at half of it.
    """
    cut = dict(state)
    for name, layer in decoder.named_children():
        if isinstance(layer, Grow) and f"{name}.conv.weight" in cut:
            cut[f"{name}.conv.weight"] = cut[f"{name}.conv.weight"][-layer.conv.out_channels :]
    return cut
