"""Decoded frames on the host, piece by piece, while the next ones are read, decoded and copied.

Why: a GPU decodes thousands of frames per second. Read, decode, copy and write one after the other, they reach a file
at a fraction of that rate; and a clip need not fit into memory to be decoded.

Usage:
    decode = make_batched_decode_fn(decoder, 8, output="uint8")
    for frames in decode_stream(decode, latents):      # latents [b, n, c, h, w]
        file.write(frames.numpy())                     # uint8 [k, H, W, C], valid until the next piece is asked for
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.runtime.ahead import Channel, ahead
from owl_wms.runtime.decode import VideoDecode
from owl_wms.runtime.latents import check_video_shape
from owl_wms.timing import Marks, Spent

_T = TypeVar("_T")


class Latents(Protocol):
    """Latents that are read piece by piece, from a file say."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(b, n, c, h, w)`."""

    def read(self, start: int, stop: int) -> Tensor:
        """Returns frames `start` to `stop`, counted through all clips, as `[stop - start, c, h, w]`."""


class _Ready(NamedTuple):
    """A decoded piece on its way to the host.

    `source` is its GPU memory, which must not be used again before the copy is done. `marks` are set on the GPU before
    and after the decode, and `copied` before and after the copy; None on a CPU.
    """

    frames: Tensor
    buffer: Tensor | None
    source: Tensor
    marks: Marks
    copied: Marks | None


def decode_stream(
    decode: VideoDecode,
    latents: Tensor | Latents,
    *,
    scale: float = 1.0,
    batches: int = 4,
    ring: int = 3,
    spent: Spent | None = None,
) -> Generator[Tensor, None, None]:
    """Yields the frames of `decode(latents)` on the host, in order, clips end to end.

    One thread reads latents and brings them to the GPU, one decodes, a stream of its own copies frames into a ring of
    pinned buffers, and the caller uses them: four things at once. A caller that is slow makes the decoder wait. Memory
    does not grow with the length: at most `ring` pieces are being decoded, copied or used. An exception in any stage
    ends all of them and is raised here. Closing the generator ends the threads; a decode that has begun is finished
    first.

    The first piece waits for the program, which is found or built in the caller's thread, where Ctrl-C reaches it.

    Args:
        decode: its `output` says which frames are yielded.
        latents: `[b, n, c, h, w]` on any device, or what reads them.
        scale: factor on the latents.
        batches: per piece; a piece has `batches * decode.batch_size` frames, so that batches, and therefore bits, are
            those of `decode(latents)`.
        ring: pinned buffers, >= 2.
        spent: receives seconds of the stages `read`, `decode` and `copy`.

    Yields:
        `[k, H, W, C]` uint8 or `[k, C, H, W]` bf16, valid until the next piece is asked for.

    Raises:
        ConfigError: `batches` below 1 or `ring` below 2.
        LatentShapeError, DataError, DecodeMemoryError, FastPathError: as `decode`, and what `latents.read` raises.
    """
    if batches < 1 or ring < 2:
        raise ConfigError(f"batches must be >= 1 and ring >= 2; got {batches} and {ring}", key="ring")
    return _stream(decode, latents, scale, batches * decode.batch_size, ring, Spent() if spent is None else spent)


def _stream(
    decode: VideoDecode, latents: Tensor | Latents, scale: float, piece: int, ring: int, spent: Spent
) -> Generator[Tensor, None, None]:
    source = as_latents(latents)
    check_video_shape(tuple(source.shape), None)
    clips, length, c, h, w = source.shape
    decode.prepare((c, h, w))
    device = decode.device or (latents.device if isinstance(latents, Tensor) else torch.device("cpu"))
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    free: Channel[Tensor | None] = Channel(ring)
    for _ in range(ring):
        free.put(None)  # a buffer is made when the size of a frame is known
    read = _on(stream, _pieces(source, clips * length, piece, scale, device, spent))
    pieces = ahead(read, depth=1, name="owl-wms-read")
    decoding = _on(stream, _decoded(decode, pieces, piece, free, device))
    decoded = ahead(decoding, depth=ring, name="owl-wms-decode", wake=free.close)
    with contextlib.closing(decoded):
        for ready in decoded:
            ready.marks.wait()
            spent.add("decode", ready.marks.between(0, 1) / 1e3)
            if ready.copied is not None:
                ready.copied.wait()
                spent.add("copy", ready.copied.between(0, 1) / 1e3)
            frames, buffer = ready.frames, ready.buffer
            del ready
            yield frames
            free.put(buffer)


def _on(stream: torch.cuda.Stream | None, items: Iterator[_T]) -> Iterator[_T]:
    """Iterates with the caller's `stream` as this thread's current one, so that work enqueued on it comes first."""
    with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        yield from items


def _pieces(
    source: Latents, count: int, piece: int, scale: float, device: torch.device, spent: Spent
) -> Iterator[Tensor]:
    """Yields latents `[1, k, c, h, w]` on the device, copied on a stream that does not wait for the decode."""
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None
    for start in range(0, count, piece):
        with spent.on("read"):
            part = source.read(start, min(start + piece, count))
            part = part if scale == 1.0 else part * scale
            if copying is not None and not part.is_cuda:
                with torch.cuda.stream(copying):
                    part = part.to(device)  # has arrived when this returns
        yield part[None]


def _decoded(
    decode: VideoDecode,
    pieces: Generator[Tensor, None, None],
    piece: int,
    free: Channel[Tensor | None],
    device: torch.device,
) -> Iterator[_Ready]:
    with contextlib.closing(pieces):
        copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        for part in pieces:
            buffer = free.get()
            marks = Marks(device)
            marks.mark()
            frames = decode(part)[0]
            marks.mark()
            if part.is_cuda:  # it was allocated for the stream that brought it
                part.record_stream(torch.cuda.current_stream(device))
            if copying is None:
                yield _Ready(frames.cpu(), None, frames, marks, None)
                continue
            if buffer is None:
                buffer = torch.empty((piece, *frames.shape[1:]), dtype=frames.dtype, device="cpu", pin_memory=True)
            copying.wait_stream(torch.cuda.current_stream(device))
            copied = Marks(device)
            with torch.cuda.stream(copying):
                copied.mark()
                host = buffer[: len(frames)].copy_(frames, non_blocking=True)
                copied.mark()
            yield _Ready(host, buffer, frames, marks, copied)


def as_latents(latents: Tensor | Latents) -> Latents:
    """Returns a tensor `[b, n, c, h, w]` as what is read piece by piece; anything else is that already."""
    return _InMemory(latents) if isinstance(latents, Tensor) else latents


class _InMemory:
    """A tensor `[b, n, c, h, w]` as Latents."""

    def __init__(self, latents: Tensor) -> None:
        self.shape = tuple(latents.shape)
        self._frames = latents.flatten(0, 1) if latents.dim() == 5 else latents

    def read(self, start: int, stop: int) -> Tensor:
        return self._frames[start:stop]
