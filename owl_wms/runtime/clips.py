"""Whole clips to bytes on the host, by a decoder of single frames or by one of streams.

Why it exists: commands, trainers and players show clips of whatever decoder a configuration names. What differs between
the two kinds is said here once: how frames are made, how many there are per latent, and in which range they lie.

Usage:
    run = clip_decoder(decoder, batch_size=8, settings=TensorRTConfig.resolve())
    for frames in decode_pieces(run, latents):      # latents [b, n, c, h, w] -> uint8 [k, H, W, C] on the host
        clip.write(frames)                          # frames_of(decoder, n) of them per clip
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from owl_wms.runtime.canary import parts
from owl_wms.runtime.decode import VideoDecode
from owl_wms.runtime.steps import streams
from owl_wms.runtime.stream import Latents, as_latents, decode_stream
from owl_wms.runtime.streaming import StreamDecode
from owl_wms.runtime.toolchain import Jit
from owl_wms.settings import TensorRTConfig
from owl_wms.timing import Spent

ClipDecode: TypeAlias = VideoDecode | StreamDecode


def clip_decoder(
    decoder: nn.Module,
    *,
    batch_size: int = 8,
    settings: TensorRTConfig,
    check: str = "auto",
    jit: bool = False,
) -> ClipDecode:
    """Returns the decode function of a decoder, for `decode_pieces`.

    Args:
        decoder: of frames or of streams.
        batch_size: frames at once; a stream takes one latent at a time.
        settings: as in `VideoDecode`.
        check: as in `VideoDecode`. Frames of a stream are not compared with PyTorch's while it runs (`canary`): that
            would need every state before.
        jit: compile in this process and keep nothing; without effect on a stream, whose step is compiled and kept.

    Raises:
        ConfigError: an unknown check, or a batch size below 1.
    """
    if streams(decoder):
        return StreamDecode(decoder, settings=settings, check=parts(check)[0])
    return VideoDecode(
        decoder,
        batch_size=batch_size,
        settings=settings,
        check=check,
        output="uint8",
        toolchain=Jit() if jit else None,
    )


def decode_pieces(
    run: ClipDecode, latents: Tensor | Latents, *, scale: float = 1.0, spent: Spent | None = None
) -> Generator[Tensor, None, None]:
    """Yields the frames of whole clips on the host, one clip after the other.

    Args:
        run: of `clip_decoder`. A stream is reset before every clip.
        latents: `[b, n, c, h, w]`, or an object that reads them piece by piece, so that memory stays the same for a
            video of any length.
        scale: factor on the latents.
        spent: receives the seconds of every stage.

    Yields:
        uint8 `[k, H, W, C]`, valid until the next piece is asked for.

    Raises:
        As `decode_stream` and `StreamDecode.step`.
    """
    if isinstance(run, StreamDecode):
        return _streamed(run, as_latents(latents), scale, Spent() if spent is None else spent)
    return decode_stream(run, latents, scale=scale, spent=spent)


def stream_bytes(frames: Tensor) -> Tensor:
    """Returns frames of a stream `[..., C, H, W]` in [0, 1] as uint8 `[..., H, W, C]`: rounded, clamped, NaN black."""
    return frames.float().nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8).movedim(-3, -1).contiguous()


def _streamed(stream: StreamDecode, latents: Latents, scale: float, spent: Spent) -> Generator[Tensor, None, None]:
    clips, length = latents.shape[:2]
    for i in range(clips * length):
        if i % length == 0:
            stream.reset()
        with spent.on("read"):
            latent = latents.read(i, i + 1) * scale
        with spent.on("decode"):
            # On the decoder's device, so that bytes are what is copied to the host.
            frames = stream_bytes(stream.step(latent.to(stream.device or latent.device))[0]).cpu()
        yield frames
