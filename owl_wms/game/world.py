"""Holds the game's rules: who stands where, and what mouse and buttons do to it, sixty times per second.

Why it exists: real input for the decoder and training data for the world model, from the repository alone. One object
holds a batch of independent players, each in a world of its own; everything is tensors, so a batch runs on a GPU.

Axes: map x to the right, y downwards (grid[y, x]); heading (cos yaw, sin yaw); yaw grows when turning right. Lengths
are cells, times are frames of 1/60 s, heights are cells above the floor.

Usage:
    world = GameWorld(seed=7, batch=2, device="cpu")
    world.step(mouse, buttons)          # [2, 2] and [2, 11]
    frames = render(world)              # owl_wms/game/render.py: [2, 4, 360, 640] in [-1, 1], red green blue depth
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.game.buttons import BUTTONS
from owl_wms.game.constants import constant
from owl_wms.game.maps import GRID_SIZE, bake_floor_light, hash_unit, make_grid

FRAMES_PER_SECOND = 60
FRAME_SIZE = (360, 640)  # height and width in pixels, if nobody asks for another
CREATURES = 8
WALL_HEIGHT = 1.4
EYE_HEIGHT = 0.62
YAW_PER_MOUSE = 0.06  # radians per frame at mouse x = 1
PITCH_PER_MOUSE = 0.04
PITCH_LIMIT = 0.4
_DT = 1 / FRAMES_PER_SECOND
_WALK = 2.2  # cells per second
_SPRINT = 1.7
_RADIUS = 0.24
_GRAVITY = 7.0
_JUMP = 2.3
_FIRE_FRAMES = 8
_RELOAD_FRAMES = 70.0
_GONE_FRAMES = 120.0
_PULSE_SPEED = 7.0


@dataclass(kw_only=True, slots=True, frozen=True)
class GameState:
    """Holds what changes from frame to frame; every tensor has the batch in front, float32 unless said.

    Attributes:
        position: [B, 2] cells.
        velocity: [B, 2] cells per second.
        yaw: [B] radians.
        pitch: [B] radians, positive looks up.
        height: [B] feet above the floor.
        climb: [B] vertical speed.
        stride: [B] phase of the walk in radians.
        flash: [B] muzzle flash, 1 at the shot, fading.
        recoil: [B] kick of the hand, 1 at the shot, fading slower.
        cooldown: [B] frames until the next shot.
        reload: [B] frames left of a reload.
        lamp: [B] 0 or 1.
        lamp_glow: [B] the lamp as it is seen, easing after `lamp`.
        pulse: [B] radius of the scan ring in cells; beyond 12 there is none.
        zoom: [B] 0 hip, 1 aimed.
        held: bool [B, 11] buttons of the last frame.
        creatures: [B, CREATURES, 2] cells.
        creature_velocity: [B, CREATURES, 2] cells per second.
        gone: [B, CREATURES] frames until a creature that was hit is back.
        frame: int64 [B].
    """

    position: Tensor
    velocity: Tensor
    yaw: Tensor
    pitch: Tensor
    height: Tensor
    climb: Tensor
    stride: Tensor
    flash: Tensor
    recoil: Tensor
    cooldown: Tensor
    reload: Tensor
    lamp: Tensor
    lamp_glow: Tensor
    pulse: Tensor
    zoom: Tensor
    held: Tensor
    creatures: Tensor
    creature_velocity: Tensor
    gone: Tensor
    frame: Tensor

    def eye(self) -> Tensor:
        """[B] height of the camera above the floor, with the bob of the walk."""
        pace = (self.velocity.norm(dim=1) / _WALK).clamp(max=1.5)
        result: Tensor = EYE_HEIGHT + self.height + 0.022 * pace * torch.sin(self.stride)
        return result


class GameWorld:
    """Moves a batch of players, player i in the world of seed `seed + i`."""

    def __init__(self, seed: int, batch: int = 1, device: torch.device | str = "cpu") -> None:
        """Make the maps and put everybody at the start.

        Args:
            seed: first seed; it and the last one fit into int64.
            batch: number of players, at least 1.
            device: where the tensors live.

        Raises:
            ValueError: batch below 1.
            ConfigError: seeds that do not fit.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not -(2**63) <= seed < 2**63 - batch:
            raise ConfigError(f"seeds of worlds must fit into int64, got {seed} for the first of {batch}", key="seed")
        self.seeds = seed + torch.arange(batch, device=device)
        self.grid = make_grid(self.seeds)
        angle = 2 * math.pi * hash_unit(self.seeds, 0, 10)
        self.sun = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
        self.daytime = hash_unit(self.seeds, 0, 11)
        self.floor_light = bake_floor_light(self.grid, self.sun)
        self.state = self.spawn(0)

    @property
    def batch(self) -> int:
        return len(self.seeds)

    @property
    def device(self) -> torch.device:
        return self.seeds.device

    def spawn(self, salt: int) -> GameState:
        """Returns a fresh state: players and creatures at random free cells, drawn from the seed and `salt`."""
        batch, device = self.batch, self.device
        zero = torch.zeros(batch, dtype=torch.float32, device=device)
        who = torch.arange(CREATURES, device=device)[None] + 100 * salt
        creature_angle = 2 * math.pi * hash_unit(self.seeds[:, None], who, 22)
        pace = 0.4 + 0.8 * hash_unit(self.seeds[:, None], who, 23)
        heading = torch.stack([torch.cos(creature_angle), torch.sin(creature_angle)], dim=-1)
        return GameState(
            position=self._free_cell(torch.tensor([[100 * salt]], device=device), 20)[:, 0],
            velocity=torch.zeros_like(heading[:, 0]),
            yaw=2 * math.pi * hash_unit(self.seeds, salt, 21),
            pitch=zero,
            height=zero,
            climb=zero,
            stride=zero,
            flash=zero,
            recoil=zero,
            cooldown=zero,
            reload=zero,
            lamp=zero,
            lamp_glow=zero,
            pulse=zero + 99.0,
            zoom=zero,
            held=torch.zeros(batch, len(BUTTONS), dtype=torch.bool, device=device),
            creatures=self._free_cell(who, 24),
            creature_velocity=heading * pace[..., None],
            gone=torch.zeros_like(pace),
            frame=torch.zeros(batch, dtype=torch.long, device=device),
        )

    def part(self, start: int, stop: int) -> GameWorld:
        """Returns players `start` to `stop` as a world of their own, sharing tensors until either is stepped."""
        return self._taken(slice(start, stop))

    def chosen(self, index: Tensor) -> GameWorld:
        """Returns players `index` (int64 [k], each as often as it is there) as a world of their own, in copies."""
        return self._taken(index)

    def _taken(self, which: slice | Tensor) -> GameWorld:
        taken = object.__new__(GameWorld)
        for name in ("seeds", "grid", "sun", "daytime", "floor_light"):
            setattr(taken, name, getattr(self, name)[which])
        taken.state = GameState(**{f.name: getattr(self.state, f.name)[which] for f in fields(GameState)})
        return taken

    def _free_cell(self, index: Tensor, salt: int) -> Tensor:
        count = GRID_SIZE // 2
        along = [(hash_unit(self.seeds[:, None], index, salt + k) * count).floor() for k in (0, 60)]
        return torch.stack([1.5 + 2 * a for a in along], dim=-1)

    def solid(self, points: Tensor) -> Tensor:
        """Returns whether points lie in a wall: [B, K, 2] cells -> bool [B, K]."""
        cell = points.floor().long().clamp(0, GRID_SIZE - 1)
        return self.grid.flatten(1).gather(1, cell[..., 1] * GRID_SIZE + cell[..., 0]) > 0

    def cast(self, origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the first wall along each ray.

        All grid lines are crossed at once and the nearest crossing into a wall kept: the dense form of Amanatides and
        Woo's traversal (1987), which has no loop and suits a small map.

        Args:
            origin: [B, 2] cells, in a free cell.
            rays: [B, R, 2] directions, any length.

        Returns:
            distance [B, R] in units of the ray's length; `along_y` bool [B, R], whether the wall faces x (its texture
            runs along y); kind int64 [B, R] of the wall.
        """
        size = self.grid.shape[-1]
        lines = torch.arange(size + 1, device=self.device)
        grid = self.grid.flatten(1)
        rays = torch.where(rays.abs() < 1e-6, torch.full_like(rays, 1e-6), rays)
        best, kinds = [], []
        for axis in (0, 1):
            step, start = rays[..., axis, None], origin[:, None, axis, None]
            distance = (lines - start) / step
            other = origin[:, None, 1 - axis, None] + distance * rays[..., 1 - axis, None]
            entered = torch.where(step > 0, lines, lines - 1)
            crossed = other.floor().long()
            inside = (distance > 0) & (entered >= 0) & (entered < size) & (crossed >= 0) & (crossed < size)
            entered, crossed = entered.clamp(0, size - 1), crossed.clamp(0, size - 1)
            cell = entered + crossed * size if axis == 0 else crossed + entered * size
            kind = grid.gather(1, cell.flatten(1)).view(cell.shape)
            distance = torch.where(inside & (kind > 0), distance, torch.inf)
            nearest, where = distance.min(dim=-1)
            best.append(nearest)
            kinds.append(kind.gather(-1, where[..., None])[..., 0])
        along_y = best[0] < best[1]
        return torch.minimum(best[0], best[1]), along_y, torch.where(along_y, kinds[0], kinds[1])

    def step(self, mouse: Tensor, buttons: Tensor) -> GameState:
        """Advance one frame.

        Args:
            mouse: [B, 2] movement, x to the right, y downwards, nominally in [-1, 1].
            buttons: [B, 11] bool or 0/1 in the order of `BUTTONS`.

        Returns:
            The new state, which is also kept as `self.state`.

        Raises:
            ValueError: shapes other than those.
        """
        expected = ((self.batch, 2), (self.batch, len(BUTTONS)))
        if (tuple(mouse.shape), tuple(buttons.shape)) != expected:
            raise ValueError(
                f"mouse and buttons must be {list(expected[0])} and {list(expected[1])}, "
                f"got {list(mouse.shape)} and {list(buttons.shape)}"
            )
        old = self.state
        held = buttons.to(self.device) > 0.5
        mouse = mouse.to(self.device, torch.float32).clamp(-1, 1)
        down = {name: held[:, i].float() for i, name in enumerate(BUTTONS)}
        pressed = {name: (held[:, i] & ~old.held[:, i]).float() for i, name in enumerate(BUTTONS)}

        zoom = old.zoom + 0.2 * (down["RMB"] - old.zoom)
        calm = 1 - 0.5 * zoom
        yaw = old.yaw + YAW_PER_MOUSE * calm * mouse[:, 0]
        pitch = (old.pitch - PITCH_PER_MOUSE * calm * mouse[:, 1]).clamp(-PITCH_LIMIT, PITCH_LIMIT)

        position, velocity = self._walk(old, yaw, down)
        grounded = (old.height <= 0).float()
        climb = (old.climb - _GRAVITY * _DT) * (1 - grounded) + grounded * down["SPACE"] * _JUMP
        height = (old.height + climb * _DT).clamp(min=0)
        stride = old.stride + 4.2 * _DT * velocity.norm(dim=1) * grounded

        reload = torch.where((pressed["R"] > 0) & (old.reload <= 0), _RELOAD_FRAMES, (old.reload - 1).clamp(min=0))
        shot = ((down["LMB"] > 0) & (old.cooldown <= 0) & (reload <= 0)).float()
        lamp = (old.lamp - pressed["F"]).abs()
        state = replace(
            old,
            position=position,
            velocity=velocity,
            yaw=yaw,
            pitch=pitch,
            height=height,
            climb=climb,
            stride=stride,
            flash=torch.maximum(shot, 0.6 * old.flash),
            recoil=torch.maximum(shot, 0.85 * old.recoil),
            cooldown=torch.where(shot > 0, float(_FIRE_FRAMES), (old.cooldown - 1).clamp(min=0)),
            reload=reload,
            lamp=lamp,
            lamp_glow=old.lamp_glow + 0.2 * (lamp - old.lamp_glow),
            pulse=torch.where((pressed["E"] > 0) & (old.pulse > 12), 0.0, old.pulse + _PULSE_SPEED * _DT),
            zoom=zoom,
            held=held,
            frame=old.frame + 1,
        )
        self.state = self._creatures(state, shot)
        return self.state

    def _walk(self, old: GameState, yaw: Tensor, down: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocity from the keys, and the move it makes, sliding along walls."""
        forward = torch.stack([torch.cos(yaw), torch.sin(yaw)], dim=1)
        right = torch.stack([-torch.sin(yaw), torch.cos(yaw)], dim=1)
        wish = forward * (down["W"] - down["S"])[:, None] + right * (down["D"] - down["A"])[:, None]
        wish = wish / wish.norm(dim=1, keepdim=True).clamp(min=1)
        pace = _WALK * (1 + (_SPRINT - 1) * down["LSHIFT"]) * (1 - 0.4 * old.zoom)
        velocity = old.velocity + 0.18 * (wish * pace[:, None] - old.velocity)
        position = old.position
        corners = _RADIUS * constant(((-1, -1), (-1, 1), (1, -1), (1, 1)), self.device)
        for axis in (0, 1):
            move = torch.zeros_like(position)
            move[:, axis] = velocity[:, axis] * _DT
            free = ~self.solid((position + move)[:, None] + corners).any(dim=1)
            position = position + move * free[:, None]
            velocity = torch.where(torch.arange(2, device=self.device) == axis, velocity * free[:, None], velocity)
        return position, velocity

    def _creatures(self, state: GameState, shot: Tensor) -> GameState:
        """Creatures drift and bounce off walls; one in the sights of a shot vanishes for two seconds."""
        place, speed = state.creatures, state.creature_velocity
        for axis in (0, 1):
            only = torch.arange(2, device=self.device) == axis
            ahead = place + only * (speed * _DT + 0.3 * speed.sign())
            blocked = self.solid(ahead)[..., None] & only
            speed = torch.where(blocked, -speed, speed)
            place = place + torch.where(blocked, 0.0, only * speed * _DT)
        forward = torch.stack([torch.cos(state.yaw), torch.sin(state.yaw)], dim=1)[:, None]
        offset = place - state.position[:, None]
        depth = (offset * forward).sum(dim=-1)
        aside = (offset[..., 1] * forward[..., 0] - offset[..., 0] * forward[..., 1]).abs()
        wall = self.cast(state.position, forward)[0]
        hit = (shot[:, None] > 0) & (depth > 0.2) & (depth < wall) & (aside < 0.3) & (state.gone <= 0)
        gone = torch.where(hit, _GONE_FRAMES, (state.gone - 1).clamp(min=0))
        return replace(state, creatures=place, creature_velocity=speed, gone=gone)
