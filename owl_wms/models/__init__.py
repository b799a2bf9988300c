"""World models, found by the `model_id` of their configuration.

Usage:
    model = get_model_cls(config.model_id)(config)
"""

from __future__ import annotations

from typing import Any

from owl_wms.configs.strict import choose
from owl_wms.models.gamerft import GameRFT, GameRFTCore
from owl_wms.models.gamerft_audio import GameRFTAudio, GameRFTAudioCore

MODELS: dict[str, type[GameRFT] | type[GameRFTAudio]] = {"game_rft": GameRFT, "game_rft_audio": GameRFTAudio}

__all__ = ["MODELS", "GameRFT", "GameRFTAudio", "GameRFTAudioCore", "GameRFTCore", "get_model_cls", "make_model"]


def get_model_cls(model_id: str) -> type[GameRFT] | type[GameRFTAudio]:
    """The class that a `model_id` names.

    Raises:
        ConfigError: no such id; the message lists the ids.
    """
    return choose(MODELS, model_id, "model.model_id")


def make_model(config: Any) -> GameRFT | GameRFTAudio:
    """The model of a `model` section, its weights in fp32.

    A class of its own takes the process's default dtype, as torch's modules do. In bf16 an optimiser's small updates
    and an average's would be rounded away.
    """
    return get_model_cls(config.model_id)(config).float()
