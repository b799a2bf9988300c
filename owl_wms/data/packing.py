"""Lays clips end to end and cuts them into windows, each frame tagged with its clip (`data_id: sequence_packing`).

Why: long windows would otherwise waste every clip shorter than the window. The order of the clips is drawn anew for
each epoch; the epoch travels inside the sample's index, because worker processes hold copies of the data set that a
`set_epoch` call in the main process never reaches.

Usage:
    dataset = PackedDataset("data/game", window_length=1536, batch_columns=("depth_latent", "mouse", "buttons"))
    *columns, doc_id = dataset[(3, 0)]     # first window of epoch 3; doc_id int64 [1536]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from owl_wms.data.loading import positive
from owl_wms.data.npy_table import NpyTable
from owl_wms.data.windows import DEFAULT_COLUMNS
from owl_wms.errors import DataError


class PackedDataset(Dataset[tuple[Tensor, ...]]):
    """Gives windows over a stream of all clips; the stream's tail, another one each epoch, is dropped."""

    def __init__(
        self,
        dataset_path: Path | str,
        window_length: int,
        batch_columns: Sequence[str] = DEFAULT_COLUMNS,
        *,
        seed: int = 0,
        include_truncated: bool = True,
    ) -> None:
        """Read the table.

        Args:
            dataset_path: folder of an `NpyTable`.
            window_length: frames in a window, at least 1.
            batch_columns: array columns of a sample, in order.
            seed: of the orders; epoch e uses (seed, e).
            include_truncated: whether clips that were cut short count.

        Raises:
            ConfigError: window_length that is no whole number above 0.
            DataError: a table that cannot be read, or fewer frames in all than one window.
        """
        self.window_length = positive(window_length, "window_length")
        self.columns = tuple(batch_columns)
        self.seed = seed
        self.table = NpyTable(dataset_path, self.columns, keep_truncated=include_truncated)
        self.frames = sum(entry.length for entry in self.table.rows)
        if self.frames < window_length:
            raise DataError(
                f"{dataset_path}: {self.frames} frames in all are fewer than one window of {window_length}; "
                "shorten window_length or add clips",
                path=dataset_path,
            )
        self._layout = lru_cache(maxsize=2)(self._make_layout)

    def __len__(self) -> int:
        return self.frames // self.window_length

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, ...]:
        """Window `index[1]` of epoch `index[0]`: the columns, then `doc_id` int64 [window_length]."""
        epoch, window = index
        order, ends = self._layout(epoch)
        at, stop = window * self.window_length, (window + 1) * self.window_length
        pieces: dict[str, list[np.ndarray]] = {column: [] for column in self.columns}
        docs = []
        while at < stop:
            place = int(np.searchsorted(ends, at, side="right"))
            row = int(order[place])
            offset = at - (int(ends[place]) - self.table.rows[row].length)
            take = min(stop, int(ends[place])) - at
            for column in self.columns:
                pieces[column].append(self.table.slice(row, column, offset, offset + take))
            docs.append(torch.full((take,), self.table.rows[row].index, dtype=torch.int64, device="cpu"))
            at += take
        return (*(torch.from_numpy(np.concatenate(pieces[column])) for column in self.columns), torch.cat(docs))

    def _make_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row order of an epoch, and where each of its clips ends in the stream."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.table.rows))
        return order, np.cumsum([self.table.rows[row].length for row in order])

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_layout"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._layout = lru_cache(maxsize=2)(self._make_layout)
