"""From a model section to a module: which class builds which `model_id`, and only the half that is asked for.

Why it exists: upstream builds the whole autoencoder (484M parameters for `base`) and deletes the encoder; decoding
needs the decoder alone.

Usage:
    decoder = build_decoder(cfg.model)                       # tiled variant
    decoder = build_decoder(cfg.model, variant="learned")    # the later revision's layout
    with torch.device("meta"):
        shapes_only = build_decoder(cfg.model)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from owl_wms.configs.vae import AudioAEConfig, DCAEConfig, DistillVAEConfig, VAEModelConfig
from owl_wms.errors import ConfigError
from owl_wms.vae.audio import AudioDecoder
from owl_wms.vae.blocks import set_gradient_checkpointing
from owl_wms.vae.dcae import DCAE, DCAEDecoder, DCAEEncoder, Variant
from owl_wms.vae.distill import DistillDecoder, DistillEncoder, DistillVAE


def default_variant(cfg: DCAEConfig) -> Variant:
    """The variant when nothing else tells: "learned" if a key of the later revision is on, else "tiled"."""
    return "learned" if cfg.skip_residuals or cfg.normalize_mu or cfg.do_channel_mask else "tiled"


def build_decoder(
    cfg: VAEModelConfig, variant: Variant | None = None, *, gradient_checkpointing: bool = False
) -> nn.Module:
    """Decoder with fresh weights, `z [B, c, h, w] -> x [B, C, H, W]` (audio: `[B, c, n] -> [B, C, samples]`).

    Args:
        cfg: a model section, from `load_vae_config(path).model` or constructed in code.
        variant: "tiled" or "learned"; for `dcae` only. None asks the config (`default_variant`).
        gradient_checkpointing: recompute residual branches in the backward pass; for training only.

    Raises:
        ConfigError: widths, depths or variant that do not fit together.
    """
    decoder = _build(cfg, variant, DCAEDecoder, DistillDecoder, AudioDecoder)
    set_gradient_checkpointing(decoder, gradient_checkpointing)
    return decoder


def build_encoder(
    cfg: VAEModelConfig, variant: Variant | None = None, *, gradient_checkpointing: bool = False
) -> nn.Module:
    """Encoder with fresh weights, `x [B, C, H, W] -> z [B, c, h, w]`; arguments and errors as for `build_decoder`."""
    encoder = _build(cfg, variant, DCAEEncoder, DistillEncoder, None)
    set_gradient_checkpointing(encoder, gradient_checkpointing)
    return encoder


def build_autoencoder(
    cfg: VAEModelConfig, variant: Variant | None = None, *, gradient_checkpointing: bool = False
) -> nn.Module:
    """Both halves, as `.encoder` and `.decoder`; arguments and errors as for `build_decoder`."""
    model = _build(cfg, variant, DCAE, DistillVAE, None)
    set_gradient_checkpointing(model, gradient_checkpointing)
    return model


def _build(
    cfg: VAEModelConfig,
    variant: Variant | None,
    dcae: Callable[[DCAEConfig, Variant], nn.Module],
    distill: Callable[[DistillVAEConfig], nn.Module],
    audio: Callable[[AudioAEConfig], nn.Module] | None,
) -> nn.Module:
    if isinstance(cfg, DCAEConfig):
        return dcae(cfg, variant or default_variant(cfg))
    if variant not in (None, "tiled"):
        raise ConfigError(
            f"model.model_id: {cfg.model_id} has no {variant!r} variant; only dcae has", key="model.model_id"
        )
    if isinstance(cfg, DistillVAEConfig):
        return distill(cfg)
    if isinstance(cfg, AudioAEConfig):
        if audio is None:
            raise ConfigError(
                "model.model_id: only the decoder of audio_ae is built here, not its encoder", key="model.model_id"
            )
        return audio(cfg)
    raise ConfigError(f"expected a model section of an autoencoder, received {type(cfg).__name__}", key="model")
