"""Endless random windows from tars in a bucket: labelled ones (`cod_s3`), or labelled mixed with unlabelled
(`cod_s3_mixed`). With sound, labelled ones are `cod_s3_audio`.

Each rank and each worker draws from a generator of its own, seeded by (seed, rank, worker), so runs repeat and ranks
differ. One tar is shared by up to `file_share_max` windows per clip, and windows of several tars are mixed in a bounded
pool before they leave.

Usage:
    dataset = S3Windows(TarBucket("bucket"), window_length=16, members=("latent", "mouse", "buttons"), seed=0, rank=0)
    latents, mouse, buttons = next(iter(dataset))
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from owl_wms.data.loading import positive
from owl_wms.data.s3 import SHARDS, SUBDIRS, TARS, BucketError, TarBucket, read_clips, tar_key
from owl_wms.errors import ConfigError, DataError

FILE_SHARE_MAX = 20
POOL_WINDOWS = 1000
LATENT_LIMIT = 8.0  # latents of the mixed set beyond this are encoder accidents, as upstream found
_FAILED_TARS_IN_A_ROW = 8
_BUTTONS, _MOUSE_AXES = 11, 2
_log = logging.getLogger(__name__)


class S3Windows(IterableDataset[tuple[Tensor, ...]]):
    """Yields windows [window_length, ...] of the named members, without end."""

    def __init__(
        self,
        bucket: TarBucket,
        window_length: int,
        members: Sequence[str],
        *,
        seed: int = 0,
        rank: int = 0,
        file_share_max: int = FILE_SHARE_MAX,
        pool_windows: int = POOL_WINDOWS,
    ) -> None:
        """Remember what to draw.

        Args:
            bucket: where tars come from.
            window_length: frames in a window; a clip of exactly this length gives one window.
            members: tensors of a sample, in order.
            seed: of all choices.
            rank: this process.
            file_share_max: most windows taken from one reading of a clip.
            pool_windows: most windows held for mixing.

        Raises:
            ConfigError: window_length, file_share_max or pool_windows that is no whole number above 0.
        """
        self.window_length = positive(window_length, "window_length")
        self.file_share_max = positive(file_share_max, "file_share_max")
        self.pool_windows = positive(pool_windows, "pool_windows")
        self.bucket, self.members = bucket, tuple(members)
        self.finite_only = True  # leave out clips with NaN or infinity; a reader that mends them says False
        self.seed, self.rank = seed, rank

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{self.rank}/{0 if worker is None else worker.id}/{self.bucket.prefix}")
        pool: list[tuple[Tensor, ...]] = []
        while True:
            # Refill at half: a window then meets windows of other tars before it leaves.
            while len(pool) < max(1, self.pool_windows // 2):
                pool.extend(self._windows(rng)[: self.pool_windows])
            index = rng.randrange(len(pool))
            pool[index], pool[-1] = pool[-1], pool[index]
            yield pool.pop()

    def _windows(self, rng: random.Random) -> list[tuple[Tensor, ...]]:
        """Returns windows of the next usable tar; DataError when too many in a row are unusable."""
        last: DataError | None = None
        for _ in range(_FAILED_TARS_IN_A_ROW):
            key = tar_key(*(rng.randrange(n) for n in (SHARDS, SUBDIRS, TARS)))
            source = f"s3://{self.bucket.bucket_name}/{key}"
            try:
                clips = read_clips(self.bucket.fetch(key), source=source, members=self.members)
            except BucketError:
                raise  # no other tar would fare better
            except DataError as error:
                _log.warning("skipped: %s", error)
                last = error
                continue
            if self.finite_only:
                clips = self._finite(clips, source)
            windows = [window for clip in clips for window in self._cut(clip, rng)]
            if windows:
                return windows
            last = DataError(
                f"{source}: no usable clip has all of {self.members} and {self.window_length} frames",
                path=key,
            )
        raise DataError(
            f"{_FAILED_TARS_IN_A_ROW} tars in a row gave no window; the last: {last}", path=self.bucket.bucket_name
        ) from last

    def _finite(self, clips: list[dict[str, Tensor]], source: str) -> list[dict[str, Tensor]]:
        kept = [clip for clip in clips if all(bool(clip[member].isfinite().all()) for member in self.members)]
        if len(kept) < len(clips):
            _log.warning(
                "%s: %d of %d clips hold NaN or infinity and are left out", source, len(clips) - len(kept), len(clips)
            )
        return kept

    def _cut(self, clip: dict[str, Tensor], rng: random.Random) -> list[tuple[Tensor, ...]]:
        starts = len(clip[self.members[0]]) - self.window_length + 1
        picked = rng.sample(range(starts), min(starts, self.file_share_max)) if starts > 0 else []
        # Cloned: a view would keep the whole clip alive as long as one of its windows waits in the pool.
        return [tuple(clip[m][start : start + self.window_length].clone() for m in self.members) for start in picked]


class MixedS3Windows(IterableDataset[tuple[Tensor, ...]]):
    """Samples (latents, audio, mouse, buttons, has_controls) from a labelled and an unlabelled stream.

    Latents are clamped to ±8 with NaN as 0; unlabelled samples carry zero controls and has_controls False.
    """

    def __init__(self, labelled: S3Windows, unlabelled: S3Windows, unlabelled_frac: float = 0.5) -> None:
        """Mix two streams.

        Args:
            labelled: members latent, audiolatent, mouse, buttons, in this order.
            unlabelled: members latent, audiolatent.
            unlabelled_frac: probability of an unlabelled sample, in [0, 1].

        Raises:
            ConfigError: a fraction outside [0, 1].
        """
        if not 0 <= unlabelled_frac <= 1:
            raise ConfigError(f"unlabelled_frac must lie in [0, 1], got {unlabelled_frac}", key="unlabelled_frac")
        self.labelled, self.unlabelled, self.unlabelled_frac = labelled, unlabelled, unlabelled_frac
        labelled.finite_only = unlabelled.finite_only = False  # they are mended here, as upstream does

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        worker = get_worker_info()
        rng = random.Random(f"mix/{self.labelled.seed}/{self.labelled.rank}/{0 if worker is None else worker.id}")
        labelled, unlabelled = iter(self.labelled), iter(self.unlabelled)
        while True:
            if rng.random() < self.unlabelled_frac:
                latent, audio = next(unlabelled)
                mouse = torch.zeros(len(latent), _MOUSE_AXES, dtype=torch.float32, device="cpu")
                buttons = torch.zeros(len(latent), _BUTTONS, dtype=torch.float32, device="cpu")
                has_controls = torch.tensor(False, device="cpu")
            else:
                latent, audio, mouse, buttons = next(labelled)
                has_controls = torch.tensor(True, device="cpu")
            yield _tame(latent), _tame(audio), mouse.float(), buttons.float(), has_controls


def _tame(latent: Tensor) -> Tensor:
    return torch.nan_to_num(latent.float(), nan=0.0).clamp(-LATENT_LIMIT, LATENT_LIMIT)
