"""Small configurations and comparisons that the autoencoder tests share; usage: `small_dcae(channels=4)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.configs import DCAEConfig, parse_vae_model

ROOT = Path(__file__).parents[2]
VAE_CONFIGS = ROOT / "configs" / "vae"
DATA = ROOT / "tests" / "data"

SMALL: dict[str, Any] = {
    "model_id": "dcae",
    "sample_size": [64, 64],
    "channels": 3,
    "latent_channels": 8,
    "ch_0": 16,
    "ch_max": 64,
    "encoder_blocks_per_stage": [2, 1, 1],
    "decoder_blocks_per_stage": [2, 1, 1],
}


def small_dcae(**changes: Any) -> DCAEConfig:
    """A three-stage dcae section, 8 latent channels, with `changes` applied."""
    cfg = parse_vae_model({**SMALL, **changes})
    assert isinstance(cfg, DCAEConfig)
    return cfg


def small_distill(**changes: Any) -> Any:
    """A narrow distill_vae section."""
    return parse_vae_model({**SMALL, "model_id": "distill_vae", "ch_0": 8, "ch_max": 128, **changes})


def small_audio(**changes: Any) -> Any:
    """A narrow audio_ae section: 6 samples a latent."""
    base = {"model_id": "audio_ae", "latent_channels": 4, "ch_0": 8, "ch_max": 16, "strides": [3, 2]}
    return parse_vae_model({**base, **changes})


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest magnitude wanted."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return ((got - want).abs().max() / want.abs().max()).item()


def effective(module: nn.Module) -> dict[str, Tensor]:
    """Plain weights by dotted name, `g * v / ||v||` written out in float64, apart from the code under test."""
    state = module.state_dict()
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("original0"):
            direction = state[key[:-1] + "1"].double()
            norm = direction.flatten(1).norm(dim=1).reshape(value.shape)
            out[key.replace("parametrizations.weight.original0", "weight")] = (
                value.double() * direction / norm
            ).float()
        elif not key.endswith("original1"):
            out[key] = value
    return out


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, biases and gains too, so that no term is zero by luck; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("original0") else 0.3 * noise)
    return module.eval()
