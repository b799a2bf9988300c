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

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from owl_wms.configs.vae import AudioAEConfig, DCAEConfig, DistillVAEConfig, TAEHVConfig, VAEModelConfig
from owl_wms.errors import ConfigError
from owl_wms.vae.audio import AudioDecoder
from owl_wms.vae.dcae import DCAE, DCAEDecoder, DCAEEncoder, Variant
from owl_wms.vae.distill import DistillDecoder, DistillEncoder, DistillVAE
from owl_wms.vae.taehv import TAEHVDecoder


def default_variant(cfg: DCAEConfig) -> Variant:
    """The variant when nothing else tells: "learned" if a key of the later revision is on, else "tiled"."""
    return "learned" if cfg.skip_residuals or cfg.normalize_mu or cfg.do_channel_mask else "tiled"


def build_decoder(cfg: VAEModelConfig, variant: Variant | None = None) -> nn.Module:
    """Decoder with fresh weights, `z [B, c, h, w] -> x [B, C, H, W]`.

    Two families have other shapes: audio `[B, c, n] -> [B, C, samples]`, taehv `[b, n, c, h, w]` as in TAEHVDecoder.

    Args:
        cfg: a model section, from `load_vae_model(path)` or constructed in code.
        variant: "tiled" or "learned"; for `dcae` only. None asks the config (`default_variant`).

    Raises:
        ConfigError: widths, depths or variant that do not fit together.
    """
    return _build(cfg, variant, DCAEDecoder, DistillDecoder, {AudioAEConfig: AudioDecoder, TAEHVConfig: TAEHVDecoder})


def build_encoder(cfg: VAEModelConfig, variant: Variant | None = None) -> nn.Module:
    """Encoder with fresh weights, `x [B, C, H, W] -> z [B, c, h, w]`; arguments and errors as for `build_decoder`."""
    return _build(cfg, variant, DCAEEncoder, DistillEncoder, {})


def build_autoencoder(cfg: VAEModelConfig, variant: Variant | None = None) -> nn.Module:
    """Both halves, as `.encoder` and `.decoder`; arguments and errors as for `build_decoder`."""
    return _build(cfg, variant, DCAE, DistillVAE, {})


def _build(
    cfg: VAEModelConfig,
    variant: Variant | None,
    dcae: Callable[[DCAEConfig, Variant], nn.Module],
    distill: Callable[[DistillVAEConfig], nn.Module],
    decoder_only: Mapping[type[VAEModelConfig], Callable[[Any], nn.Module]],
) -> nn.Module:
    if isinstance(cfg, DCAEConfig):
        return dcae(cfg, variant or default_variant(cfg))
    if variant not in (None, "tiled"):
        raise ConfigError(
            f"model.model_id: {cfg.model_id} has no {variant!r} variant; only dcae has", key="model.model_id"
        )
    if isinstance(cfg, DistillVAEConfig):
        return distill(cfg)
    if isinstance(cfg, (AudioAEConfig, TAEHVConfig)):
        if type(cfg) not in decoder_only:
            raise ConfigError(
                f"model.model_id: only the decoder of {cfg.model_id} is built here, not its encoder",
                key="model.model_id",
            )
        return decoder_only[type(cfg)](cfg)
    raise ConfigError(f"expected a model section of an autoencoder, received {type(cfg).__name__}", key="model")
