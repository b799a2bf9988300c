"""Plausible play without a player: smooth mouse and buttons for clips and training data.

Why closed loop: blind random keys end with a face to the wall. The scripted player looks along three rays and turns
to the open side; everything else is a few slow random waves, so keys stay down for human lengths of time.

Usage:
    mouse, buttons = scripted_controls(seed=7, n=120)   # [120, 2] float32, [120, 11] bool
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from owl_wms.game.maps import hash_unit
from owl_wms.game.world import BUTTONS, GameWorld

_FEELERS = (-0.7, 0.0, 0.7)  # radians from the heading
_NEAR = 3.2  # cells ahead at which it begins to turn away


class ScriptedPlayer:
    """Chooses controls for every player of a world from its state; deterministic given the world's seeds."""

    def __init__(self, world: GameWorld) -> None:
        self._world = world
        self._mouse = torch.zeros(world.batch, 2, dtype=torch.float32, device=world.device)
        self._side = torch.ones(world.batch, dtype=torch.float32, device=world.device)

    def controls(self) -> tuple[Tensor, Tensor]:
        """Mouse [B, 2] in [-1, 1] and buttons bool [B, 11] for the world's next step."""
        state = self._world.state
        angles = state.yaw[:, None] + state.yaw.new_tensor(_FEELERS)
        rays = torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1)
        left, ahead, right = self._world.cast(state.position, rays)[0].unbind(dim=1)
        # Keep to the chosen side while close, or it would tremble in a corner.
        open_side = (right > left).float() * 2 - 1
        self._side = torch.where(ahead > _NEAR, open_side, self._side)
        near = ((_NEAR - ahead) / _NEAR).clamp(0, 1)
        target = torch.stack(
            [
                0.28 * self._wave(0, 3.1) + 0.22 * self._wave(1, 1.3) + 1.1 * near * self._side,
                0.16 * self._wave(2, 1.7) + 0.9 * state.pitch,
            ],
            dim=1,
        )
        self._mouse = 0.86 * self._mouse + 0.14 * target.clamp(-1, 1)
        fight = self._wave(3, 5.0)
        strafe = self._wave(4, 2.3)
        keys = {
            "W": (ahead > 0.9) & (self._wave(5, 3.7) > -0.75),
            "S": ahead < 0.7,
            "A": strafe < -0.72,
            "D": strafe > 0.72,
            "LSHIFT": (self._wave(6, 4.1) > 0.35) & (ahead > 2),
            "SPACE": self._wave(7, 1.9) > 0.9,
            "R": self._wave(8, 6.1) > 0.985,
            "F": self._wave(9, 7.3) > 0.98,
            "E": self._wave(10, 5.3) > 0.98,
            "LMB": (fight > 0.45) & (self._wave(11, 0.9) > 0.1),
            "RMB": (fight > 0.6) & (self._wave(12, 2.9) > 0.2),
        }
        return self._mouse.clone(), torch.stack([keys[name] for name in BUTTONS], dim=1)

    def _wave(self, which: int, seconds: float) -> Tensor:
        """[B] in [-1, 1]: two sines of about `seconds` with periods and phases from the seed."""
        seeds = self._world.seeds
        time = self._world.state.frame.float() / 60
        total = torch.zeros_like(time)
        for part, weight in ((0, 0.65), (1, 0.35)):
            phase = hash_unit(seeds, which, 30 + part)
            stretch = 0.7 + 0.6 * hash_unit(seeds, which, 32 + part)
            total += weight * torch.sin(2 * math.pi * (time * (1 + 0.73 * part) / (seconds * stretch) + phase))
        return total


def scripted_controls(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Controls of one scripted player over `n` frames in the world of `seed`.

    Args:
        seed: the world's seed.
        n: number of frames, at least 0.

    Returns:
        mouse float32 [n, 2] in [-1, 1] and buttons bool [n, 11] in the order of `BUTTONS`.
    """
    world = GameWorld(seed)
    player = ScriptedPlayer(world)
    mouse = torch.zeros(n, 2, dtype=torch.float32, device=world.device)
    buttons = torch.zeros(n, len(BUTTONS), dtype=torch.bool, device=world.device)
    for frame in range(n):
        moved, held = player.controls()
        mouse[frame], buttons[frame] = moved[0], held[0]
        world.step(moved, held)
    return mouse, buttons
