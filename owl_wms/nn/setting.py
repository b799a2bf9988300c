"""Reads settings from any object that holds a model's configuration."""

from __future__ import annotations

from typing import Any


def setting(config: Any, name: str, default: Any) -> Any:
    """`config.name`; absent and None both mean the default, as in the YAML files."""
    value = getattr(config, name, None)
    return default if value is None else value


def latent_grid(config: Any) -> tuple[int, int]:
    """Returns height and width of a model's latents; `config.sample_size` is both, or the side of a square."""
    size = config.sample_size
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
