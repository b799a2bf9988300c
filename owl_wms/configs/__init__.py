"""Typed, strict, frozen configurations from upstream's YAML files; this package knows nothing of torch.

Usage:
    vae = load_vae_config("configs/vae/base.yml").model
    train = load_world_config("configs/dit_v4.yml").train
"""

from owl_wms.configs.vae import (
    HUB_VAE_ID,
    TAEHV_VAE_ID,
    AudioAEConfig,
    DCAEConfig,
    DistillVAEConfig,
    TAEHVConfig,
    VAEConfig,
    VAEModelConfig,
    VAETrainConfig,
    WandbConfig,
    load_vae_config,
    load_vae_model,
    parse_vae_model,
    pictures_of,
)
from owl_wms.configs.world import (
    TRAINER_REQUIRED,
    TrainingConfig,
    WorldConfig,
    WorldModelConfig,
    load_world_config,
    load_world_model,
    missing_trainer_keys,
    require_trainer_keys,
)

__all__ = [
    "AudioAEConfig",
    "DCAEConfig",
    "DistillVAEConfig",
    "HUB_VAE_ID",
    "TAEHVConfig",
    "TAEHV_VAE_ID",
    "TRAINER_REQUIRED",
    "TrainingConfig",
    "VAEConfig",
    "VAEModelConfig",
    "VAETrainConfig",
    "WandbConfig",
    "WorldConfig",
    "WorldModelConfig",
    "load_vae_config",
    "load_vae_model",
    "load_world_config",
    "load_world_model",
    "missing_trainer_keys",
    "parse_vae_model",
    "pictures_of",
    "require_trainer_keys",
]
