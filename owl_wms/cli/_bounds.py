"""Bounds and names that several commands share, apart from `_shared` since reading options must not import torch."""

from __future__ import annotations

import re

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
        key = option.removeprefix("--").replace("-", "_")
        raise ConfigError(f"{option} must be a number from {low} to {high}, got {value}", key=key)


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
