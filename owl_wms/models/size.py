"""Counts what a world model takes in memory from its configuration alone, before anything is allocated.

Why it exists: a number with a digit too many otherwise ends as torch's own allocation error, or fills the memory with
one small layer after another until the system ends the process.

Usage:
    require_room(cfg.model)        # ConfigError if the weights are larger than this machine's memory
"""

from __future__ import annotations

from typing import Any

from owl_wms import env
from owl_wms.errors import ConfigError
from owl_wms.nn.setting import latent_grid, setting

_LAYER_OBJECTS_BYTES = 32 * 1024  # at least, of Python and torch, however narrow a layer is
_ANGLE_BYTES = 24  # of one rotary angle while the table is made: the fp64 angle, a part of it, and its cosine
_FEATURES = 512  # sinusoids of a noise level, and of a mouse movement


def count_parameters(config: Any) -> int:
    """Return the number of weights of a `model` section's video model; sound adds a projection or two to it."""
    d, channels = config.d_model, config.channels
    layers = config.n_layers * (18 * d * d + 15 * d)
    levels = 4 * d * (_FEATURES + 1) + d * (4 * d + 1)
    heads = d * channels + channels * (d + 1) + 2 * d * (d + 1)
    count = int(layers + levels + heads) + (d if setting(config, "sink_frames", 0) else 0)
    if not config.uncond:
        hidden = setting(config, "control_hidden", 2048)
        mouse = _FEATURES + hidden * (_FEATURES + 1) + d * (hidden + 1)
        count += mouse + hidden * (config.n_buttons + 1) + d * (hidden + 1)
    return count


def require_room(config: Any) -> None:
    """Compare the weights in fp32, their objects and the rotary table with the memory that this process may have.

    Raises:
        ConfigError: they are larger; one line with the sizes.
    """
    room = env.memory_bytes()
    height, width = latent_grid(config)
    angles = config.n_frames * height * width * (config.d_model // config.n_heads // 2)
    parameters = count_parameters(config)
    needed = 4 * parameters + config.n_layers * _LAYER_OBJECTS_BYTES + angles * _ANGLE_BYTES
    if room is not None and needed > room:
        raise ConfigError(
            f"model: {parameters:.3g} weights in fp32 and {angles:.3g} rotary angles take {needed / 2**30:,.3g} GiB, "
            f"and this process may have {room / 2**30:.3g} GiB; lower d_model, n_layers, control_hidden, channels or "
            "n_frames",
            key="model",
        )
