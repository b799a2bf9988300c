"""Bounds and names that several commands share, apart from `_shared` since reading options must not import torch."""

from __future__ import annotations

import re
from pathlib import Path

from owl_wms.errors import ConfigError

MOST_FRAMES = 1 << 16
"""Frames at once: more than any GPU holds, and far from what torch's integers cannot take."""
FPS = (1, 240)
"""Frames a second that clips and the page in the browser may have."""
SCALES = (1e-6, 1e6)
"""Factors on latents: those of autoencoders in use lie near 1, and beyond this range float16 and bfloat16 lose them."""
GUIDANCE = (-100, 100)
TIMEOUT_SECONDS = (1, 10**6)
SEEDS = (-(2**62), 2**62)
"""Worlds are numbered in int64, counted up from the seed."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Short names of torch's."""


def check_number(option: str, value: float | None, bounds: tuple[float, float]) -> None:
    """Refuse a number outside of its bounds, both included; None, an option left out, is not one.

    Raises:
        ConfigError: too small, too large, infinite, or not a number.
    """
    low, high = bounds
    if value is not None and not low <= value <= high:  # NaN compares false
        raise ConfigError(f"{option} must be a number from {low} to {high}, got {value}", key=_key(option))


def check_together(option: str, value: Path | None, other: str, value_of_other: Path | None) -> None:
    """Refuse one of two options without the other; None is an option left out.

    Raises:
        ConfigError: only one of them is given.
    """
    if (value is None) != (value_of_other is None):
        raise ConfigError(f"{option} and {other} belong together: give both or none", key=_key(option))


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def device_number(name: str) -> int | None:
    """Returns the number of the GPU that is meant, 0 for `cuda`; None for `cpu`.

    Raises:
        ConfigError: a kind that nothing here was written for (mps, xpu), or no device at all.
    """
    form = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name)
    if form is None:
        raise ConfigError(f"--device must be cpu, cuda or cuda:N, got {name!r}", key="device")
    return None if name == "cpu" else int(form[1] or 0)


def check_dtype(name: str) -> None:
    """Refuses what is none of `DTYPES`.

    Raises:
        ConfigError: another name.
    """
    if name not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}", key="dtype")


def unstated_scale(form: str, scale: float) -> str | None:
    """Returns what whoever divides latents by `scale` has to know of files that have no place for it, or None."""
    if form != "npy" or scale == 1:
        return None
    return f".npy cannot state that these latents are divided by {scale:g}: decode with --scale {scale:g}, or write .pt"
