"""`get_loader`: from `data_id` and keyword arguments, as the YAML files give them, to batches.

| data_id | source | batch |
|---|---|---|
| `cod` | `NpyTable`, windows side by side | the columns, [b, W, ...] each |
| `sequence_packing` | `NpyTable`, clips end to end, reordered each epoch | the columns, then doc_id int64 [1, W] |
| `cod_s3` | tars in a bucket | latents float32 [b, W, c, h, w], mouse [b, W, 2], buttons [b, W, 11] |
| `cod_s3_audio` | tars in a bucket | latents, audio [b, W, d], mouse, buttons |
| `cod_s3_mixed` | labelled and unlabelled tars | latents, audio [b, W, d], mouse, buttons, has_controls bool [b] |

Usage:
    loader = get_loader("cod", 4, dataset_path="data/game", window_length=32, batch_columns=["depth_latent", "mouse",
    "buttons"])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from owl_wms import env
from owl_wms.configs.strict import choose
from owl_wms.data.loading import (
    BATCH_KEY,
    WORKERS,
    Batch,
    ErrorsAsBatches,
    ErrorsAsStreamItems,
    ResumableLoader,
    collate,
    raise_errors,
    stack,
)
from owl_wms.data.packing import PackedDataset
from owl_wms.data.s3 import TarBucket
from owl_wms.data.s3_windows import FILE_SHARE_MAX, MixedS3Windows, S3Windows
from owl_wms.data.windows import DEFAULT_COLUMNS, WindowDataset
from owl_wms.data.workers import keep_reading
from owl_wms.errors import ConfigError

_S3_BUCKET = "cod-data-latent-360x640to5x8"


# What some keywords may be; the data sets check the others.
_KINDS: dict[str, tuple[type, ...]] = {
    **{name: (str,) for name in ("bucket_name", "prefix", "labelled_prefix", "unlabelled_prefix")},
    "dataset_path": (str, Path),
    "batch_columns": (Sequence,),
    "unlabelled_frac": (int, float),
    "include_truncated": (int,),  # a flag, or 0 and 1
    "num_workers": (int,),
    "seed": (int,),
}
MOST_SEED = 1 << 32


class Loader(Protocol):
    """Names what trainers use of a loader: epochs of batches, and a position that can be stored."""

    @property
    def epoch(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


class StreamLoader:
    """Yields batches of an endless random stream; its position is a count, which seeds a resumed run afresh.

    A stream over a network cannot be rewound cheaply, so a resumed run sees other samples than the killed one would
    have.
    """

    def __init__(self, make_dataset: Callable[[int], IterableDataset[Any]], batch_size: int, num_workers: int) -> None:
        """Wrap a stream: `make_dataset(salt)` builds it, and a resumed run passes another salt."""
        self._make, self._batch_size, self._workers = make_dataset, batch_size, num_workers
        self._seen = 0

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            ErrorsAsStreamItems(self._make(self._seen)),
            batch_size=self._batch_size,
            num_workers=self._workers,
            worker_init_fn=keep_reading,
            prefetch_factor=2 if self._workers > 0 else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self._seen),
            collate_fn=ErrorsAsBatches(_stack),
        )
        for batch in raise_errors(loader):
            self._seen += 1
            yield batch

    @property
    def epoch(self) -> int:
        """Always 0: a stream has no end to count."""
        return 0

    def state_dict(self) -> dict[str, int]:
        """Returns the batches delivered so far."""
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the count there."""
        self._seen = int(state["seen"])


def get_loader(
    data_id: str,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = WORKERS,
    batch_key: str = BATCH_KEY,
    **kwargs: Any,
) -> Loader:
    """Build the loader named `data_id`.

    Args:
        data_id: one of the table above.
        batch_size: samples in a batch on this rank; 1 for `sequence_packing`, whose masks serve one packed sequence.
        seed: of every random choice, -2^32 to 2^32.
        rank: this process among `world_size`.
        world_size: processes that share the data.
        num_workers: reading processes, 0 for none, at most `env.MOST_PROCESSES`.
        batch_key: the configuration's key that `batch_size` comes from, for messages.
        **kwargs: `data_kwargs` of the configuration: dataset_path, window_length, batch_columns, stride,
            include_truncated for tables; bucket_name, prefix, window_length, file_share_max (and unlabelled_frac,
            labelled_prefix, unlabelled_prefix) for buckets.

    Raises:
        ConfigError: an unknown id or keyword, or a batch size that the id cannot take.
        DataError: data that cannot be read.
    """
    build = choose(_BUILDERS, data_id, "train.data_id")
    if batch_size < 1:
        raise ConfigError(f"{batch_key} must be at least 1, got {batch_size}", key=batch_key)
    share = _Share(batch_size, seed, rank, world_size, num_workers, batch_key)
    try:
        inspect.signature(build).bind(share, **kwargs)
    except TypeError as error:
        allowed = [name for name in inspect.signature(build).parameters if name != "share"]
        raise ConfigError(
            f"data_id {data_id!r}: {error}; it takes {', '.join(allowed)}", key="train.data_kwargs"
        ) from error
    given = {**kwargs, "num_workers": num_workers, "seed": seed}
    odd = next((name for name, value in given.items() if not isinstance(value, _KINDS.get(name, object))), None)
    odd = "num_workers" if odd is None and not 0 <= num_workers <= env.MOST_PROCESSES else odd
    odd = "seed" if odd is None and not -MOST_SEED <= seed <= MOST_SEED else odd
    if odd is not None:
        raise ConfigError(f"data_id {data_id!r}: {odd} cannot be {given[odd]!r:.80}", key=f"train.data_kwargs.{odd}")
    return build(share, **kwargs)


@dataclass(frozen=True, slots=True)
class _Share:
    """The arguments of `get_loader` that every kind of loader takes."""

    batch_size: int
    seed: int
    rank: int
    world_size: int
    num_workers: int
    batch_key: str

    def resumable(self, dataset: Dataset[Any], columns: Sequence[str], *, tag_epoch: bool = False) -> ResumableLoader:
        return ResumableLoader(
            dataset,
            self.batch_size,
            collate_fn=partial(collate, columns=tuple(columns)),
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            num_workers=self.num_workers,
            tag_epoch=tag_epoch,
            batch_key=self.batch_key,
        )


def _windows(
    share: _Share,
    *,
    dataset_path: Path | str,
    window_length: int,
    batch_columns: Sequence[str] = DEFAULT_COLUMNS,
    stride: int | None = None,
    include_truncated: bool = True,
) -> Loader:
    dataset = WindowDataset(
        dataset_path, window_length, batch_columns, stride=stride, include_truncated=include_truncated
    )
    return share.resumable(dataset, batch_columns)


def _packed(
    share: _Share,
    *,
    dataset_path: Path | str,
    window_length: int,
    batch_columns: Sequence[str] = DEFAULT_COLUMNS,
    include_truncated: bool = True,
) -> Loader:
    if share.batch_size != 1:
        raise ConfigError(
            f"sequence_packing has one window per batch: {share.batch_key} must be 1 per rank, got {share.batch_size}",
            key=share.batch_key,
        )
    dataset = PackedDataset(
        dataset_path, window_length, batch_columns, seed=share.seed, include_truncated=include_truncated
    )
    return share.resumable(dataset, (*batch_columns, "doc_id"), tag_epoch=True)


def _s3(
    share: _Share,
    *,
    window_length: int,
    bucket_name: str = _S3_BUCKET,
    prefix: str = "",
    file_share_max: int = FILE_SHARE_MAX,
    members: tuple[str, ...],
) -> Loader:
    def make(salt: int) -> S3Windows:
        return S3Windows(
            TarBucket(bucket_name, prefix),
            window_length,
            members,
            seed=share.seed + salt,
            rank=share.rank,
            file_share_max=file_share_max,
        )

    return StreamLoader(make, share.batch_size, share.num_workers)


def _s3_mixed(
    share: _Share,
    *,
    window_length: int,
    bucket_name: str = _S3_BUCKET,
    labelled_prefix: str = "labelled",
    unlabelled_prefix: str = "unlabelled",
    unlabelled_frac: float = 0.5,
    file_share_max: int = FILE_SHARE_MAX,
) -> Loader:
    def make(salt: int) -> MixedS3Windows:
        def stream(prefix: str, members: tuple[str, ...]) -> S3Windows:
            bucket = TarBucket(bucket_name, prefix)
            return S3Windows(
                bucket, window_length, members, seed=share.seed + salt, rank=share.rank, file_share_max=file_share_max
            )

        labelled = stream(labelled_prefix, ("latent", "audiolatent", "mouse", "buttons"))
        return MixedS3Windows(labelled, stream(unlabelled_prefix, ("latent", "audiolatent")), unlabelled_frac)

    return StreamLoader(make, share.batch_size, share.num_workers)


def _stack(samples: Sequence[Sequence[Tensor]]) -> Batch:
    return tuple(stack(parts, f"part {index}") for index, parts in enumerate(zip(*samples, strict=True)))


_BUILDERS: dict[str, Callable[..., Loader]] = {
    "cod": _windows,
    "sequence_packing": _packed,
    "cod_s3": partial(_s3, members=("latent", "mouse", "buttons")),
    "cod_s3_audio": partial(_s3, members=("latent", "audiolatent", "mouse", "buttons")),
    "cod_s3_mixed": _s3_mixed,
}
DATA_IDS = tuple(_BUILDERS)
