"""Checks the shape and type of latents, in one place and with one wording.

Why: a wrong rank or channel count otherwise appears as a convolution error five modules down, or, worse, as frames of
another clip.

Usage:
    check_video(latents, channels=128)      # LatentShapeError unless [b, n, 128, h, w]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from owl_wms.errors import DataError, LatentShapeError

_AXES = "add or remove axes"
_CHANNELS = "these latents belong to another decoder, or their axes are in another order"


def latent_channels(decoder: nn.Module) -> int | None:
    """Channels of the latents a decoder takes, from its attributes or its first layer; None when neither says."""
    stated = getattr(decoder, "latent_channels", None)
    if isinstance(stated, int):
        return stated
    first = getattr(getattr(decoder, "conv_in", None), "in_channels", None)  # diffusers' decoders
    return first if isinstance(first, int) else None


def check_video(latents: Tensor, channels: int | None) -> None:
    """Raise LatentShapeError unless `latents` is `[b, n, channels, h, w]` with h, w >= 1; DataError unless real
    numbers.
    """
    _check_tensor(latents, _video(channels))
    check_video_shape(tuple(latents.shape), channels)


def check_video_shape(shape: tuple[int, ...], channels: int | None) -> None:
    """Checks a shape as `check_video` checks latents."""
    expected = _video(channels)
    if len(shape) != 5:
        _refuse(shape, expected, f"rank 5, got rank {len(shape)}", _AXES)
    if channels is not None and shape[2] != channels:
        _refuse(shape, expected, f"{channels} channels, got {shape[2]}", _CHANNELS)
    if min(shape[2:]) < 1:
        _refuse(shape, expected, "c, h and w of at least 1", "decode latents that have values")


def _video(channels: int | None) -> str:
    return f"[b, n, {'c' if channels is None else channels}, h, w]"


def check_audio(latents: Tensor, channels: int | None) -> None:
    """Raise LatentShapeError unless `latents` is `[b, n, channels]`; DataError unless real numbers."""
    expected = f"[b, n, {'c' if channels is None else channels}]"
    _check_tensor(latents, expected)
    shape = tuple(latents.shape)
    if len(shape) != 3:
        _refuse(shape, expected, f"rank 3, got rank {len(shape)}", _AXES)
    if channels is not None and shape[2] != channels:
        _refuse(shape, expected, f"{channels} channels, got {shape[2]}", _CHANNELS)


def _check_tensor(latents: Tensor, expected: str) -> None:
    if not isinstance(latents, Tensor):
        raise DataError(f"latents must be a torch.Tensor {expected}; got {type(latents).__name__}")
    if torch._C._functorch.is_batchedtensor(latents):
        raise DataError(f"latents under torch.vmap cannot be decoded; give them as one batch {expected}")
    if latents.is_complex() or latents.is_quantized or latents.layout != torch.strided:
        raise DataError(f"latents must be a dense real tensor {expected}; got {latents.dtype}, {latents.layout}")


def _refuse(got: tuple[int, ...], expected: str, rule: str, remedy: str) -> None:
    raise LatentShapeError(
        f"latents must be {expected} ({rule}); got {list(got)}: {remedy}",
        got=got,
        expected=expected,
    )
