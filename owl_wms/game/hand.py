"""Draws the player's own hand, its blaster, the muzzle flash and the crosshair: what is fixed to the screen.

Why: it is what shows fire, reload, aim and stride, so the controls can be seen in a single frame. Shapes are
distances to segments, shaded like round rods. Only the part of the frame that they can reach is computed.

Usage: `draw_hand(state, view, colour)` changes `colour`, three of [B, H, W] in [0, 1], in place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from owl_wms.game.constants import constant
from owl_wms.game.view import View
from owl_wms.game.world import GameState

_RELOAD_FRAMES = 70.0
# Rods in units of the frame's height from the bottom centre: start, end, radius, colour.
_RODS = (
    ((0.62, 0.10), (0.40, -0.13), 0.075, (0.80, 0.58, 0.46)),
    ((0.47, -0.03), (0.30, -0.20), 0.058, (0.30, 0.33, 0.40)),
    ((0.36, -0.15), (0.24, -0.265), 0.036, (0.46, 0.50, 0.58)),
)
_MUZZLE = (0.225, -0.28)


def draw_hand(state: GameState, view: View, colour: list[Tensor]) -> None:
    """Paint hand, flash and crosshair.

    Args:
        state: recoil, reload, zoom, stride and flash are read.
        view: rows, columns and the light.
        colour: three of [B, H, W] in [0, 1], changed.
    """
    height, width = len(view.rows), len(view.columns)
    rows, columns = slice(int(height * 0.42), height), slice(int(width * 0.44), width)
    y = (view.rows[rows][None, :, None] - height) / height
    x = (view.columns[columns][None, None, :] - width / 2) / height
    sway = 0.012 * torch.sin(state.stride / 2) * (1 - state.zoom)
    busy = torch.sin(math.pi * (state.reload / _RELOAD_FRAMES).clamp(0, 1))
    x = x - (sway + 0.02 * state.recoil - 0.05 * state.zoom)[:, None, None]
    lift = 0.008 * torch.cos(state.stride) - 0.035 * state.recoil - 0.22 * busy + 0.015 * state.zoom
    y = y + lift[:, None, None]
    # A copy: written through a view, each change would be a pass over the whole plane in a compiled form.
    patch = [plane[:, rows, columns].clone() for plane in colour]
    light = (view.sunlight + view.ambient) * 0.85 + 0.25 * state.flash[:, None]
    for start, end, radius, tint in _RODS:
        _rod(patch, x, y, (start, end, radius), constant(tint, light.device) * light, height)
    squared = (x - _MUZZLE[0]) ** 2 + (y - _MUZZLE[1]) ** 2
    for channel, (core, halo) in enumerate(((1.0, 0.55), (0.9, 0.36), (0.6, 0.14))):
        glow = core * torch.exp(squared * -900) + halo * torch.exp(squared * -60)
        patch[channel].addcmul_(glow, state.flash[:, None, None])
    for plane, drawn in zip(colour, patch, strict=True):
        plane[:, rows, columns] = drawn
    _crosshair(state, colour)


def _rod(
    patch: list[Tensor],
    x: Tensor,
    y: Tensor,
    shape: tuple[tuple[float, float], tuple[float, float], float],
    tint: Tensor,
    height: int,
) -> None:
    """Draws a round rod between two points, lit from the upper left; `tint` [B, 3]."""
    (ax, ay), (bx, by), radius = shape
    ux, uy = bx - ax, by - ay
    length = math.hypot(ux, uy)
    ux, uy = ux / length, uy / length
    along = ((x - ax) * ux + (y - ay) * uy).clamp_(0, length)
    dx, dy = x - ax - along * ux, y - ay - along * uy
    distance = (dx * dx + dy * dy).sqrt_()
    cover = ((radius - distance) * height + 0.5).clamp_(0, 1)
    # The normal's tilt across the rod, -1 at the lit edge and 1 at the far one.
    across = (dx * -uy + dy * ux) / radius
    shade = (0.86 + 0.30 * across - 0.32 * across * across).clamp_(min=0.25)
    for channel in range(3):
        patch[channel].lerp_(shade * tint[:, channel, None, None], cover)


def _crosshair(state: GameState, colour: list[Tensor]) -> None:
    """Draws a soft ring at the middle of the frame that tightens when aiming."""
    height, width = colour[0].shape[-2:]
    half = max(2, height // 24)
    rows, columns = slice(height // 2 - half, height // 2 + half), slice(width // 2 - half, width // 2 + half)
    axis = (torch.arange(2 * half, dtype=torch.float32, device=colour[0].device) + 0.5 - half) / height
    distance = (axis * axis + axis[:, None] ** 2).sqrt()
    radius = (0.020 - 0.009 * state.zoom)[:, None, None]
    ring = 0.6 * torch.exp(-(((distance - radius) * 280) ** 2))
    for plane in colour:
        middle = plane[:, rows, columns]
        middle.lerp_(torch.ones_like(middle), ring)
