"""From a decoder's output to bytes of colour."""

from __future__ import annotations

from torch import Tensor

from owl_wms.ops.frame_bytes import frame_bytes


def to_uint8(frame: Tensor, *, bgr: bool = False) -> Tensor:
    """Colour of a decoded frame as bytes, on the frame's device.

    Args:
        frame: [C, H, W] nominally in [-1, 1], C at least 3: red, green, blue, then depth and flow, which are left out.
        bgr: blue first, as OpenCV and X11 want it.

    Returns:
        uint8 [H, W, 3], values rounded; what is out of range is clamped, not-a-number is black.

    Raises:
        ValueError: another rank, or fewer than three channels.
    """
    if frame.ndim != 3 or frame.shape[0] < 3:
        raise ValueError(f"a frame must be [C, H, W] with C >= 3, got {list(frame.shape)}")
    colour = frame[:3].flip(0) if bgr else frame[:3]
    return frame_bytes(colour[None])[0]
