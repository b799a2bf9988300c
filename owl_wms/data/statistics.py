"""Counts and moments of a table: what a person wants to know before training on it.

Usage:
    found = describe_table(NpyTable("data/game"))
    found.mean, found.std, found.vae_scale
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from owl_wms.data.npy_table import LATENT_COLUMN, NpyTable, Row
from owl_wms.errors import DataError
from owl_wms.files import one_line

SAMPLED_FRAMES = 20_000
"""Most frames that are read for the moments; of a longer table an equal share of every clip."""


@dataclass(frozen=True, kw_only=True)
class TableStatistics:
    """Moments of a table's columns.

    Attributes:
        clips, frames: counts of the whole table.
        sampled: frames that the moments are of.
        rates: the frame rates of its rows.
        mean, std: of each latent channel, float64 [c]; empty without latents.
        vae_scale: standard deviation of all latents about their common mean, to 3 digits: divided by it they have
            standard deviation 1, as the trainers' noise has. None without latents, or if all are equal.
        pressed: share of the frames in which each button is held, [k]; empty without buttons.
        mouse: standard deviation of each mouse axis, [2]; empty without a mouse.
    """

    clips: int
    frames: int
    sampled: int
    rates: tuple[float, ...]
    mean: np.ndarray
    std: np.ndarray
    vae_scale: float | None
    pressed: np.ndarray
    mouse: np.ndarray


class _Moments:
    """Sums of values and squares per channel, in float64, about the first frame's mean (so that they do not cancel)."""

    def __init__(self) -> None:
        self.count = 0
        self.about: np.ndarray = np.zeros(0)
        self.sum: np.ndarray = np.zeros(0)
        self.squares: np.ndarray = np.zeros(0)

    def add(self, frames: np.ndarray) -> None:
        """Add [n, c, ...]."""
        values = frames.astype(np.float64).reshape(len(frames), frames.shape[1], -1)
        if not self.count:
            self.about = values[0].mean(axis=1)
            self.sum = self.squares = np.zeros_like(self.about)
        values -= self.about[:, None]
        self.count += values.shape[0] * values.shape[2]
        self.sum = self.sum + values.sum(axis=(0, 2))
        self.squares = self.squares + np.square(values).sum(axis=(0, 2))

    def mean(self) -> np.ndarray:
        """Return the mean of each channel."""
        return self.about + self.sum / max(self.count, 1)

    def variance(self) -> np.ndarray:
        """Return the variance of each channel."""
        return np.maximum(self.squares / max(self.count, 1) - np.square(self.sum / max(self.count, 1)), 0)


def describe_table(
    table: NpyTable, *, limit: int = SAMPLED_FRAMES, progress: Callable[[int, int], None] | None = None
) -> TableStatistics:
    """Read frames of every clip and return the table's counts and moments.

    Args:
        table: any table; columns are known by their names.
        limit: most frames to read.
        progress: called with (clips done, clips in all).

    Raises:
        DataError: an array that cannot be read, a value that is not finite, or a frame rate that is none.
    """
    frames = sum(row.length for row in table.rows)
    rates = sorted({rate for row in table.rows if (rate := stated_rate(table, row)) is not None})
    moments = {name: _Moments() for name in (LATENT_COLUMN, "buttons", "mouse") if name in table.columns}
    sampled = 0
    for index, row in enumerate(table.rows):
        share = min(row.length, max(1, round(row.length * min(1.0, limit / max(frames, 1)))))
        start = (row.length - share) // 2
        for name, found in moments.items():
            found.add(table.slice(index, name, start, start + share))
        sampled += share
        if progress is not None:
            progress(index + 1, len(table.rows))
    empty = np.zeros(0)
    latents = moments.get(LATENT_COLUMN)
    mean = latents.mean() if latents is not None and latents.count else empty
    variance = latents.variance() if latents is not None and latents.count else empty
    overall = math.sqrt(float((variance + np.square(mean - mean.mean())).mean())) if len(mean) else 0.0
    return TableStatistics(
        clips=len(table.rows),
        frames=frames,
        sampled=sampled,
        rates=tuple(rates),
        mean=mean,
        std=np.sqrt(variance),
        vae_scale=float(f"{overall:.3g}") if overall > 0 else None,
        pressed=moments["buttons"].mean() if "buttons" in moments and table.rows else empty,
        mouse=np.sqrt(moments["mouse"].variance()) if "mouse" in moments and table.rows else empty,
    )


def stated_rate(table: NpyTable, row: Row) -> float | None:
    """Return the frames per second that a row states; None where it states none.

    Raises:
        DataError: it states something else, a text for example.
    """
    rate = row.fields.get("fps")
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        file = table.path / "manifest.json"
        text = f"'fps' of row {row.index} must be a number above 0, got {one_line(repr(rate), 80)}"
        raise DataError(f"{file}: {text}", path=file, index=row.index)
    return float(rate)
