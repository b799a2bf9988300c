"""A configured autoencoder half with its weights: config, keys, variant, shapes, in that order.

Why it exists: the bridge, the trainers and the command line all want "the decoder of this config and this file",
without building the other half and without knowing how the file came about.

Usage:
    decoder = load_decoder(None, "configs/vae/dec_dist.yml", "dec_distill_cod_v2.pt")
    decoder = load_decoder("dcae", None, None)      # diffusers' AutoencoderDC, see owl_wms.vae.hub
    decoder = load_decoder("taehv", None, "taew2_1.pth")    # sizes are read off the file
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from owl_wms.configs.vae import (
    HUB_VAE_ID,
    TAEHV_VAE_ID,
    DCAEConfig,
    TAEHVConfig,
    VAEModelConfig,
    load_vae_model,
)
from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.vae.build import build_decoder, build_encoder
from owl_wms.vae.checkpoint import detect_variant, load_weights, read_state_dict, require_plain
from owl_wms.vae.hub import load_hub_decoder, load_hub_encoder
from owl_wms.vae.layouts import select_part
from owl_wms.vae.meta import WeightNormShapes
from owl_wms.vae.taehv import TAEHVDecoder
from owl_wms.vae.taehv_weights import config_of, fit_grow_layers, require_fits


def load_decoder(vae_id: str | None, cfg_path: Path | str | None, ckpt_path: Path | str | None) -> nn.Module:
    """The decoder of a configuration with a file's weights, float32 on the CPU in eval mode.

    Args:
        vae_id: "dcae" means diffusers' AutoencoderDC (`ckpt_path`: its folder or hub id, or None for the hub); "taehv"
            needs no `cfg_path`, since the sizes of a TAEHV are read off its file; anything else, as in upstream's
            files, means the autoencoder that `cfg_path` describes.
        cfg_path: YAML file with a `model` section.
        ckpt_path: `.pt` or `.safetensors`: bare decoder, full model or training checkpoint, of which the averaged
            weights are taken where it has both.

    Raises:
        ConfigError: the configuration is missing, wrong or contradictory.
        CheckpointError: the file cannot be read or belongs to another architecture.
    """
    if vae_id == HUB_VAE_ID:
        return load_hub_decoder(ckpt_path)
    if vae_id == TAEHV_VAE_ID and cfg_path is None and ckpt_path is not None:
        state = _read_part("decoder", ckpt_path)
        return _with_weights("decoder", config_of(state, ckpt_path), state, ckpt_path)
    _require_known(vae_id, cfg_path)
    return _load_part("decoder", cfg_path, ckpt_path)


def read_taehv_config(ckpt_path: Path | str) -> TAEHVConfig:
    """Reads the configuration of a TAEHV off its file of weights.

    Raises:
        CheckpointError: as `load_decoder`.
    """
    return config_of(_read_part("decoder", ckpt_path), ckpt_path)


def load_encoder(vae_id: str | None, cfg_path: Path | str | None, ckpt_path: Path | str | None) -> nn.Module:
    """The encoder of a configuration; arguments, state and errors as for `load_decoder`."""
    if vae_id == HUB_VAE_ID:
        return load_hub_encoder(ckpt_path)
    _require_known(vae_id, cfg_path)
    return _load_part("encoder", cfg_path, ckpt_path)


def _require_known(vae_id: str | None, cfg_path: Path | str | None) -> None:
    if vae_id is not None and cfg_path is None:
        raise ConfigError(
            f"vae_id {vae_id!r} is not known: only {HUB_VAE_ID!r}, and {TAEHV_VAE_ID!r} with a checkpoint, need no "
            "configuration; any other id needs vae_cfg_path, which describes the autoencoder",
            key="train.vae_id",
        )


def _load_part(part: str, cfg_path: Path | str | None, ckpt_path: Path | str | None) -> nn.Module:
    if cfg_path is None or ckpt_path is None:
        name = "vae_cfg_path" if cfg_path is None else "vae_ckpt_path"
        raise ConfigError(f"{name} is needed to load a {part}, received None", key=f"train.{name}")
    cfg = load_vae_model(cfg_path)
    return _with_weights(part, cfg, _read_part(part, ckpt_path), ckpt_path)


def _read_part(part: str, ckpt_path: Path | str) -> dict[str, Tensor]:
    state = select_part(read_state_dict(ckpt_path), part, ckpt_path)
    if not state:
        other = "encoder" if part == "decoder" else "decoder"
        raise CheckpointError(f"{ckpt_path}: has weights of the {other} only, not of the {part}", path=ckpt_path)
    require_plain(state, ckpt_path)
    return state


def _with_weights(part: str, cfg: VAEModelConfig, state: dict[str, Tensor], ckpt_path: Path | str) -> nn.Module:
    if isinstance(cfg, TAEHVConfig) and part == "decoder":
        require_fits(cfg, state, ckpt_path)
    variant = detect_variant(state, skip_residuals=cfg.skip_residuals) if isinstance(cfg, DCAEConfig) else None
    # On meta nothing is initialised only to be overwritten; the file's tensors then become the parameters.
    with torch.device("meta"), WeightNormShapes():
        # It has the process's default dtype, in which the file's numbers would be rounded.
        module = (build_decoder if part == "decoder" else build_encoder)(cfg, variant).float()
    if isinstance(module, TAEHVDecoder):
        state = fit_grow_layers(module, state)
    load_weights(module, state, ckpt_path, assign=True)
    return module.eval()
