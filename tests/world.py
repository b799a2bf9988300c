"""Small world models that many tests share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from owl_wms.models import get_model_cls

GOLDEN = Path(__file__).parent / "data" / "gamerft_core.pt"


def golden() -> dict[str, Any]:
    """Weights, inputs and outputs of upstream's own model."""
    return torch.load(GOLDEN, weights_only=True)["motion"]


def tiny_config(**changes: Any) -> SimpleNamespace:
    """A model of a few thousand parameters besides the fixed-width control embedding."""
    values = {
        "model_id": "game_rft",
        "sample_size": 2,
        "channels": 4,
        "audio_channels": 3,
        "n_layers": 5,
        "n_heads": 2,
        "d_model": 64,
        "tokens_per_frame": 4,
        "n_buttons": 11,
        "control_hidden": 32,
        "cfg_prob": 0.1,
        "n_frames": 40,
        "causal": True,
        "uncond": False,
        "backbone": "dit",
        "has_audio": False,
        "rope_impl": "motion",
        "local_window": 3,
        "global_window": None,
    }
    if changes.get("model_id") == "game_rft_audio":
        values |= {"tokens_per_frame": 5, "has_audio": True}
    return SimpleNamespace(**(values | changes))


def tiny_core(seed: int = 0, **changes: Any) -> Any:
    """A core whose every weight matters: default initialisation leaves branches so quiet that errors would hide."""
    config = tiny_config(**changes)
    core = get_model_cls(config.model_id)(config).core.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in core.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return core


def inputs(
    batch: int, frames: int, channels: int = 4, side: int = 2, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [b, n, c, h, w], noise levels [b, n], mouse [b, n, 2], buttons [b, n, 11]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, channels, side, side, generator=generator)
    t = torch.rand(batch, frames, generator=generator)
    mouse = torch.randn(batch, frames, 2, generator=generator)
    buttons = (torch.rand(batch, frames, 11, generator=generator) > 0.5).float()
    return x, t, mouse, buttons


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value wanted."""
    return float((got - wanted).abs().max() / wanted.abs().max())
