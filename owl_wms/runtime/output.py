"""The one output tensor of a decode: allocated when the frame size is known, filled batch by batch, never held twice.

Why: concatenating decoded batches needs the frames' memory twice, and a long clip is gigabytes.

Usage:
    out = Output("bf16", frames=10, device=latents.device, latent_shape=(128, 8, 8))
    out.write(0, frames)        # [k, C, H, W], any float dtype and device
    out.tensor                  # [10, C, H, W] bf16; for "uint8" [10, H, W, C]
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.errors import DecodeMemoryError
from owl_wms.memory import is_out_of_memory
from owl_wms.ops.frame_bytes import frame_bytes

DTYPES = {"bf16": torch.bfloat16, "uint8": torch.uint8}


class Output:
    """Holds `frames` frames on `device`, as bf16 `[n, C, H, W]` or as uint8 `[n, H, W, C]`.

    Raises:
        DecodeMemoryError: they do not fit there; raised at the first write.
    """

    def __init__(self, kind: str, frames: int, device: torch.device, latent_shape: tuple[int, ...]) -> None:
        self._kind, self._frames, self._device, self._latent_shape = kind, frames, device, latent_shape
        self._tensor: Tensor | None = None

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape `(C, H, W)` of a decoder's frame."""
        shape = tuple(self.tensor.shape[1:])
        return shape if self._kind == "bf16" else (shape[-1], *shape[:-1])

    @property
    def tensor(self) -> Tensor:
        if self._tensor is None:
            raise RuntimeError("nothing was decoded")
        return self._tensor

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Allocates for frames `(C, H, W)` of a decoder."""
        stored = shape if self._kind == "bf16" else (*shape[1:], shape[0])
        try:
            self._tensor = torch.empty((self._frames, *stored), dtype=DTYPES[self._kind], device=self._device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DecodeMemoryError(
                f"{self._frames} frames {list(stored)} in {self._kind} do not fit on {self._device}; decode fewer "
                "frames at a time, or pass latents on the CPU to receive the frames there",
                frames=self._frames,
                latent_shape=self._latent_shape,
            ) from None
        return self._tensor

    def write(self, start: int, frames: Tensor) -> None:
        """Stores a decoder's frames `[k, C, H, W]` from place `start` on."""
        tensor = self.allocate(tuple(frames.shape[1:])) if self._tensor is None else self._tensor
        tensor[start : start + len(frames)].copy_(frames if self._kind == "bf16" else frame_bytes(frames))
