"""Lists the streaming decoder's ops at small odd sizes, for `benchmarks.taehv --check` and the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from owl_wms.ops import frame_conv as ops
from owl_wms.ops import frame_depthwise, pointwise


def cases(device: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """`(op, arguments)` of every op at odd sizes; where a kernel has a choice of tiles, each of them."""

    def t(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    found: list[tuple[Any, tuple[Any, ...]]] = []
    for how in (ops.LIBRARY, ops.LIBRARY_FUSED, ops.RESIDENT, ops.RESIDENT_64):
        for height, width in ((5, 19), (45, 33)):
            x, past = t(4, height, width, 64), t(2, height, width, 64)
            both, one = t(128, 3, 3, 128, scale=0.03), t(128, 3, 3, 64, scale=0.04)
            found += [
                (ops.frame_conv, (x, past, both, wide(128), None, how)),
                (ops.frame_conv, (x, None, one, wide(128), None, how)),
                (ops.frame_conv, (x, None, one, None, t(4, height, width, 128), how)),
                (ops.frame_conv, (x, past, both, wide(128), t(4, height, width, 128), how)),
            ]
    hold, x = t(64, 3, 3, 64, scale=0.04), t(3, 21, 50, 64)
    found += [(ops.frame_conv, (x, None, hold, wide(64), other, ops.RESIDENT_64)) for other in (None, t(3, 21, 50, 64))]
    deep = t(2, 9, 17, 128)
    for how in (ops.LIBRARY, ops.RESIDENT, ops.RESIDENT_64):
        found += [
            (ops.enlarge_conv, (deep, t(4 * 2 * 64, 2, 2, 128, scale=0.05), 2, False, how)),
            (ops.enlarge_conv, (x, t(4 * 128, 2, 2, 64, scale=0.06), 1, True, how)),
        ]
    found += [
        (ops.picture_conv, (x, t(columns, 3, 3, 64, scale=0.02), wide(columns).abs(), patch, as_bytes, how))
        for how in (ops.LIBRARY, ops.RESIDENT)
        for columns, patch in ((32, 1), (32, 2), (64, 4))
        for as_bytes in (False, True)
    ]
    taps = wide(49, 128) / 7
    found += [
        (frame_depthwise.frame_depthwise, (t(4, 5, 19, 64), t(2, 5, 19, 64), taps)),
        (frame_depthwise.frame_depthwise, (t(1, 13, 8, 64), t(1, 13, 8, 64), taps)),
        (pointwise.pointwise_relu, (x, t(96, 64, scale=0.1), t(96))),
        (pointwise.pointwise_add, (x, t(96, 64, scale=0.1), t(3, 21, 50, 96))),
        (pointwise.pointwise_frames, (x, t(128, 64, scale=0.1), 2)),
    ]
    return found
