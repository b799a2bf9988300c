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

from owl_wms.game.buttons import BUTTONS
from owl_wms.game.constants import constant
from owl_wms.game.maps import hash_unit
from owl_wms.game.world import GameWorld

_FEELERS = (-0.7, 0.0, 0.7)  # radians from the heading
_SECONDS = (3.1, 1.3, 1.7, 5.0, 2.3, 3.7, 4.1, 1.9, 6.1, 7.3, 5.3, 0.9, 2.9)  # of the scripted player's waves
_SINES = ((1.0, 0.65), (1.73, 0.35))  # of each wave: pace and weight
_NEAR = 3.2  # cells ahead at which it begins to turn away
_HOLD = (4, 16)  # stored frames for which a piece of a restless player lasts
_REST = (8, 40)  # and one in which it stands still
_MOVES = ("W", "A", "S", "D", "LSHIFT")
_MOVE_CHANCE = (0.55, 0.12, 0.12, 0.12, 0.15)
_DRAWS = (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14)  # salts of a piece's random numbers, from 50 on


class ScriptedPlayer:
    """Chooses controls for every player of a world from its state; deterministic given the world's seeds."""

    def __init__(self, world: GameWorld) -> None:
        self._world = world
        self._mouse = torch.zeros(world.batch, 2, dtype=torch.float32, device=world.device)
        self._side = torch.ones(world.batch, dtype=torch.float32, device=world.device)
        which = torch.arange(len(_SECONDS), device=world.device)[:, None, None]
        part = torch.arange(len(_SINES), device=world.device)[:, None]
        self._phase = hash_unit(world.seeds, which, 30 + part)  # [waves, sines, B]
        stretch = 0.7 + 0.6 * hash_unit(world.seeds, which, 32 + part)
        self._period = constant(_SECONDS, world.device)[:, None, None] * stretch

    def controls(self) -> tuple[Tensor, Tensor]:
        """Mouse [B, 2] in [-1, 1] and buttons bool [B, 11] for the world's next step."""
        state = self._world.state
        angles = state.yaw[:, None] + constant(_FEELERS, state.yaw.device)
        rays = torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1)
        left, ahead, right = self._world.cast(state.position, rays)[0].unbind(dim=1)
        # Keep to the chosen side while close, or it would tremble in a corner.
        open_side = (right > left).float() * 2 - 1
        self._side = torch.where(ahead > _NEAR, open_side, self._side)
        waves = self._waves()
        near = ((_NEAR - ahead) / _NEAR).clamp(0, 1)
        target = torch.stack(
            [
                0.28 * waves[0] + 0.22 * waves[1] + 1.1 * near * self._side,
                0.16 * waves[2] + 0.9 * state.pitch,
            ],
            dim=1,
        )
        self._mouse = 0.86 * self._mouse + 0.14 * target.clamp(-1, 1)
        fight, strafe = waves[3], waves[4]
        keys = {
            "W": (ahead > 0.9) & (waves[5] > -0.75),
            "S": ahead < 0.7,
            "A": strafe < -0.72,
            "D": strafe > 0.72,
            "LSHIFT": (waves[6] > 0.35) & (ahead > 2),
            "SPACE": waves[7] > 0.9,
            "R": waves[8] > 0.985,
            "F": waves[9] > 0.98,
            "E": waves[10] > 0.98,
            "LMB": (fight > 0.45) & (waves[11] > 0.1),
            "RMB": (fight > 0.6) & (waves[12] > 0.2),
        }
        return self._mouse.clone(), torch.stack([keys[name] for name in BUTTONS], dim=1)

    def _waves(self) -> Tensor:
        """[waves, B] in [-1, 1]: each two sines of about `_SECONDS` with periods and phases from the seed."""
        pace, weight = constant(_SINES, self._world.device).unbind(dim=1)
        time = self._world.state.frame.float() / 60
        sines = torch.sin(2 * math.pi * (time * pace[:, None] / self._period + self._phase)) * weight[:, None]
        return sines[:, 0] + sines[:, 1]


class RestlessPlayer:
    """Chooses controls for training data, in pieces; deterministic given the world's seeds.

    A script alone would not do: a model could not tell the effect of a control from the script's reason to press it,
    and would never see a player who stands still or holds a single control, which is all that people do in play.

    Random numbers are constant during a piece.

    | share of pieces | mouse | keys |
    |---|---|---|
    | 1/4, longer ones | exactly (0, 0) | none |
    | 1/8 | only x, y exactly 0 | none |
    | 1/8 | exactly (0, 0) | one |
    | 1/6 | as scripted | as scripted |
    | 1/6 | random, towards level | as scripted |
    | 1/6 | random, towards level | random moves, others as scripted |
    """

    def __init__(self, world: GameWorld) -> None:
        self._scripted, self._world = ScriptedPlayer(world), world
        batch, device = world.batch, world.device
        self._piece = torch.full((batch,), -1, dtype=torch.long, device=device)
        self._left = torch.zeros(batch, dtype=torch.float32, device=device)
        self._mouse = torch.zeros(batch, 2, dtype=torch.float32, device=device)
        # Tensors on the device: an index of Python numbers would be copied there in every frame.
        self._moves = torch.tensor([BUTTONS.index(name) for name in _MOVES], device=device)
        self._salts = 50 + torch.tensor(_DRAWS, device=device)[:, None]

    def controls(self) -> tuple[Tensor, Tensor]:
        """Mouse [B, 2] in [-1, 1] and buttons bool [B, 11], to be held for one stored frame."""
        mouse, buttons = self._scripted.controls()
        begins = self._left <= 0
        self._piece = self._piece + begins.long()
        draws = dict(zip(_DRAWS, hash_unit(self._world.seeds, self._piece, self._salts), strict=True))
        kind = draws[0]
        still, turn, key = kind < 0.25, (kind >= 0.25) & (kind < 0.375), (kind >= 0.375) & (kind < 0.5)
        random_turn, random_keys = kind >= 0.5 + 1 / 6, kind >= 0.5 + 2 / 6
        shortest, longest = (torch.where(still, a, b) for a, b in zip(_REST, _HOLD, strict=True))
        hold = (shortest + (longest - shortest + 1) * draws[1]).floor()
        self._left = torch.where(begins, hold, self._left) - 1

        yaw = (2 * draws[2] - 1) * 0.9
        pitch = (2 * draws[3] - 1) * 0.25 + 0.9 * self._world.state.pitch
        # A quarter of the random turns keeps the heading.
        drawn = torch.stack([yaw * (draws[4] > 0.25), pitch.clamp(-1, 1)], dim=1)
        self._mouse = torch.where(begins[:, None], drawn, self._mouse)
        mouse = torch.where(random_turn[:, None], self._mouse, mouse)
        mouse = torch.where(turn[:, None], torch.stack([yaw, torch.zeros_like(yaw)], dim=1), mouse)
        mouse = torch.where((still | key)[:, None], 0.0, mouse)

        moves = torch.stack([draws[10 + i] < chance for i, chance in enumerate(_MOVE_CHANCE)], dim=1)
        buttons[:, self._moves] = torch.where(random_keys[:, None], moves, buttons[:, self._moves])
        one = (draws[5] * len(BUTTONS)).long()[:, None] == torch.arange(len(BUTTONS), device=mouse.device)
        buttons = torch.where(key[:, None], one, buttons) & ~(still | turn)[:, None]
        return mouse, buttons


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
