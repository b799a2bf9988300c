"""From a data set to batches whose position can be written down and found again.

Why: a run that was killed must see the batches it would have seen. The order of samples is a function of (seed, epoch).
The position is the number of samples of that order which all ranks together have received; samples that workers fetched
ahead do not count. Ranks share out the rest of the order, so a run may go on with another batch size or on another
number of ranks, and still reads every sample of the epoch once. Our errors leave a worker as values: torch would raise
a text of tracebacks in their place, without path and index.

Usage:
    loader = ResumableLoader(dataset, batch_size=4, collate_fn=stack, seed=0, rank=0, world_size=1)
    for batch in loader: ...                 # one epoch; the next `for` is the next epoch
    loader.load_state_dict(state)            # continue after the batch that `state_dict()` saw last
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from owl_wms.data.workers import keep_reading
from owl_wms.errors import ConfigError, DataError, OwlError

_log = logging.getLogger(__name__)
BATCH_KEY = "train.batch_size"
WORKERS = 2  # upstream's number: reading memory-mapped arrays is light
Batch = tuple[Tensor, ...]


def positive(value: Any, name: str) -> int:
    """`value`, when it is a whole number above 0.

    Args:
        name: key of `data_kwargs` it belongs to.

    Raises:
        ConfigError: anything else.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{name} must be a whole number and at least 1, got {value!r} ({type(value).__name__})", key=name
        )
    return value


class ErrorsAsItems(Dataset[Any]):
    """Returns the errors of a data set (`OwlError`) as samples; `raise_errors` raises them outside of the worker."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except OwlError as error:
            return error


class ErrorsAsStreamItems(IterableDataset[Any]):
    """Does the same for a stream, whose last sample is then its error."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except OwlError as error:
            yield error


class ErrorsAsBatches:
    """Collates samples; the first error among them, or of collating, takes the place of the batch."""

    def __init__(self, collate_fn: Callable[[list[Any]], Batch]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Batch | OwlError:
        for sample in samples:
            if isinstance(sample, OwlError):
                return sample
        try:
            return self.collate_fn(samples)
        except OwlError as error:
            return error


def raise_errors(loader: DataLoader[Any]) -> Iterator[Batch]:
    """Yields the batches of a loader; raises the first that is an error, with its path and index."""
    with torch.device("cpu"):  # it draws its workers' seed on the default device, from a generator of the CPU
        batches: Iterable[Batch | OwlError] = iter(loader)
    for batch in batches:
        if isinstance(batch, OwlError):
            raise batch
        yield batch


def collate(samples: Sequence[Sequence[Tensor]], columns: Sequence[str]) -> Batch:
    """Stack samples: float32 becomes bfloat16, `buttons` becomes bfloat16 whatever it was, other dtypes stay.

    Args:
        samples: one tuple of tensors per sample, in the order of `columns`.
        columns: names; a trailing `doc_id` is stacked as it is.

    Returns:
        One tensor [b, ...] per column.

    Raises:
        DataError: samples of different shapes; names the column.
    """
    batch = []
    for name, parts in zip(columns, zip(*samples, strict=True), strict=True):
        stacked = stack(parts, name)
        batch.append(stacked.bfloat16() if stacked.dtype == torch.float32 or name == "buttons" else stacked)
    return tuple(batch)


def stack(parts: Sequence[Tensor], name: str) -> Tensor:
    """Samples of one shape as one tensor [b, ...]; DataError naming `name` when their shapes differ."""
    shapes = {tuple(part.shape) for part in parts}
    if len(shapes) > 1:
        raise DataError(f"samples of {name!r} differ in shape: {', '.join(map(str, sorted(shapes)))}")
    return torch.stack(tuple(parts))


class _EpochOrder(Sampler[list[Any]]):
    """Yields batches of indices for one rank in one epoch, after the first `skip` samples of its order."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int, tag_epoch: bool) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size, self.tag_epoch = rank, world_size, tag_epoch
        self.epoch = 0
        self.skip = 0

    def batches(self, skip: int = 0) -> int:
        """Return how many batches each rank reads after `skip` samples."""
        return (self.count - skip) // self.world_size // self.batch_size

    def __len__(self) -> int:
        return self.batches(self.skip)

    def __iter__(self) -> Iterator[list[Any]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator, device="cpu")[self.skip :]
        mine = order[self.rank :: self.world_size].tolist()
        epoch = self.epoch
        for batch in range(self.batches(self.skip)):
            picked = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in picked] if self.tag_epoch else picked


class ResumableLoader:
    """Epochs of batches over a map-style data set; the last incomplete batch of an epoch is dropped."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Batch],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = WORKERS,
        tag_epoch: bool = False,
        batch_key: str = BATCH_KEY,
    ) -> None:
        """Wrap `dataset`.

        Args:
            dataset: map-style, indexed by int, or by (epoch, int) with `tag_epoch`.
            batch_size: samples in a batch, at least 1.
            collate_fn: list of samples -> tuple of tensors.
            seed: of the order.
            rank: this process among `world_size`.
            world_size: processes that share an epoch.
            num_workers: reading processes; 0 reads in this one.
            tag_epoch: whether the data set wants the epoch in its index.
            batch_key: the configuration's key that `batch_size` comes from, for messages.

        Raises:
            DataError: fewer samples than one batch on each rank.
        """
        self.dataset = dataset
        count = len(dataset)  # type: ignore[arg-type]
        self._order = _EpochOrder(count, batch_size, seed, rank, world_size, tag_epoch)
        if self._order.batches() < 1:
            where = f" on each of {world_size} ranks" if world_size > 1 else ""
            text = f"{count} windows do not fill one batch of {batch_size}{where}: lower {batch_key}, or add data"
            raise DataError(text)
        self._loader = DataLoader(
            ErrorsAsItems(dataset),
            batch_sampler=self._order,
            collate_fn=ErrorsAsBatches(collate_fn),
            num_workers=num_workers,
            worker_init_fn=keep_reading,
            persistent_workers=num_workers > 0,
            prefetch_factor=2 if num_workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            # Of its own: starting an epoch would otherwise draw from the generator that training noise comes from,
            # and a resumed run starts an epoch where the whole run did not.
            generator=torch.Generator().manual_seed(seed),
        )
        self._epoch = 0
        self._samples = 0  # of the epoch's order, received by all ranks together

    def __len__(self) -> int:
        """Returns the batches in a whole epoch."""
        return self._order.batches()

    def __iter__(self) -> Iterator[Batch]:
        self._order.epoch, self._order.skip = self._epoch, self._samples
        for batch in raise_errors(self._loader):
            self._samples += self._order.batch_size * self._order.world_size
            yield batch
        self._epoch, self._samples = self._epoch + 1, 0

    @property
    def epoch(self) -> int:
        """Epochs read to the end."""
        return self._epoch + (self._order.batches(self._samples) < 1)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, the samples of it that all ranks have received, and what gives its order."""
        order = self._order
        return {"epoch": self._epoch, "samples": self._samples, "count": order.count, "seed": order.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there at the next `for`; an epoch whose order is another by now begins anew, with a warning.

        Also takes positions of earlier versions, which counted batches of the present size.

        Raises:
            KeyError: `state` is not such a position.
        """
        order = self._order
        self._epoch = int(state["epoch"])
        if "samples" in state:
            self._samples = int(state["samples"])
        else:
            self._samples = int(state["seen"]) * order.batch_size * order.world_size
        found = {"count": order.count, "seed": order.seed}
        changed = [
            f"{name} {state[name]}, now {value}" for name, value in found.items() if state.get(name, value) != value
        ]
        if changed and self._samples:
            _log.warning(
                "the order of the data is not the checkpoint's any more (%s): epoch %d is read from its beginning",
                *(", ".join(changed), self._epoch),
            )
            self._samples = 0
