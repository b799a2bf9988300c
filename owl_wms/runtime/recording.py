"""Decoding while the caller records a CUDA graph: PyTorch's operators and nothing else.

Why it exists: a program has buffers and engines of its own, which the caller's graph would use at any later time, next
to our own runs; and the runtime waits, looks at outputs and keeps what it made, none of which a recording can.

Usage:
    if recording.underway():
        frames = recording.decode(decoder, latents, batch_size=8)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from owl_wms.runtime.eager import EagerDecoder
from owl_wms.runtime.latents import check_video
from owl_wms.runtime.output import Output


def underway() -> bool:
    """Whether the current stream is being recorded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def decode(decoder: nn.Module, latents: Tensor, batch_size: int) -> Tensor:
    """`[b, n, c, h, w]` to `[b, n, C, H, W]` bf16, as `VideoDecode` does it, `batch_size` frames at a time.

    Raises:
        LatentShapeError: wrong rank or channel count.
        DecodeMemoryError: the output does not fit into memory.
    """
    eager = EagerDecoder(decoder)  # not to be kept: what is folded while recording exists in the replays only
    check_video(latents, eager.channels)
    one = tuple(latents.shape[2:])
    frames = latents.reshape(-1, *one)
    out = Output(len(frames), latents.device, one)
    if len(frames) == 0:
        out.allocate(tuple(eager(latents.new_zeros((1, *one))).shape[1:]))
    for start in range(0, len(frames), batch_size):
        out.write(start, eager(frames[start : start + batch_size]))
    return out.tensor.reshape(*latents.shape[:2], *out.tensor.shape[1:])
