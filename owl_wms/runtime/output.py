"""The one output tensor of a decode: allocated when the frame size is known, filled chunk by chunk, never held twice.

Why: concatenating decoded chunks needs the frames' memory twice, and a long clip is gigabytes.

Usage:
    out = Output(frames=10, device=latents.device, latent_shape=(128, 8, 8))
    out.write(0, chunk)         # [k, C, H, W], any float dtype and device
    out.tensor                  # [10, C, H, W] bf16
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.errors import DecodeMemoryError
from owl_wms.runtime.eager import is_out_of_memory


class Output:
    """`frames` frames in bf16 on `device`; raises DecodeMemoryError when they do not fit there."""

    def __init__(self, frames: int, device: torch.device, latent_shape: tuple[int, ...]) -> None:
        self._frames, self._device, self._latent_shape = frames, device, latent_shape
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            raise RuntimeError("nothing was decoded")
        return self._tensor

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        try:
            self._tensor = torch.empty((self._frames, *shape), dtype=torch.bfloat16, device=self._device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DecodeMemoryError(
                f"{self._frames} frames {list(shape)} in bf16 do not fit on {self._device}; decode fewer frames "
                "at a time, or pass latents on the CPU to receive the frames there",
                frames=self._frames,
                latent_shape=self._latent_shape,
            ) from None
        return self._tensor

    def write(self, start: int, frames: Tensor) -> None:
        tensor = self.allocate(tuple(frames.shape[1:])) if self._tensor is None else self._tensor
        tensor[start : start + len(frames)].copy_(frames)
