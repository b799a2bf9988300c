"""Compresses pictures for the browser."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

ImageFormat = Literal["jpeg", "webp"]


def encode_image(image: np.ndarray, kind: ImageFormat = "jpeg", quality: int = 85) -> bytes:
    """A compressed picture.

    Args:
        image: uint8 [H, W, 3] RGB.
        kind: jpeg (a few ms at 640x360) or webp (smaller, slower).
        quality: 1 to 95.
    """
    out = io.BytesIO()
    options = {"subsampling": 0} if kind == "jpeg" and quality >= 90 else {"method": 0} if kind == "webp" else {}
    Image.fromarray(image, "RGB").save(out, kind.upper(), quality=quality, **options)
    return out.getvalue()
