"""Cuts windows of fixed length out of a table of clips (`data_id: cod`).

Usage:
    dataset = WindowDataset("data/game", window_length=32, batch_columns=("depth_latent", "mouse", "buttons"))
    latents, mouse, buttons = dataset[0]        # [32, c, h, w], [32, 2], [32, 11]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from owl_wms.data.loading import positive
from owl_wms.data.npy_table import NpyTable
from owl_wms.errors import DataError

DEFAULT_COLUMNS = ("video", "mouse", "buttons")


class WindowDataset(Dataset[tuple[Tensor, ...]]):
    """Gives windows of every clip of at least `window_length` frames, `stride` apart (side by side by default)."""

    def __init__(
        self,
        dataset_path: Path | str,
        window_length: int,
        batch_columns: Sequence[str] = DEFAULT_COLUMNS,
        *,
        stride: int | None = None,
        include_truncated: bool = True,
    ) -> None:
        """Index the windows.

        Args:
            dataset_path: folder of an `NpyTable`.
            window_length: frames in a window, at least 1.
            batch_columns: array columns of a sample, in order.
            stride: frames between the starts of neighbouring windows; `window_length` when None.
            include_truncated: whether clips that were cut short count.

        Raises:
            ConfigError: window_length or stride that is no whole number above 0.
            DataError: a table that cannot be read or holds no window.
        """
        self.window_length = positive(window_length, "window_length")
        step = self.window_length if stride is None else positive(stride, "stride")
        self.columns = tuple(batch_columns)
        self.table = NpyTable(dataset_path, self.columns, keep_truncated=include_truncated)
        self.windows = [
            (row, start)
            for row, entry in enumerate(self.table.rows)
            for start in range(0, entry.length - self.window_length + 1, step)
        ]
        if not self.windows:
            longest = max((entry.length for entry in self.table.rows), default=0)
            raise DataError(
                f"{dataset_path}: none of {len(self.table.rows)} clips has {window_length} frames "
                f"(the longest has {longest}); shorten window_length or add longer clips",
                path=dataset_path,
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        row, start = self.windows[index]
        stop = start + self.window_length
        return tuple(torch.from_numpy(self.table.slice(row, column, start, stop)) for column in self.columns)
