"""Small decoders for the op tests: every shape of stage that ships, at widths a CPU finishes in milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from owl_wms.configs.vae import DCAEConfig, DistillVAEConfig
from owl_wms.vae.dcae import DCAEDecoder
from owl_wms.vae.distill import DistillDecoder
from owl_wms.vae.fold import fold_weight_norm


def excite(decoder: nn.Module) -> nn.Module:
    """Random biases and larger back-projections, so that no term of the function is too small to be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "conv3" in name:
                parameter.mul_(3)
    return decoder


def dcae(
    variant: str = "tiled",
    *,
    ch_0: int = 16,
    ch_max: int = 64,
    stages: tuple[int, ...] = (1, 2, 1),
    channels: int = 3,
    size: int | tuple[int, int] = (18, 32),
    latent: int = 16,
    **extra: object,
) -> nn.Module:
    """A folded fp32 DCAE decoder in eval mode."""
    config = DCAEConfig(
        model_id="dcae",
        sample_size=size,
        channels=channels,
        latent_channels=latent,
        ch_0=ch_0,
        ch_max=ch_max,
        encoder_blocks_per_stage=stages,
        decoder_blocks_per_stage=stages,
        **{"use_middle_block": False, **extra},
    )
    return fold_weight_norm(excite(DCAEDecoder(config, variant).eval()))


def distill(*, ch_0: int = 16, size: int | tuple[int, int] = (72, 128), latent: int = 16) -> nn.Module:
    """A folded fp32 distilled decoder in eval mode."""
    config = DistillVAEConfig(
        model_id="distill_vae",
        sample_size=size,
        channels=3,
        latent_channels=latent,
        ch_0=ch_0,
        ch_max=16 * ch_0,
        encoder_blocks_per_stage=(1,) * 5,
        decoder_blocks_per_stage=(1,) * 5,
    )
    return fold_weight_norm(excite(DistillDecoder(config).eval()))
