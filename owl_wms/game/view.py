"""Holds the camera and the light of one frame, as the parts of the renderer share them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(kw_only=True, slots=True)
class View:
    """One camera per player and the light around it, as the parts of the renderer share it.

    Attributes:
        rows, columns: pixel centres, [H] and [W].
        focal: [B] pixels.
        horizon: [B] row of the horizon.
        eye: [B] height of the camera in cells.
        forward, right: [B, 2] unit vectors on the map.
        position: [B, 2] cells.
        sunlight, ambient, fog, zenith: [B, 3] colours; fog is the sky's colour at the horizon.
    """

    rows: Tensor
    columns: Tensor
    focal: Tensor
    horizon: Tensor
    eye: Tensor
    forward: Tensor
    right: Tensor
    position: Tensor
    sunlight: Tensor
    ambient: Tensor
    fog: Tensor
    zenith: Tensor
