"""Scores views of the game, so that pictures for people have faces and rooms in them rather than bare walls.

Why scored and not listed: a hand-made list of frames would be wrong as soon as the player, the maps or the seed change.

Usage:
    scores = interest(world)             # [B] in [0, 2], for the world's current state
    shown = best_of_each(scores, 4)      # of scores over time: four frames, spread over the whole of it
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from owl_wms.game.render import make_view, render
from owl_wms.game.world import FRAME_SIZE, GameWorld

_SMALL = (45, 80)  # height and width of the picture in which faces are counted
_FACES = 0.06  # share of the picture that creatures cover from which on more of them add nothing
_ROOMY = 6.0  # cells to the wall from which on more of them add nothing
_RAYS = 32


@torch.no_grad()
def interest(world: GameWorld) -> Tensor:
    """Returns how much each player sees: [B] float32 in [0, 2], the sum of two scores in [0, 1].

    Faces: the share of the picture that creatures cover, found by drawing it with and without them. 6 % give 1.
    Room: the mean distance to the walls, for the half of the picture where they are nearer. 6 cells give 1.
    """
    state = world.state
    view = make_view(world, state, *FRAME_SIZE)
    columns = view.columns[:: FRAME_SIZE[1] // _RAYS] - FRAME_SIZE[1] / 2
    rays = view.forward[:, None] + view.right[:, None] * (columns[:, None] / view.focal[:, None, None])
    distance = world.cast(state.position, rays)[0].clamp(max=_ROOMY)
    room = distance.unflatten(1, (2, -1)).mean(dim=2).amin(dim=1) / _ROOMY
    alone = replace(state, gone=torch.full_like(state.gone, torch.inf))
    with_faces, without = (render(world, shown, *_SMALL)[:, 3] for shown in (state, alone))
    faces = (with_faces != without).float().mean(dim=(1, 2)).clamp(max=_FACES) / _FACES
    score: Tensor = faces + room
    return score


def best_of_each(scores: Tensor, count: int) -> list[int]:
    """Splits scores over time into `count` stretches of nearly equal length and finds the best place in each.

    Places are at least half a stretch apart: two frames that follow each other show the same.

    Args:
        scores: [N], one per frame, in the order of time.
        count: number of stretches, from 1 to N.

    Returns:
        `count` places in `scores`, ascending; of equal scores the first counts.
    """
    places: list[int] = []
    end = 0
    for part in scores.tensor_split(count):
        begin, end = end, end + len(part)
        first = max(begin, places[-1] + max(1, len(part) // 2)) if places else begin
        places.append(first + int(scores[first:end].argmax()))
    return places
