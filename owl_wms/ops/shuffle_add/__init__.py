"""`owl_wms::shuffle_add` and `owl_wms::shuffle_frames`: pixel shuffle by 2 on NHWC, with the shortcut or to an image.

Why it exists: pixel shuffle, channel repetition, its pixel shuffle and the sum are four passes over the largest
tensor of a stage; here each result is written once.

Usage:
    u = shuffle_add(y, x)             # y [B, H, W, 4 O], phases first; x [B, H, W, C] or None -> [B, 2H, 2W, O]
    image = shuffle_frames(y, 3)      # y [B, H, W, >= 12] -> [B, 3, 2H, 2W]
"""

from __future__ import annotations

from torch import Tensor

from owl_wms.ops.common.register import define, has_kernel, require
from owl_wms.ops.shuffle_add.reference import frames_reference, phases_first, reference

__all__ = ["frames_reference", "phases_first", "reference", "shuffle_add", "shuffle_frames"]


def _run(y: Tensor, x: Tensor | None) -> Tensor:
    if not has_kernel(y):
        return reference(y, x)
    from owl_wms.ops.shuffle_add.kernel import launch

    return launch(y.contiguous(), None if x is None else x.contiguous())


def _run_frames(y: Tensor, channels: int) -> Tensor:
    if not has_kernel(y):
        return frames_reference(y, channels)
    from owl_wms.ops.shuffle_add.kernel import launch_frames

    return launch_frames(y.contiguous(), channels)


def _fake(y: Tensor, x: Tensor | None) -> Tensor:
    batch, height, width, wide = y.shape
    require(wide % 4 == 0, lambda: f"pixel shuffle by 2 wants a multiple of 4 channels, got {wide}")
    if x is not None:
        require(wide % x.shape[-1] == 0, lambda: f"{x.shape[-1]} channels cannot be repeated to {wide}")
    return y.new_empty(batch, 2 * height, 2 * width, wide // 4)


def _fake_frames(y: Tensor, channels: int) -> Tensor:
    batch, height, width, stored = y.shape
    require(stored >= 4 * channels, lambda: f"{channels} channels need {4 * channels} values a pixel, got {stored}")
    return y.new_empty(batch, channels, 2 * height, 2 * width)


shuffle_add = define("shuffle_add(Tensor y, Tensor? x) -> Tensor", run=_run, fake=_fake, simpler=(reference,))
shuffle_frames = define(
    "shuffle_frames(Tensor y, int channels) -> Tensor", run=_run_frames, fake=_fake_frames, simpler=(frames_reference,)
)
