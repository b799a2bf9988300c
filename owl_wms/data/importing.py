"""Brings clips from elsewhere into an `NpyTable`, checked one by one; an interrupted import goes on where it was.

Every clip becomes a row in one step, and a row knows by its name which clip it was: whoever runs the same import again
adds what is missing. Nothing is a table before its first row is whole.

Usage:
    import_clips("clips/", "data/mine", fps=12)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from owl_wms.data.npy_table import LATENT_COLUMN, NpyTable, NpyTableWriter, read_source
from owl_wms.data.sources import Clip, clips_of
from owl_wms.data.statistics import stated_rate
from owl_wms.errors import ConfigError, DataError
from owl_wms.files import at_home
from owl_wms.media.facts import Facts
from owl_wms.media.frames import frame_batches
from owl_wms.media.read_facts import read_facts
from owl_wms.whole import make_folder

_log = logging.getLogger(__name__)
_SAME_RATE = 0.01  # 29.97 and 30 frames per second are one rate


@dataclass(frozen=True, kw_only=True)
class FrameEncoder:
    """Says how frames of a video become latents.

    Attributes:
        encode: float32 [b, C, H, W] in [-1, 1] -> latents [b, c, h, w].
        channels: C; 4 is colour and depth, from `a.depth.mp4` beside `a.mp4`.
        size: (H, W).
        batch: most frames at once.
        resize: scale frames of another size instead of refusing them.
        facts: name and digest of the autoencoder.
    """

    encode: Callable[[Tensor], Tensor]
    channels: int
    size: tuple[int, int]
    batch: int = 8
    resize: bool = False
    facts: Facts = field(default_factory=Facts)


@dataclass(kw_only=True)
class Imported:
    """Counts of one run: rows added, rows that were there already, clips left out, frames added."""

    added: int = 0
    present: int = 0
    skipped: int = 0
    frames: int = 0


def import_clips(
    source: str,
    table: Path | str,
    *,
    fps: float | None = None,
    encoder: FrameEncoder | None = None,
    no_mouse: bool = False,
    skip_bad: Callable[[DataError], None] | None = None,
    progress: Callable[[Imported, str], None] | None = None,
) -> Imported:
    """Append every clip of a source that the table does not have yet.

    Args:
        source: see `owl_wms.data.sources`.
        table: the folder; created when absent.
        fps: frames per second of the clips; it outranks what they say, with a warning if the first contradicts it.
        encoder: for videos.
        no_mouse: store a mouse at rest with clips that have none, which training needs.
        skip_bad: called with the error of a clip that cannot be used, which is then left out; None raises it.
        progress: called after every clip with the counts so far and its name.

    Raises:
        DataError: a source or clip that cannot be used, no clip at all, a table of other columns, frames, buttons or
            another encoder, a row that is another clip of the same name, or another import that is writing to it.
        ConfigError: no frame rate, or a video without an encoder.
    """
    folder, done = at_home(table), Imported()
    if os.path.realpath(folder) == os.path.realpath(at_home(source)):
        raise DataError(f"{folder}: holds the clips; a table wants a folder of its own", path=folder)
    try:
        make_folder(folder)
        with filelock.FileLock(folder / ".import.lock", timeout=0):
            _import(source, folder, fps, encoder, no_mouse, skip_bad, progress, done)
    except filelock.Timeout as error:
        raise DataError(f"{folder}: another import is writing to this table", path=folder) from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}", path=folder) from error
    return done


def _import(
    source: str,
    folder: Path,
    fps: float | None,
    encoder: FrameEncoder | None,
    no_mouse: bool,
    skip_bad: Callable[[DataError], None] | None,
    progress: Callable[[Imported, str], None] | None,
    done: Imported,
) -> None:
    target = _Target(folder, source)
    for clip in clips_of(source):
        try:
            if target.has(clip):
                done.present += 1
                continue
            facts = target.facts_of(clip, encoder)
            rate = _rate(clip, fps, target.told)
            arrays = _checked(clip, encoder, no_mouse, target.shapes, source)
        except DataError as error:
            if skip_bad is None:
                raise
            skip_bad(error)
            done.skipped += 1
            continue
        target.append(clip, arrays, facts, rate)
        done.added += 1
        done.frames += len(arrays[LATENT_COLUMN])
        if progress is not None:
            progress(done, clip.name)
    if not done.added and not done.present:
        why = f"; {done.skipped} cannot be used" if done.skipped else ""
        raise DataError(f"{source}: no clip was imported{why}", path=source)


class _Target:
    """The table that clips go into, and what its rows fix for all that follow.

    Attributes:
        shapes: of a frame in each column; empty before the first row.
        told: the rate of the first row, which may state none; None before it.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self._folder, self._source = folder, source
        self._writer: NpyTableWriter | None = None
        self._present: NpyTable | None = None
        self._rows: dict[str, int] = {}  # of earlier imports, by the names of their clips
        self._encoder = Facts()
        self._buttons: tuple[str, ...] = ()  # their names, as far as a clip has told them
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.told: Facts | None = None
        if (folder / "schema.json").exists():
            self._present = table = NpyTable(folder)
            self._rows = {str(row.fields.get("source")): place for place, row in enumerate(table.rows)}
            if table.rows:
                self.shapes = {column: table.slice(0, column, 0, 1).shape[1:] for column in table.columns}
                self.told = Facts(fps=stated_rate(table, table.rows[0]))
            self._encoder, self._buttons = read_facts(folder), _buttons_of(folder)
        self._held = set(self._rows)

    def has(self, clip: Clip) -> bool:
        """Return whether the clip is a row; raises DataError if another clip of its name is, or for other buttons."""
        if clip.buttons and self._buttons and clip.buttons != self._buttons:  # their columns would be mixed in silence
            text = f"its buttons are {', '.join(clip.buttons)}, those of the table {', '.join(self._buttons)}"
            raise _refused(self._source, clip, f"{text}; give all clips the same in one order")
        if self._present is not None and clip.name in self._rows:
            _require_same(self._present, self._rows[clip.name], clip, f"{self._source}: clip {clip.name}")
        return clip.name in self._held

    def facts_of(self, clip: Clip, encoder: FrameEncoder | None) -> Facts:
        """Return the facts of a clip's latents; raises DataError if another encoder made those of the rows."""
        facts, known = _facts_of(clip, encoder), self._encoder
        if None not in (facts.vae_sha256, known.vae_sha256) and facts.vae_sha256 != known.vae_sha256:
            text = f"was encoded with {_named(facts)}, the rows of the table with {_named(known)}"
            raise _refused(self._source, clip, f"{text}; choose another folder")
        return facts

    def append(self, clip: Clip, arrays: dict[str, np.ndarray], facts: Facts, rate: float) -> None:
        """Store a clip that was found right."""
        if self._writer is None:
            self._writer = NpyTableWriter(self._folder, tuple(arrays), columns=("source", "fps"), begin=False)
            if not len(self._writer):
                if "buttons" not in arrays:
                    _log.warning(
                        "%s: has no controls, which training needs; for NAME.mp4, NAME.csv holds them", clip.name
                    )
                names = {"buttons": list(clip.buttons)} if clip.buttons else {}
                self._writer.set_source({**facts.to_dict(), "imported": self._source, **names})
                self._encoder = facts
        self._writer.append(arrays, source=clip.name, fps=rate)
        self.shapes = self.shapes or {column: array.shape[1:] for column, array in arrays.items()}
        self.told = self.told or Facts(fps=rate)
        self._buttons = self._buttons or clip.buttons
        self._held.add(clip.name)


def _refused(source: str, clip: Clip, text: str) -> DataError:
    return DataError(f"{source}: clip {clip.name}: {text}", path=source)


def _buttons_of(folder: Path) -> tuple[str, ...]:
    """Return the names of a table's buttons in the order of their column; none where no import has stored them."""
    held = (read_source(folder) or {}).get("buttons")
    return tuple(map(str, held)) if isinstance(held, list) else ()


def _require_same(table: NpyTable, place: int, clip: Clip, said: str) -> None:
    """Raise DataError unless a clip's arrays are those of a row: their length, and their first and last frames.

    The whole clip is not checked as a new one is: it was, and most of an import that is run again are such clips.
    """
    row = table.rows[place]
    scale = clip.facts.vae_scale if clip.video is None else None
    for column in clip.arrays.keys() & set(table.columns):
        array, same = clip.arrays[column], clip.arrays[column].shape[:1] == (row.length,)
        factor = scale if scale is not None and column == LATENT_COLUMN else 1.0
        for end in (0, row.length - 1) if same else ():
            given, stored = array[end] * np.float64(factor), table.slice(place, column, end, end + 1)[0]
            same = same and given.shape == stored.shape and np.allclose(given, stored, rtol=1e-3, atol=1e-6)
        if not same:
            text = f"row {row.index} of the table is another clip of this name: rename one of them, or choose another"
            raise DataError(f"{said}: {text} folder", path=table.path, index=row.index)


def _facts_of(clip: Clip, encoder: FrameEncoder | None) -> Facts:
    own = clip.facts if clip.video is None or encoder is None else encoder.facts
    scale = None if own.vae_scale is None else 1.0  # `_checked` multiplies by it
    return Facts(vae=own.vae, vae_sha256=own.vae_sha256, vae_scale=scale, layout="n c h w")


def _named(facts: Facts) -> str:
    return f"{facts.vae or 'an autoencoder'} (SHA-256 {str(facts.vae_sha256)[:8]})"


def _rate(clip: Clip, fps: float | None, told: Facts | None) -> float:
    stated = None
    if fps is None or told is None:  # of a new table the first clip alone is compared
        stated = clip.facts.fps
        if stated is None and clip.video is not None:
            stated = _rate_of_video(clip.video)
    if fps is not None and stated is not None and abs(fps - stated) > _SAME_RATE * stated:
        _log.warning("%s: states %g frames per second, and --fps says %g, which is stored", clip.name, stated, fps)
    rate = fps if fps is not None else stated
    if rate is None:
        raise ConfigError(f"{clip.name}: does not say its frames per second; say them with --fps", key="fps")
    if told is not None and told.fps is not None and told.fps != rate:
        text = f"has {rate:g} frames per second, the rows of the table have {told.fps:g}; choose another folder"
        raise DataError(f"{clip.name}: {text}", path=clip.name)
    return rate


def _rate_of_video(path: Path) -> float | None:
    from owl_wms.media.watch import rate_of

    return rate_of(path)


def _checked(
    clip: Clip, encoder: FrameEncoder | None, no_mouse: bool, shapes: dict[str, tuple[int, ...]], source: str
) -> dict[str, np.ndarray]:
    arrays, fail = dict(clip.arrays), partial(_refused, source, clip)
    if clip.video is not None:
        if encoder is None:
            text = "is a video; give the autoencoder that encodes it with --vae-config and --vae-checkpoint"
            raise ConfigError(f"{clip.name}: {text}", key="vae_config")
        arrays[LATENT_COLUMN] = _encoded(clip.video, encoder)

    latents = arrays.get(LATENT_COLUMN)
    if latents is None:
        raise fail(f"has no latents; found {', '.join(arrays) or 'nothing'}")
    if latents.ndim != 4 or latents.dtype.kind != "f":
        raise fail(f"latents must be floating point [n, c, h, w], got {latents.dtype} {list(latents.shape)}")
    if no_mouse:
        arrays.setdefault("mouse", np.zeros((len(latents), 2), np.float32))
    if clip.facts.vae_scale is not None and clip.video is None:
        # A table holds latents as the decoder takes them, whatever its sources were divided by.
        arrays[LATENT_COLUMN] = latents = (latents * np.float64(clip.facts.vae_scale)).astype(latents.dtype)
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != len(latents) or not len(latents):
            raise fail(f"{name} has {list(array.shape)} for {len(latents)} frames of latents")
        if not np.isfinite(array).all():
            raise fail(f"{name} holds NaN or infinity")
    if "buttons" in arrays:
        held = arrays["buttons"]
        if held.ndim != 2 or not np.isin(held, (0, 1)).all():
            raise fail(f"buttons must be 0 or 1, [n, k], got {held.dtype} {list(held.shape)}")
        arrays["buttons"] = held.astype(np.uint8)
    if "mouse" in arrays:
        if arrays["mouse"].shape[1:] != (2,):
            raise fail(f"mouse must be [n, 2], got {list(arrays['mouse'].shape)}")
        arrays["mouse"] = arrays["mouse"].astype(np.float32)
    if latents.dtype.itemsize > 4:
        arrays[LATENT_COLUMN] = latents.astype(np.float32)
    found = {column: array.shape[1:] for column, array in arrays.items()}
    if shapes and found != shapes:
        raise fail(f"its frames are {_shown(found)}, those of the table {_shown(shapes)}")
    return {column: arrays[column] for column in sorted(arrays, key=lambda name: (name != LATENT_COLUMN, name))}


def _shown(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


@torch.inference_mode()
def _encoded(video: Path, encoder: FrameEncoder) -> np.ndarray:
    depth: Any = video.with_name(f"{video.stem}.depth{video.suffix}") if encoder.channels == 4 else None
    batches: Iterator[Tensor] = frame_batches(
        video, channels=encoder.channels, size=encoder.size, batch_size=encoder.batch,
        depth=depth if depth is not None and depth.exists() else None, resize=encoder.resize,
    )  # fmt: skip
    return torch.cat([encoder.encode(batch).float().cpu() for batch in batches]).numpy()
