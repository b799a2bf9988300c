"""`owl_wms.from_pretrained`: a model, and if wanted the decoder its configuration names, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from owl_wms.configs import load_world_config
from owl_wms.configs.paths import find_beside
from owl_wms.models.load import load_model
from owl_wms.utils.owl_vae_bridge import get_decoder_only


def from_pretrained(cfg_path: Path | str, ckpt_path: Path | str, return_decoder: bool = False) -> Any:
    """Load a world model.

    Args:
        cfg_path: YAML file with `model` and `train` sections.
        ckpt_path: weights; see `owl_wms.models.load.load_model`.
        return_decoder: also load the decoder of `train.vae_id`, `vae_cfg_path` and `vae_ckpt_path`, paths being
            relative to the working directory or to a folder above `cfg_path`.

    Returns:
        The model (CPU, fp32, train mode), or (model, decoder) with the decoder as `get_decoder_only` gives it.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: a file of weights cannot be read or belongs to another architecture.
    """
    model = load_model(cfg_path, ckpt_path)
    if not return_decoder:
        return model
    train = load_world_config(cfg_path).train
    vae_cfg, vae_ckpt = find_beside(train.vae_cfg_path, cfg_path), find_beside(train.vae_ckpt_path, cfg_path)
    return model, get_decoder_only(train.vae_id, vae_cfg, vae_ckpt)
