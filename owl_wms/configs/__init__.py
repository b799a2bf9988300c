"""Typed, strict, frozen configurations from upstream's YAML files; this package knows nothing of torch.

Usage:
    vae = load_vae_config("configs/vae/base.yml").model
"""

from owl_wms.configs.vae import (
    AudioAEConfig,
    DCAEConfig,
    DistillVAEConfig,
    VAEConfig,
    VAEModelConfig,
    VAETrainConfig,
    WandbConfig,
    load_vae_config,
    parse_vae_model,
)

__all__ = [
    "AudioAEConfig",
    "DCAEConfig",
    "DistillVAEConfig",
    "VAEConfig",
    "VAEModelConfig",
    "VAETrainConfig",
    "WandbConfig",
    "load_vae_config",
    "parse_vae_model",
]
