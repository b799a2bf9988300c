"""Creatures as lit balls with eyes, painted over a frame behind which the walls are already known.

Why closed forms instead of images: a ball is one square root per pixel at any size, and its edge has exact soft
coverage. On the CPU only the window that the balls touch is computed; on a GPU the whole frame, since asking for the
window would stall it, and in a compiled form too, which serves any window.

Usage: `draw_creatures(world, state, view, wall_distance, colour, depth)` changes `colour` and `depth` in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.game.constants import constant
from owl_wms.game.maps import hash_unit
from owl_wms.game.view import View
from owl_wms.game.world import CREATURES, GameState, GameWorld

_DRAWN = 4  # the nearest ones in front of the player
_RADIUS = 0.26
_COLOURS = ((0.93, 0.36, 0.32), (0.98, 0.78, 0.28), (0.36, 0.78, 0.62), (0.50, 0.52, 0.94))


def draw_creatures(
    world: GameWorld, state: GameState, view: View, wall_distance: Tensor, colour: list[Tensor], depth: Tensor
) -> None:
    """Paint the nearest creatures, far to near.

    Args:
        world, state, view: what to draw and from where, batch B.
        wall_distance: [B, W] cells along the view axis to the wall in each column.
        colour: three of [B, H, W] in [0, 1], changed.
        depth: [B, H, W] cells, changed.
    """
    device = world.device
    offset = state.creatures - view.position[:, None]
    ahead = (offset * view.forward[:, None]).sum(dim=-1)
    aside = (offset * view.right[:, None]).sum(dim=-1)
    who = torch.arange(CREATURES, dtype=torch.float32, device=device)
    hover = 0.42 + 0.06 * torch.sin(0.06 * state.frame[:, None].float() + 1.7 * who)
    present = (1 - state.gone / 12).clamp(0, 1)  # grows back during its last frames of absence
    order = torch.where((ahead > 0.3) & (present > 0), ahead, torch.inf)
    nearest, index = order.topk(_DRAWN, largest=False, dim=1, sorted=True)
    ahead = torch.where(nearest.isinf(), 1e3, nearest)
    aside, hover, present = aside.gather(1, index), hover.gather(1, index), present.gather(1, index)
    present = torch.where(nearest.isinf(), 0.0, present)
    tint = (hash_unit(world.seeds[:, None], index, 40) * len(_COLOURS)).long()
    focal = view.focal[:, None]
    centre_x = view.columns[-1] / 2 + 0.25 + focal * aside / ahead
    centre_y = view.horizon[:, None] + focal * (view.eye[:, None] - hover) / ahead
    radius = (focal * _RADIUS * present / ahead).clamp(min=1e-3)
    for k in reversed(range(_DRAWN)):
        one = (slice(None), k)
        rows, columns = _window(centre_x[one], centre_y[one], radius[one], view)
        if rows.stop <= rows.start or columns.stop <= columns.start:
            continue
        _ball(
            view,
            (rows, columns),
            (centre_x[one], centre_y[one], radius[one], ahead[one]),
            constant(_COLOURS, device)[tint[one]],
            wall_distance,
            [plane[:, rows, columns] for plane in colour],
            depth[:, rows, columns],
        )


def _window(x: Tensor, y: Tensor, radius: Tensor, view: View) -> tuple[slice, slice]:
    """Rows and columns that a ball can touch in any frame of the batch; everything on a GPU, or where compiled."""
    if x.is_cuda or torch.compiler.is_compiling():
        return slice(0, len(view.rows)), slice(0, len(view.columns))
    bounds = []
    for centre, count in ((y, len(view.rows)), (x, len(view.columns))):
        low, high = int((centre - radius).min()) - 2, int((centre + radius).max()) + 3
        bounds.append(slice(min(max(low, 0), count), min(max(high, 0), count)))
    return bounds[0], bounds[1]


def _ball(
    view: View,
    window: tuple[slice, slice],
    place: tuple[Tensor, Tensor, Tensor, Tensor],
    tint: Tensor,
    wall_distance: Tensor,
    colour: list[Tensor],
    depth: Tensor,
) -> None:
    centre_x, centre_y, radius, ahead = (p[:, None, None] for p in place)
    across = (view.columns[window[1]] - centre_x) / radius  # [B, 1, w]
    down = (view.rows[window[0]][:, None] - centre_y) / radius  # [B, h, 1]
    squared = across * across + down * down
    visible = (ahead < wall_distance[:, None, window[1]]).float()
    edge = radius * 0.5
    cover = ((1 - squared) * edge + 0.5).clamp_(0, 1) * visible
    outward = (1 - squared).clamp_(min=0).sqrt_()
    # Light from above and a little from the left, as if the whole sky shone.
    lambert = (0.62 - 0.28 * down - 0.12 * across + 0.25 * outward).clamp_(min=0.15)
    # Eyes: two discs, mirrored by the absolute value; the pupil sits inside, looking at the player.
    eye_x = across.abs() - 0.34
    white = ((0.050 - eye_x**2 - (down + 0.12) ** 2) * radius * 4 + 0.5).clamp_(0, 1)
    pupil = ((0.014 - eye_x**2 - (down + 0.10) ** 2) * radius * 6 + 0.5).clamp_(0, 1)
    light = view.sunlight * 0.9 + view.ambient
    clear = torch.exp(-((place[3] / 11.0) ** 2))[:, None]
    bright, dark = torch.full_like(lambert, 0.97), torch.full_like(lambert, 0.08)
    for channel in range(3):
        body = (lambert * tint[:, channel, None, None]).lerp_(bright, white).lerp_(dark, pupil)
        strength = (light * clear)[:, channel, None, None]
        haze = (view.fog * (1 - clear))[:, channel, None, None]
        colour[channel].lerp_(body.mul_(strength).add_(haze), cover)
    depth.copy_(torch.where(cover > 0.5, ahead.expand_as(depth), depth))
