"""The width plan of the autoencoders, and the rules a configuration must meet before anything is built.

Why it exists: a width that does not divide fails deep inside a convolution, with an error that names no config key.
These checks run first and name the key, the value and the rule.

Usage:
    stage_widths(96, 1536, 6)     # [96, 192, 384, 768, 1536, 1536, 1536]
"""

from __future__ import annotations

from owl_wms.configs.vae import AudioAEConfig, DCAEConfig, DistillVAEConfig
from owl_wms.errors import ConfigError
from owl_wms.vae.blocks import GROUP_CHANNELS


def stage_widths(ch_0: int, ch_max: int, stages: int) -> list[int]:
    """`stages + 1` widths from shallow to deep: `ch_0` doubled at each stage, never above `ch_max`."""
    widths = [ch_0]
    for _ in range(stages):
        widths.append(min(2 * widths[-1], ch_max))
    return widths


def require(rule: bool, message: str, key: str) -> None:
    """Raise ConfigError(message) naming `model.<key>` unless `rule` holds."""
    if not rule:
        raise ConfigError(f"model.{key}: {message}", key=f"model.{key}")


def check_groups(widths: list[int], key: str) -> None:
    """Residual blocks double their width and group by 16, so each width must be a multiple of 8."""
    for width in widths:
        require(
            2 * width % GROUP_CHANNELS == 0,
            f"a residual block of width {width} has {2 * width} hidden channels, no multiple of {GROUP_CHANNELS}; "
            f"use widths that are multiples of {GROUP_CHANNELS // 2}",
            key,
        )


def check_dcae(config: DCAEConfig, widths: list[int], depths: tuple[int, ...], depths_key: str, variant: str) -> None:
    """All rules of the DCAE family.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    require(
        variant in ("tiled", "learned"), f'the variant must be "tiled" or "learned", received {variant!r}', "model_id"
    )
    require(len(depths) > 0, "needs at least one stage, received an empty list", depths_key)
    require(config.ch_0 <= config.ch_max, f"must be at most ch_max ({config.ch_max}), received {config.ch_0}", "ch_0")
    require(
        widths[-1] == config.ch_max,
        f"{config.ch_max} is never reached: {len(depths)} stages from ch_0 {config.ch_0} give widths {widths}; "
        f"use {widths[-1]} or more stages",
        "ch_max",
    )
    if variant == "tiled":
        ratio = config.ch_max // config.ch_0
        require(
            config.ch_0 * ratio == config.ch_max and ratio & (ratio - 1) == 0,
            f"must be ch_0 ({config.ch_0}) times a power of two, because shortcuts tile whole channel blocks; "
            f"received {config.ch_max}",
            "ch_max",
        )
    # Without shortcuts nothing repeats or averages whole groups of latent channels.
    require(
        (variant == "learned" and config.skip_residuals) or config.ch_max % config.latent_channels == 0,
        f"must be a multiple of latent_channels ({config.latent_channels}), received {config.ch_max}",
        "ch_max",
    )
    check_groups(widths, "ch_0")
    for name in ("skip_residuals", "normalize_mu", "do_channel_mask"):
        require(
            variant == "learned" or not getattr(config, name),
            "belongs to the later revision (learned shortcuts) and has no meaning for the tiled variant; remove it",
            name,
        )
    require(
        not config.do_channel_mask or config.latent_channels >= 32,
        f"keeps at least 32 latent channels, but latent_channels is {config.latent_channels}",
        "do_channel_mask",
    )


def check_distill(config: DistillVAEConfig) -> None:
    """Rules of the distilled autoencoder.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    require(
        config.ch_max == 16 * config.ch_0,
        f"must be 16 * ch_0 = {16 * config.ch_0}, because the topology is fixed; received {config.ch_max}",
        "ch_max",
    )
    check_groups([config.ch_0], "ch_0")


def check_audio(config: AudioAEConfig, widths: list[int]) -> None:
    """Rules of the audio autoencoder.

    Raises:
        ConfigError: naming the first key that breaks a rule.
    """
    require(len(config.strides) > 0, "needs at least one stride, received an empty list", "strides")
    require(
        widths[-1] == config.ch_max,
        f"{config.ch_max} is never reached: {len(config.strides)} strides from ch_0 {config.ch_0} give widths {widths}",
        "ch_max",
    )
    check_groups(widths, "ch_0")
