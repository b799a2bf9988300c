"""Seeded maps of the game world: counter-based random numbers, walls, baked floor light.

Why counter-based: every value is a pure function of (seed, index, salt) in integer arithmetic, so a world is the same
on CPU and GPU, alone or in a batch, and a thousand maps are made by a few tensor operations.

Usage:
    grid = make_grid(torch.tensor([7, 8]))   # [2, 17, 17] int64, 0 = free, 1..5 = kind of wall
    light = bake_floor_light(grid, sun)      # [2, 136, 136] in [0, 1]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRID_SIZE = 17  # odd: border cells, pillars on even cells, cells with two odd coordinates always free
WALL_KINDS = 5
LIGHT_TEXELS = 8  # light map texels along one cell
_SHADOW_CELLS = 1.1  # length of a wall's shadow on the floor

# splitmix64's finaliser (Steele, Lea, Flood 2014), as signed 64-bit constants: torch has no unsigned multiply.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)


def hash_unit(seed: Tensor, index: Tensor | int, salt: Tensor | int) -> Tensor:
    """Uniform random numbers that depend on nothing but the arguments.

    Args:
        seed: integer tensor.
        index: integer tensor broadcastable with `seed`, or an int.
        salt: tells apart the uses of one (seed, index); also an integer tensor or an int.

    Returns:
        float32 tensor of the broadcast shape, in [0, 1).
    """
    x = seed.long() * _GAMMA + _times(index, _MIX_A) + _times(salt, _MIX_B)
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        # Arithmetic shift made logical by masking off the copies of the sign bit.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 40) & 0xFFFFFF).float() / float(1 << 24)


def _times(x: Tensor | int, factor: int) -> Tensor | int:
    """Multiplies in 64 bits with wrapping, as tensors do it, also plain numbers: these need no copy to a GPU."""
    return x.long() * factor if isinstance(x, Tensor) else (x * factor + (1 << 63)) % (1 << 64) - (1 << 63)


def make_grid(seeds: Tensor) -> Tensor:
    """Walls of one map per seed.

    Border walls, and pillars on even cells that may extend one wall to the right or downwards. Every chain of walls
    then runs right or down and ends at most once at the border, so the free space of every map is connected.

    Args:
        seeds: int64 [B].

    Returns:
        int64 [B, GRID_SIZE, GRID_SIZE], row = y, column = x; 0 is free, 1..WALL_KINDS a wall.
    """
    size, device = GRID_SIZE, seeds.device
    axis = torch.arange(size, device=device)
    ys, xs = torch.meshgrid(axis, axis, indexing="ij")
    border = (ys == 0) | (xs == 0) | (ys == size - 1) | (xs == size - 1)
    pillar = (ys % 2 == 0) & (xs % 2 == 0) & ~border
    cell = (ys * size + xs)[None]
    density = 0.45 + 0.3 * hash_unit(seeds, 0, 1)[:, None, None]
    present = pillar & (hash_unit(seeds[:, None, None], cell, 2) < density)
    arm = present & (hash_unit(seeds[:, None, None], cell, 3) < 0.75)
    rightwards = hash_unit(seeds[:, None, None], cell, 4) < 0.5
    solid = border | present
    solid[:, :, 1:] |= (arm & rightwards)[:, :, :-1]
    solid[:, 1:, :] |= (arm & ~rightwards)[:, :-1, :]
    district = (ys // 4 * size + xs // 4)[None]
    kind = 1 + (hash_unit(seeds[:, None, None], district, 5) * WALL_KINDS).long()
    return torch.where(solid, kind, 0)


def bake_floor_light(grid: Tensor, sun: Tensor) -> Tensor:
    """Light that reaches the floor: soft wall shadows away from the sun, and darkening where floor meets wall.

    Args:
        grid: int64 [B, S, S] from `make_grid`.
        sun: float32 [B, 2], unit vector on the map towards the sun.

    Returns:
        float32 [B, S * LIGHT_TEXELS, S * LIGHT_TEXELS] in [0, 1].
    """
    solid = (grid > 0).float()[:, None]
    solid = F.interpolate(solid, scale_factor=LIGHT_TEXELS, mode="nearest")
    side = solid.shape[-1]
    axis = (torch.arange(side, dtype=torch.float32, device=grid.device) + 0.5) / side * 2 - 1
    ys, xs = torch.meshgrid(axis, axis, indexing="ij")
    base = torch.stack([xs, ys], dim=-1)[None]
    shadow = torch.zeros_like(solid)
    steps = 10
    for k in range(1, steps + 1):
        reach = sun * (_SHADOW_CELLS * k / steps) * 2 / grid.shape[-1]
        moved = F.grid_sample(solid, base + reach[:, None, None], align_corners=False, padding_mode="border")
        shadow = torch.maximum(shadow, moved * (1 - 0.35 * k / steps))
    shadow = _blur(shadow, 5)
    contact = _blur(solid, 9)
    return ((1 - 0.5 * shadow) * (1 - 0.35 * contact))[:, 0]


def _blur(image: Tensor, width: int) -> Tensor:
    for _ in range(2):  # two boxes are a tent: no visible edges
        image = F.avg_pool2d(F.pad(image, [width // 2] * 4, mode="replicate"), width, stride=1)
    return image
