"""cuDNN's global flags, changed by one thread at a time, and convolutions that do not depend on them.

Why it exists: `torch.backends.cudnn.flags` saves and restores settings of the whole process. Two threads that use it at
once restore each other's values, and one beside a parity check once left cuDNN switched off for good. And a
convolution whose algorithm is chosen by a timing run in every process gives other bits in the next one, from an
algorithm that no parity check ever saw. So our convolutions fix how cuDNN chooses: by shape.

Usage:
    with flags(enabled=False, allow_tf32=False): ...
    y = convolution(image, taps)             # CUDA, 16-bit, NCHW view of channels_last
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from owl_wms import env

_lock = threading.RLock()
_ONES = [1, 1]
BY_SHAPE: dict[str, Any] = {"enabled": True, "benchmark": False, "deterministic": False, "allow_tf32": False}


@contextlib.contextmanager
def flags(**wanted: Any) -> Iterator[None]:
    """`torch.backends.cudnn.flags(**wanted)`, while no other thread of this package changes them."""
    with _lock, torch.backends.cudnn.flags(**wanted) if _has_older_settings() else _newer_flags(**wanted):
        yield


def _has_older_settings() -> bool:
    """Returns whether `allow_tf32` is what holds; where newer settings say otherwise, torch refuses to read it."""
    backends: Any = torch.backends
    if "tf32" in (backends.fp32_precision, backends.cudnn.fp32_precision):  # which would hold once it is False
        return False
    try:
        return isinstance(backends.cudnn.allow_tf32, bool)
    except RuntimeError:
        return False


@contextlib.contextmanager
def _newer_flags(*, allow_tf32: bool, **wanted: bool) -> Iterator[None]:
    """Does the same without `allow_tf32`, by the settings that torch has had since 2.9."""
    backend: Any = torch.backends.cudnn
    wanted = {"enabled": False, "benchmark": False, "deterministic": False, **wanted}
    held, precision = {name: getattr(backend, name) for name in wanted}, backend.conv.fp32_precision
    try:
        for name, value in wanted.items():
            setattr(backend, name, value)
        backend.conv.fp32_precision = "tf32" if allow_tf32 else "ieee"
        yield
    finally:
        for name, value in held.items():
            setattr(backend, name, value)
        backend.conv.fp32_precision = precision


def convolution(image: Tensor, taps: Tensor) -> Tensor:
    """Convolves 3x3 with padding 1 and no bias, `[B, C, H, W]` and `[O, C, 3, 3]` on CUDA to `[B, O, H, W]`, whatever
    the global flags are.
    """
    result: Tensor = torch.ops.aten.cudnn_convolution(image, taps, _ONES, _ONES, _ONES, 1, False, False, False)
    return result


def convolution_relu(image: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `relu(conv(image) + bias)` by cuDNN's fused operator, which follows the global flags alone."""
    backend = torch.backends.cudnn
    # What TF32 may do is of no account for 16 bits.
    as_wanted = all(getattr(backend, name) == value for name, value in BY_SHAPE.items() if name != "allow_tf32")
    with contextlib.nullcontext() if as_wanted else flags(**BY_SHAPE):
        result: Tensor = torch.ops.aten.cudnn_convolution_relu(image, taps, bias, _ONES, _ONES, _ONES, 1)
    return result


def _renew() -> None:
    global _lock
    _lock = threading.RLock()


env.after_fork(_renew)
