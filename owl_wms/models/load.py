"""A world model from its configuration and a checkpoint of any of the shapes that training leaves behind.

Usage:
    model = load_model("configs/dit_v4.yml", "step_100000.pt")
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from owl_wms.configs import WorldModelConfig, load_world_model
from owl_wms.models import GameRFT, GameRFTAudio, make_model
from owl_wms.vae import load_weights, read_state_dict, select_core

_log = logging.getLogger(__name__)


def load_model(cfg_path: Path | str, ckpt_path: Path | str) -> GameRFT | GameRFTAudio:
    """The wrapper model with a file's weights, on the CPU, in fp32 and train mode.

    Args:
        cfg_path: YAML file with a `model` section.
        ckpt_path: `.pt` or `.safetensors`: weights of the wrapper or of the core alone, or a training checkpoint, with
            any prefixes of EMA, DDP and torch.compile; averaged weights are taken where the file has both.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: the file cannot be read or belongs to another architecture.
    """
    config = load_world_model(cfg_path)
    if isinstance(config, WorldModelConfig) and config.model_id == "game_rft_audio":
        _tell_head(str(cfg_path), config)
    # On meta nothing is initialised only to be overwritten; the file's tensors become the parameters.
    with torch.device("meta"):
        model = make_model(config)
    weights = select_core(read_state_dict(ckpt_path), ckpt_path)
    load_weights(model.core, weights, ckpt_path, assign=True)
    return model.to("cpu")


@functools.cache
def _tell_head(cfg_path: str, config: WorldModelConfig) -> None:
    """Says once which picture head the weights are taken for, since both kinds of weights have the same keys."""
    kind = "after a layer norm (upstream since 2025-07-28)" if config.video_head_norm else "without a layer norm"
    said = "as it says" if "video_head_norm" in config.model_fields_set else "which it does not say"
    _log.warning("%s: the picture head is taken to be %s, %s (model.video_head_norm)", cfg_path, kind, said)
