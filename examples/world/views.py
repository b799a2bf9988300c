"""Many views of the same worlds, with which `survival` compares a model's frames in motion.

Why: the frames along one path are no measure of a world's colours. The game itself, when it walks about in the same
world under other commands, shows frames whose sorted pixels are 0.12 from the nearest of the path's (median; the
bound is 0.03). Near one of some thousand views it is within the bound for most of thirty seconds.

Usage:
    views = look_around(world, 600, encode, decode, (360, 640))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from control import picture
from episodes import advance, chunks
from torch import Tensor

from owl_wms.game.buttons import BUTTONS
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld

QUANTILES = 64
WALKERS = 64  # in each world
PIECE = 8  # frames for which a walker's commands stay
APART = 4  # frames between views of one walker: 64 walkers for 600 frames make 9,600 views
DECODED = 75  # frames for each time at which views are also coded and decoded: 8 times in 600 frames, 512 views
_SMALL = (45, 80)  # a quarter of the size in which frames are compared
_IN_VIEW = 1.2  # creatures aside at most so far, by their distance ahead, are in view


def sharpness(frames: Tensor) -> Tensor:
    """Mean squared Laplacian of grey: [..., 4, H, W] -> [...]."""
    grey = frames[..., :3, :, :].float().mean(dim=-3)
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return (around - 4 * inner).square().mean(dim=(-2, -1))


def colours(frames: Tensor, shrink: int = 4) -> Tensor:
    """Sorted pixels of each channel of a quarter-size picture, thinned: [n, 4, H, W] -> [n, 3 * QUANTILES]."""
    small = F.avg_pool2d(frames[:, :3].float(), shrink).flatten(2).sort(dim=-1).values
    place = torch.linspace(0, small.shape[-1] - 1, QUANTILES, device=frames.device).round().long()
    return small[..., place].flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """What is compared of views, for each of w worlds.

    Attributes:
        colour: [w, n, 3 * QUANTILES], of all views, the decoded ones first.
        sharp: [w, k], of those that were coded and decoded, as a model's frames are decoded.
        spread: [w, k], standard deviation of their latents.
    """

    colour: Tensor
    sharp: Tensor
    spread: Tensor

    @staticmethod
    def none(worlds: int, like: Tensor) -> Views:
        """No views: frames are compared with those of the path alone."""
        return Views(
            colour=like.new_zeros(worlds, 0, 3 * QUANTILES),
            sharp=like.new_zeros(worlds, 0),
            spread=like.new_zeros(worlds, 0),
        )


def wandering(
    players: int, pieces: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Commands in pieces: a third of the players turns on the spot, a third walks W and S in any order, a third both.

    Returns:
        mouse [pieces, players, 2], buttons [pieces, players, 11], and which players do both [players].
    """
    kind = torch.arange(players) % 3
    turn = (torch.rand(pieces, players, generator=generator) * 2 - 1) * 0.6
    turn = turn * ((kind == 0) | ((kind == 2) & (torch.rand(pieces, players, generator=generator) > 0.3)))
    which = torch.rand(pieces, players, generator=generator)
    mouse = torch.stack([turn, torch.zeros_like(turn)], dim=-1)
    buttons = torch.zeros(pieces, players, len(BUTTONS))
    buttons[..., BUTTONS.index("W")] = ((which < 0.55) & (kind > 0)).float()
    buttons[..., BUTTONS.index("S")] = ((which > 0.75) & (kind > 0)).float()
    return mouse.to(device), buttons.to(device), (kind == 2).to(device)


@torch.no_grad()
def look_around(
    world: GameWorld,
    frames: int,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    size: tuple[int, int],
) -> Views:
    """Let walkers go from where the players of `world` [w] stand, and look at what they see.

    Most views are drawn at 45 x 80. Their sorted pixels differ from those of the averaged frame by 0.004 in the mean
    (at most 0.008 in 72 views), which counts against a model.
    Half of the views of those who turn and walk look in any direction.
    """
    worlds, device = world.batch, world.device
    generator = torch.Generator().manual_seed(17)
    crowd = world.chosen(torch.arange(worlds, device=device).repeat_interleave(WALKERS))
    mouse, buttons, both = wandering(crowd.batch, -(-frames // PIECE), generator, device)
    moments = range(APART, frames + 1, APART)
    decoded_at = {moments[int(i)] for i in torch.linspace(0, len(moments) - 1, max(1, frames // DECODED)).round()}
    drawn, decoded, sharp, spread = [], [], [], []
    for step in range(1, frames + 1):
        at = (step - 1) // PIECE
        advance(crowd, mouse[at], buttons[at])
        if step not in moments:
            continue
        draw = torch.rand(2, crowd.batch, generator=generator).to(device)
        anywhere = both & (draw[0] < 0.5)
        seen = crowd.chosen(torch.arange(crowd.batch, device=device))
        yaw = torch.where(anywhere, 2 * math.pi * draw[1], crowd.state.yaw)
        seen.state = replace(crowd.state, yaw=yaw)
        drawn.append(colours(render(seen, height=_SMALL[0], width=_SMALL[1]), shrink=1))
        if step not in decoded_at:
            continue
        for part in chunks(seen):
            latents = encode(render(part, height=size[0], width=size[1]))
            made = picture(decode(latents))
            decoded.append(colours(made))
            sharp.append(sharpness(made))
            spread.append(latents.float().flatten(1).std(dim=1))
    times = len(decoded_at)

    def by_world(parts: list[Tensor], count: int) -> Tensor:
        """[count * w * WALKERS, ...] in the order of time -> [w, count * WALKERS, ...]."""
        whole: Tensor = torch.cat(parts).unflatten(0, (count, worlds, WALKERS))
        return whole.transpose(0, 1).flatten(1, 2)

    return Views(
        colour=torch.cat([by_world(decoded, times), by_world(drawn, len(moments))], dim=1),
        sharp=by_world(sharp, times),
        spread=by_world(spread, times),
    )


def with_others_out_of_view(world: GameWorld) -> GameWorld:
    """The same players at the same places; creatures that they cannot see now are elsewhere, as nobody could know."""
    other, state = world.spawn(3), world.state
    offset = state.creatures - state.position[:, None]
    forward = torch.stack([torch.cos(state.yaw), torch.sin(state.yaw)], dim=1)[:, None]
    ahead = (offset * forward).sum(dim=-1)
    aside = (offset[..., 1] * forward[..., 0] - offset[..., 0] * forward[..., 1]).abs()
    hidden = ((ahead < 0) | (aside > _IN_VIEW * ahead + 0.5))[..., None]
    # Not into view either: whoever would appear there stays where it was.
    far = other.creatures - state.position[:, None]
    behind = (far * forward).sum(dim=-1)[..., None] < 0
    moved = hidden & behind
    changed = world.chosen(torch.arange(world.batch, device=world.device))
    changed.state = replace(
        state,
        creatures=torch.where(moved, other.creatures, state.creatures),
        creature_velocity=torch.where(hidden, other.creature_velocity, state.creature_velocity),
    )
    return changed
