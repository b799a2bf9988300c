"""Decodes and encodes clips in batches of numpy arrays: one object per worker, which holds model and program.

The classes have the form that Ray Data's `map_batches` wants (a callable of a dict of arrays, made once per actor), and
need no Ray. `sources` and `stream` are what the dataset commands use: files, read piece by piece.

Usage:
    decode = DecodeClips("dec.yml", "dec.pt")
    frames = decode({"latents": latents})["frames"]      # [k, n, c, h, w] -> uint8 [k, n, H, W, C]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from owl_wms.configs import load_vae_model, pictures_of
from owl_wms.data.s3 import tar_members
from owl_wms.errors import ConfigError, DataError
from owl_wms.files import open_regular, read_exactly, size_of
from owl_wms.media.arrays import as_clips, check_encoded, check_finite, load_tensor_bytes
from owl_wms.media.facts import Facts
from owl_wms.media.frames import frame_batches
from owl_wms.media.latents import LatentFile
from owl_wms.media.read_facts import facts_of_bytes, read_facts, weights_digest
from owl_wms.media.watch import VIDEO_SUFFIXES, rate_of
from owl_wms.runtime import UNATTENDED, Latents, clip_decoder, decode_pieces
from owl_wms.runtime.ahead import ahead
from owl_wms.runtime.steps import frames_of, frames_per_latent
from owl_wms.settings import TensorRTConfig
from owl_wms.timing import Spent
from owl_wms.utils.owl_vae_bridge import get_decoder_only
from owl_wms.vae import fold_weight_norm, load_encoder
from owl_wms.vae.on_cpu import channels_last_on_cpu

Batch = dict[str, Any]
_log = logging.getLogger(__name__)
_LATENT_MEMBER = ".latent.pt"


class Source(Protocol):
    """One clip, or several of one length, of an input file.

    Attributes:
        name: `""` for the whole file, or the clip's name inside a tar.
        shape: `(clips, frames of each)` of the output, or None where it is known only at the end.
        fps: frames per second of the output, or None where the file does not say it.
    """

    name: str
    shape: tuple[int, int] | None
    fps: float | None


class Clips(Protocol):
    """The work of one worker: the sources of a file, and the pieces of a source."""

    def sources(self, path: Path) -> list[Any]:
        """Opens a local file."""

    def stream(self, source: Any, spent: Spent) -> Iterator[Tensor]:
        """Yields pieces on the CPU, each valid until the next is asked for; adds up the seconds of its stages."""


class LatentClip:
    """Latents of a file, or of one clip of a tar."""

    def __init__(
        self, name: str, latents: Latents, shape: tuple[int, int], scale: float = 1.0, fps: float | None = None
    ) -> None:
        """Keeps them; `scale` is the factor on the latents, `fps` the rate of the frames."""
        self.name, self.latents, self.shape, self.scale, self.fps = name, latents, shape, scale, fps


class DecodeClips:
    """Decodes latents to frames, uint8, with the compiled decoder where one can be had."""

    def __init__(
        self,
        vae_config: str | None = None,
        checkpoint: str | None = None,
        *,
        family: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        scale: float | None = None,
        tensorrt: bool = True,
    ) -> None:
        """Loads the decoder; the program is found or built at the first clip.

        Args:
            vae_config: YAML of the autoencoder; the family `taehv` needs none.
            checkpoint: its weights.
            family: `taehv`, or None.
            device: `cpu`, `cuda` or `cuda:N`; None is the GPU that this process sees first, or the CPU without one.
            dtype: `bf16`, `fp16` or `fp32`; None is bf16 on a GPU and fp32 on a CPU.
            batch_size: frames decoded at once.
            scale: factor on the latents; None is the one that a file states (`vae_scale`), else 1.
            tensorrt: use the compiled decoder where one can be had.

        Raises:
            ConfigError, CheckpointError: as `get_decoder_only`.
        """
        where, precision = _place(device, dtype)
        decoder = get_decoder_only(family, vae_config, checkpoint, device=where, dtype=precision)
        self._decoder, self._scale, self._checkpoint = channels_last_on_cpu(decoder, where), scale, checkpoint
        self._told: set[str] = set()  # contradictions, of which a dataset may have one in each file
        model: Any = decoder.config if vae_config is None else load_vae_model(vae_config)
        self._channels: int = model.latent_channels
        settings = TensorRTConfig.resolve(enabled=None if tensorrt else False)
        self._run = clip_decoder(self._decoder, batch_size=batch_size, settings=settings, check=UNATTENDED)

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with `latents` replaced by `frames`; other columns pass through.

        `latents` is `[k, n, c, h, w]`, floating point, or an object array of k arrays `[n, c, h, w]` of any lengths.
        `frames` is uint8 `[k, n, H, W, C]`, or an object array likewise.

        Raises:
            DataError: no such column, or latents that cannot be decoded.
        """
        return _mapped(batch, "latents", "frames", self._decoded)

    def _decoded(self, latents: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        native: np.ndarray[Any, Any] = np.array(latents)
        native = native.astype(native.dtype.newbyteorder("="), copy=False)  # torch takes the machine's order alone
        clip = as_clips(torch.from_numpy(native), "latents", self._channels)
        pieces = decode_pieces(self._run, _Held(clip, "latents"), scale=1.0 if self._scale is None else self._scale)
        return np.concatenate([np.array(piece.numpy()) for piece in pieces])

    def sources(self, path: Path) -> list[LatentClip]:
        """Opens the latents of a `.pt`, `.npy` or `.safetensors` file, or of every clip of a tar.

        Scale and rate are those that the file states (`owl_wms.media.facts`); a scale that was given outranks it. Where
        what was given contradicts a file, a warning says so, once.

        Raises:
            DataError: the file cannot be read or has no latents, or its facts cannot be read.
        """
        if path.suffix.lower() != ".tar":
            file = LatentFile(path, self._channels)
            return [LatentClip("", file, self._shape(file.shape), *self._scale_and_rate(read_facts(path), path))]
        with open_regular(path) as tar:
            data = bytes(read_exactly(tar, size_of(tar)))
        found = []
        for name, member in tar_members(data, source=str(path)):
            if name.endswith(_LATENT_MEMBER):
                latents = _member(member, name, path, self._channels)
                told = self._scale_and_rate(facts_of_bytes(member, path / name), path)
                found.append(LatentClip(name.removesuffix(_LATENT_MEMBER), latents, self._shape(latents.shape), *told))
        if not found:
            raise DataError(f"{path}: has no member *{_LATENT_MEMBER}", path=path)
        return found

    def _scale_and_rate(self, facts: Facts, path: Path) -> tuple[float, float | None]:
        own = self._digest if facts.vae_sha256 is not None else None
        for difference in set(facts.otherwise(vae_scale=self._scale, vae_sha256=own)) - self._told:
            self._told.add(difference)
            _log.warning("%s: %s", path, difference)
        scale = facts.vae_scale if self._scale is None else self._scale
        fps = None if facts.fps is None else facts.fps * frames_per_latent(self._decoder)
        return 1.0 if scale is None else scale, fps

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], frames_of(self._decoder, shape[1])

    @cached_property
    def _digest(self) -> str | None:
        return None if self._checkpoint is None else weights_digest(self._checkpoint)

    def prepare(self, source: LatentClip) -> None:
        """Finds or builds the program for latents of this size."""
        channels, height, width = source.latents.shape[2:]
        self._run.prepare((channels, height, width))

    def stream(self, source: LatentClip, spent: Spent) -> Iterator[Tensor]:
        """Yields uint8 `[k, H, W, C]`, clips end to end; the stages are `read`, `decode` and `copy`."""
        return decode_pieces(self._run, source.latents, scale=source.scale, spent=spent)


class _Held:
    """Latents `[b, n, c, h, w]` in memory, as Latents."""

    def __init__(self, latents: Tensor, said: str) -> None:
        self._said, self.shape = said, tuple(latents.shape)
        self._frames = latents.flatten(0, 1)

    def read(self, start: int, stop: int) -> Tensor:
        frames = self._frames[start:stop]
        check_finite(frames, self._said, start)
        return frames


def _member(data: bytes, name: str, path: Path, channels: int | None) -> _Held:
    """Reads the latents of a tar's member."""
    try:
        value = load_tensor_bytes(data)
    except ValueError as error:
        raise DataError(f"{path}: member {name} is not a readable tensor file: {error}", path=path) from error
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: member {name} must hold a tensor, found {type(value).__name__}", path=path)
    said = f"{path}: member {name}"
    return _Held(as_clips(value, said, channels), said)


class FrameClip:
    """Frames of a clip or array file."""

    name = ""
    shape = None
    fps = None

    def __init__(self, path: Path, encoder: Facts) -> None:
        """Keeps them; `encoder` is what the latents will state, without their rate."""
        self.path, self._encoder = path, encoder

    def facts(self) -> Facts:
        """Returns what the file of latents states.

        Raises:
            DataError: the clip cannot be read.
        """
        return replace(self._encoder, fps=rate_of(self.path) if self.path.suffix.lower() in VIDEO_SUFFIXES else None)


class EncodeClips:
    """Encodes frames to latents, float32."""

    def __init__(
        self,
        vae_config: str,
        checkpoint: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        scale: float = 1.0,
        resize: bool = False,
    ) -> None:
        """Loads the encoder.

        Args:
            vae_config: YAML of the autoencoder.
            checkpoint: its weights, with the encoder's among them.
            device, dtype, batch_size: as in DecodeClips.
            scale: latents are divided by this.
            resize: scale frames of another size instead of refusing them.

        Raises:
            ConfigError: the configuration is wrong, or its autoencoder takes no pictures.
            CheckpointError: the weights cannot be read or belong to another architecture.
        """
        self._where, self._precision = _place(device, dtype)
        self._channels, self._size = pictures_of(vae_config)
        encoder = fold_weight_norm(load_encoder(None, vae_config, checkpoint))
        self._encoder = channels_last_on_cpu(encoder.to(self._where, self._precision).eval(), self._where)
        self._batch_size, self._scale, self._resize = batch_size, scale, resize
        self._checkpoint = checkpoint

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch with `frames` replaced by `latents`; other columns pass through.

        `frames` is uint8 `[k, n, H, W, C]`, or an object array of k arrays `[n, H, W, C]`. `latents` is float32
        `[k, n, c, h, w]`, or an object array likewise.

        Raises:
            DataError: no such column, or frames of another type, size or channel count.
            NonFiniteError: latents that are not finite.
        """
        return _mapped(batch, "frames", "latents", self._encoded)

    def _encoded(self, frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        wanted = (*self._size, self._channels)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != wanted or not len(frames):
            due = ", ".join(map(str, wanted))
            raise DataError(f"frames must be uint8 [n, {due}], got {frames.dtype} {list(frames.shape)}")
        parts = (frames[at : at + self._batch_size] for at in range(0, len(frames), self._batch_size))
        batches = (torch.from_numpy(np.array(part)).permute(0, 3, 1, 2).float() / 127.5 - 1 for part in parts)
        return torch.cat(list(self._latents(batches, "a clip of the batch", Spent()))).numpy()

    def _latents(self, batches: Iterator[Tensor], said: Path | str, spent: Spent) -> Iterator[Tensor]:
        done = 0
        with torch.inference_mode():
            for batch in batches:
                with spent.on("encode"):
                    latents = self._encoder(batch.to(self._where, self._precision)).float().cpu() / self._scale
                check_encoded(latents, said, done, self._precision)
                done += len(batch)
                yield latents

    def sources(self, path: Path) -> list[FrameClip]:
        """Returns the one clip of a video or array file; it is opened by `stream`."""
        return [FrameClip(path, self._facts)]

    @cached_property
    def _facts(self) -> Facts:
        own, digest = Path(self._checkpoint).name, weights_digest(self._checkpoint)
        return Facts(vae_scale=self._scale, vae=own, vae_sha256=digest, layout="n c h w")

    def stream(self, source: FrameClip, spent: Spent) -> Iterator[Tensor]:
        """Yields float32 `[k, c, h, w]`; the next pictures are read while these are encoded. The stage is `encode`.

        Raises:
            DataError: as `frame_batches`.
            NonFiniteError: latents that are not finite.
        """
        read = partial(frame_batches, channels=self._channels, size=self._size, batch_size=self._batch_size)
        pictures = ahead(read(source.path, resize=self._resize), depth=2, name="owl-wms-read")
        return self._latents(pictures, source.path, spent)


def _mapped(batch: Batch, column: str, result: str, compute: Any) -> Batch:
    if column not in batch:
        raise DataError(f"the batch has no column {column!r}, it has {', '.join(batch) or 'none'}; rename the column")
    rows = [compute(row) for row in batch[column]]
    alike = len({row.shape for row in rows}) == 1
    values: np.ndarray[Any, Any] = np.stack(rows) if alike else np.empty(len(rows), object)
    if not alike:
        values[:] = rows
    return {**{name: value for name, value in batch.items() if name != column}, result: values}


def _place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype is not None and dtype not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {dtype!r}", key="dtype")
    if where.type == "cuda":
        # Ray shows an actor its own GPU only, as the current one; `set_device` takes no device without a number.
        where = torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)
        torch.cuda.set_device(where)
    return where, known[dtype] if dtype else (torch.float32 if where.type == "cpu" else torch.bfloat16)
