"""Pictures of the game world: walls, floor, sky, creatures and the player's hand as RGB and depth.

Why it is made this way: each pixel's colour is a closed form of its row and column, evaluated by whole-frame tensor
operations, so a batch renders on a GPU as one sequence of kernels. Textures are cosines, which a pixel footprint can
be averaged over exactly (a Gaussian filter scales a cosine by exp(-2 pi^2 sigma^2 f^2)); horizontal edges have area
coverage. Hence no shimmer and few bits: what an autoencoder with 64 latent positions can hold.

Colours are three planes of their own until the end: written into one tensor, each change of a channel would be a pass
over all of them in a compiled form (21 GB of memory traffic for 64 frames instead of 2.4).

Depth channel: distance d in cells along the view axis becomes (d - 4) / (d + 4): -1 at the eye, 0 at four cells, 1
for the sky. `depth_to_channel` and `channel_to_depth` convert.

Usage: `frames = render(world)` -> [B, 4, 360, 640] float32 in [-1, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.game.constants import constant
from owl_wms.game.hand import draw_hand
from owl_wms.game.sprites import draw_creatures
from owl_wms.game.view import View
from owl_wms.game.world import FRAME_SIZE, WALL_HEIGHT, GameState, GameWorld

HALF_DEPTH = 4.0  # cells at which the depth channel is 0
_HALF_WIDTH = 0.84  # tan of half the horizontal field of view: 80 degrees
_ZOOM = 0.6
_FOG_CELLS = 11.0
# Base colour and joint colour of each kind of wall, red green blue in [0, 1]: terracotta, sandstone, slate, moss, plum.
_WALL = ((0.74, 0.43, 0.32), (0.84, 0.72, 0.52), (0.44, 0.54, 0.68), (0.50, 0.62, 0.42), (0.60, 0.45, 0.60))
_JOINT = ((0.88, 0.66, 0.52), (0.62, 0.50, 0.36), (0.62, 0.70, 0.80), (0.36, 0.46, 0.30), (0.44, 0.31, 0.46))
# Daytimes: zenith, horizon, sunlight, ambient light. Interpolated along the list: noon, evening, dusk.
_SKY = (
    ((0.26, 0.50, 0.88), (0.74, 0.86, 0.97), (0.58, 0.55, 0.48), (0.66, 0.69, 0.74)),
    ((0.28, 0.30, 0.56), (0.98, 0.66, 0.42), (0.64, 0.44, 0.28), (0.62, 0.55, 0.60)),
    ((0.12, 0.18, 0.32), (0.38, 0.46, 0.58), (0.20, 0.23, 0.28), (0.42, 0.46, 0.54)),
)


def depth_to_channel(depth: Tensor) -> Tensor:
    """Cells along the view axis, [0, inf] -> channel value [-1, 1]."""
    return 1 - 2 * HALF_DEPTH / (depth + HALF_DEPTH)


def channel_to_depth(channel: Tensor) -> Tensor:
    """Channel value [-1, 1) -> cells; 1 -> inf."""
    return HALF_DEPTH * (1 + channel) / (1 - channel)


def make_view(world: GameWorld, state: GameState, height: int, width: int) -> View:
    """Returns the camera of a state for frames of `height` x `width` pixels."""
    device = world.device
    focal = width / 2 / _HALF_WIDTH * (1 + _ZOOM * state.zoom)
    table = constant(_SKY, device)
    along = world.daytime * (len(_SKY) - 1)
    first = along.floor().long().clamp(max=len(_SKY) - 2)
    mix = (along - first)[:, None, None]
    zenith, horizon_colour, sunlight, ambient = (table[first] * (1 - mix) + table[first + 1] * mix).unbind(dim=1)
    return View(
        rows=torch.arange(height, dtype=torch.float32, device=device) + 0.5,
        columns=torch.arange(width, dtype=torch.float32, device=device) + 0.5,
        focal=focal,
        horizon=height / 2 + focal * torch.tan(state.pitch) + 0.02 * height * state.recoil * (1 - state.zoom),
        eye=state.eye(),
        forward=torch.stack([torch.cos(state.yaw), torch.sin(state.yaw)], dim=1),
        right=torch.stack([-torch.sin(state.yaw), torch.cos(state.yaw)], dim=1),
        position=state.position,
        sunlight=sunlight,
        ambient=ambient,
        fog=horizon_colour,
        zenith=zenith,
    )


@torch.no_grad()
def render(
    world: GameWorld, state: GameState | None = None, height: int = FRAME_SIZE[0], width: int = FRAME_SIZE[1]
) -> Tensor:
    """Draws the frames of a state.

    Args:
        world: maps and light.
        state: a state of that world, batch B; None for the world's current one.
        height, width: pixels; the field of view is fixed to the width.

    Returns:
        float32 [B, 4, height, width] in [-1, 1]: red, green, blue, depth (see the module's docstring).
    """
    state = world.state if state is None else state
    view = make_view(world, state, height, width)
    rays = view.forward[:, None] + view.right[:, None] * (
        (view.columns - width / 2)[:, None] / view.focal[:, None, None]
    )
    distance, along_y, kind = world.cast(state.position, rays)
    colour, depth = _ground_and_sky(world, state, view, rays)
    _walls(world, state, view, rays, distance, along_y, kind, colour, depth)
    draw_creatures(world, state, view, distance, colour, depth)
    _glow(state, colour, depth)
    draw_hand(state, view, colour)
    for plane in colour:
        plane.clamp_(0, 1).mul_(2).sub_(1)
    depth.add_(HALF_DEPTH).reciprocal_().mul_(-2 * HALF_DEPTH).add_(1)
    return torch.stack([*colour, depth], dim=1)


def _lights(state: GameState, depth: Tensor) -> Tensor:
    """Light that the player brings along, at a depth in cells: the lamp and the muzzle flash."""
    shape = (-1,) + (1,) * (depth.dim() - 1)
    strength = 0.55 * state.lamp_glow + 0.7 * state.flash
    return strength.view(shape) / (1 + 0.35 * depth * depth)


def _fog(depth: Tensor) -> Tensor:
    return 1 - torch.exp(-((depth / _FOG_CELLS) ** 2))


def _ground_and_sky(world: GameWorld, state: GameState, view: View, rays: Tensor) -> tuple[list[Tensor], Tensor]:
    """Everything that lies behind the walls: three planes [B, H, W] in [0, 1] and depth [B, H, W] in cells."""
    below = view.rows - view.horizon[:, None]  # [B, H] pixels under the horizon
    floor_depth = view.focal[:, None] * view.eye[:, None] / below.clamp(min=0.5)
    size = world.grid.shape[-1]
    x = view.position[:, 0, None, None] + floor_depth[:, :, None] * rays[:, None, :, 0]
    y = view.position[:, 1, None, None] + floor_depth[:, :, None] * rays[:, None, :, 1]
    # Paving: one slab per cell, light and dark in turn; tanh flattens the cosine into slabs. A slab's footprint grows
    # with the square of the distance, so it fades early.
    footprint = floor_depth * floor_depth / (view.focal * view.eye)[:, None]
    fade = torch.exp(-2 * (math.pi * 0.5 * footprint) ** 2)
    paving = (torch.cos(math.pi * x) * torch.cos(math.pi * y)).mul_(2.2).tanh_().mul_(fade[:, :, None])
    where = torch.stack([x, y], dim=-1).mul_(2 / size).sub_(1)
    light = F.grid_sample(world.floor_light[:, None], where, align_corners=False, padding_mode="border")
    fog = _fog(floor_depth)
    sun = view.sunlight[:, :, None] + view.ambient[:, :, None]
    paving_colour = constant((0.62, 0.58, 0.52), world.device)
    base = paving_colour[:, None] * (sun + _lights(state, floor_depth)[:, None])
    base = base * (1 - fog)[:, None]  # [B, 3, H]
    shade = light[:, 0] * (1 + 0.16 * paving)
    rise = (-below / view.focal[:, None]).clamp(min=0)  # tangent of the elevation
    sky = torch.exp(-2.2 * rise)[:, None]
    behind = view.fog[:, :, None] * sky + view.zenith[:, :, None] * (1 - sky)  # [B, 3, H]
    # Coverage of the horizon row keeps its edge soft.
    ground = (below + 0.5).clamp(0, 1)
    behind = view.fog[:, :, None] * (fog * ground)[:, None] + behind * (1 - ground)[:, None]
    glow = _sun_and_clouds(world, view, rays, rise, 1 - ground)
    tint = 0.35 + 0.65 * view.fog
    colour = []
    for channel in range(3):
        plane = (base[:, channel, :, None] * shade).mul_(ground[:, :, None]).add_(behind[:, channel, :, None])
        colour.append(plane.add_(glow * tint[:, channel, None, None]))
    depth = torch.where(below > 0, floor_depth, torch.inf)
    return colour, depth[:, :, None].expand(-1, -1, rays.shape[1]).clone()


def _sun_and_clouds(world: GameWorld, view: View, rays: Tensor, rise: Tensor, above: Tensor) -> Tensor:
    """Light of the sky [B, H, W], still without colour: a separable sun disc with its halo, and long clouds."""
    azimuth = torch.atan2(rays[..., 1], rays[..., 0])
    sun_azimuth = torch.atan2(world.sun[:, 1], world.sun[:, 0])[:, None]
    aside = torch.remainder(azimuth - sun_azimuth + math.pi, 2 * math.pi) - math.pi
    over = rise - (0.42 - 0.24 * world.daytime)[:, None]
    light = rise.new_zeros(len(rays), rise.shape[1], rays.shape[1])
    for spread, strength in ((0.055, 0.7), (0.3, 0.25)):
        light += (strength * above * torch.exp(-((over / spread) ** 2)))[..., None] * torch.exp(
            -((aside / spread) ** 2)
        )[:, None]
    phase = 2 * math.pi * world.daytime[:, None]
    for turns, middle, thick in ((3, 0.22, 0.07), (5, 0.38, 0.08)):
        band = above * torch.exp(-(((rise - middle) / thick) ** 2))
        puffs = 0.5 + 0.5 * torch.cos(turns * azimuth + turns * phase)
        light += 0.16 * band[..., None] * puffs[:, None]
    return light


def _walls(
    world: GameWorld,
    state: GameState,
    view: View,
    rays: Tensor,
    distance: Tensor,
    along_y: Tensor,
    kind: Tensor,
    colour: list[Tensor],
    depth: Tensor,
) -> None:
    """Paint the walls over `colour` and `depth`, in place."""
    device = world.device
    scale = distance / view.focal[:, None]  # [B, W] cells per pixel at the wall
    level = view.rows[:, None] - view.horizon[:, None, None]
    high = view.eye[:, None, None] - level * scale[:, None]  # [B, H, W] height on the wall, cells
    inside = 1 / scale[:, None]
    cover = ((WALL_HEIGHT - high) * inside + 0.5).clamp_(0, 1) * (high * inside + 0.5).clamp_(0, 1)

    point = view.position[:, None] + distance[..., None] * rays
    along = torch.where(along_y, point[..., 1], point[..., 0])
    # Courses of blocks: 2.5 per cell of height, two blocks per cell of length, every other one shifted by half a block.
    course_rate, block_rate = 2.5, 2.0
    fade_high = torch.exp(-2 * (math.pi * 0.5 * scale * course_rate) ** 2)[:, None]
    slant = rays.norm(dim=-1) / (rays * torch.stack([along_y, ~along_y], dim=-1)).abs().sum(dim=-1).clamp(min=0.05)
    fade_along = torch.exp(-2 * (math.pi * 0.5 * scale * slant * block_rate) ** 2)
    courses = torch.cos(2 * math.pi * course_rate * high)
    shift = torch.sin(math.pi * course_rate * high)
    blocks = (torch.cos(2 * math.pi * block_rate * along) * fade_along)[:, None]
    # Cubing narrows the joints: a cosine near its crest is a line, elsewhere flat.
    joint = (0.5 + 0.5 * courses) ** 3 * fade_high * 0.8 + 0.5 * (0.5 + 0.5 * shift * blocks) ** 3
    joint.clamp_(0, 1)

    base = constant(_WALL, device)[kind - 1].movedim(-1, 1)  # [B, 3, W]
    line = constant(_JOINT, device)[kind - 1].movedim(-1, 1)
    facing = torch.where(
        along_y, -rays[..., 0].sign() * world.sun[:, 0, None], -rays[..., 1].sign() * world.sun[:, 1, None]
    )
    sun = view.sunlight[:, :, None] * (0.25 + 1.0 * facing.clamp(min=0))[:, None]
    light = sun + view.ambient[:, :, None] + _lights(state, distance)[:, None]
    fog = _fog(distance)[:, None]
    base, line, haze = base * light * (1 - fog), line * light * (1 - fog), view.fog[:, :, None] * fog
    # Darker towards the ground, where less of the sky is seen.
    occlusion = 1 - 0.38 * torch.exp(-3.5 * high.clamp(min=0))
    for channel in range(3):
        paint = base[:, channel, None] + (line - base)[:, channel, None] * joint
        paint.mul_(occlusion).add_(haze[:, channel, None])
        colour[channel].lerp_(paint, cover)
    depth.copy_(torch.where(cover > 0.5, distance[:, None].expand_as(depth), depth))


def _glow(state: GameState, colour: list[Tensor], depth: Tensor) -> None:
    """Draws the scan ring of E: a band of light that runs away from the player, in place."""
    radius = state.pulse[:, None, None]
    ring = torch.exp(-(((depth - radius) / 0.5) ** 2)) * (0.5 * torch.exp(-radius / 5))
    colour[1].add_(ring, alpha=0.8)
    colour[2].add_(ring)
