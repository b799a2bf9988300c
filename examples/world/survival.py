"""Survival: the time of the first looked-at frame at which a bound breaks. What frames are compared with:

| | at rest | in motion |
|---|---|---|
| colour | the model's own first frame | the nearest of that world's frames: its path and thousands of other views |
| still_db | the model's own first frame | |
| sharpness, spread | the range that the game has while it rests | the range of the frames with the nearest colours |

A bound counts at a frame only where the game itself keeps it under the same commands: at rest a creature that walks
into the picture breaks two of them. `survival_by_path` is the older form: every frame counts, in motion the path's
frames alone are that world's, at rest sharpness and spread are those of the game's same frame. The game itself, under
other commands in the same worlds, breaks that form after half a second (`views.py`).

Give both: in motion the newer form is too lenient. The game's frames with all colours shifted by 0.05, which is beyond
the bound, break the older one after 0.5 s, the newer one after 1.5 s when turning and not in 30 s when walking (three
worlds each).

Usage:
    found = both_forms(Looks.of(pictures, spread), still_db, truth, place, first)   # "survival", "survival_by_path"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from views import Views, colours, sharpness

from owl_wms.media.metrics import psnr

if TYPE_CHECKING:
    from holding import Truth

FPS = 20
EVERY = 10  # frames between those at which bounds are looked at
ALIKE = 64  # frames of a world with the nearest colours, whose range of sharpness and spread counts
STILL_DB, COLOUR, SHARPNESS, SPREAD = 28.0, 0.03, (0.85, 1.15), (0.95, 1.05)  # bounds
_Values = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Looks:
    """What is compared between frames, of every shown frame of every world."""

    sharp: Tensor  # [w, s]
    colour: Tensor  # [w, s, q]
    spread: Tensor  # [w, s]

    @staticmethod
    def of(frames: Tensor, spread: Tensor) -> Looks:
        """Of pictures [w, s, 4, H, W] and the standard deviation of their latents [w, s]."""
        sharp = torch.stack([sharpness(clip) for clip in frames])
        return Looks(sharp, torch.stack([colours(clip) for clip in frames]), spread)


def kinds_of(worlds: int) -> dict[str, slice]:
    """Places of the worlds of each kind of play, `worlds` of each."""
    return {"still": slice(0, worlds), "turn": slice(worlds, 2 * worlds), "walk": slice(2 * worlds, 3 * worlds)}


def decibels(a: Tensor, b: Tensor) -> Tensor:
    """Of colour pictures [n, 4, H, W], at most 60: frames at rest may be equal."""
    return psnr(a[:, :3], b[:, :3]).clamp(max=60)


def steps_of(truth: Truth) -> list[int]:
    """Frames at which bounds are looked at."""
    return list(range(EVERY, truth.shown[-1] + 1, EVERY))


def _beyond(value: Tensor, theirs: Tensor) -> Tensor:
    """Ratio of values [..., s] to the nearer end of the range of `theirs` [..., s or 1, k]; 1 within the range."""
    low, high = theirs.amin(dim=-1), theirs.amax(dim=-1)
    return torch.where(value < low, value / low, torch.where(value > high, value / high, torch.ones_like(value)))


def _values(looks: Looks, still_db: Tensor, truth: Truth, place: list[int], first: int, *, by_path: bool) -> _Values:
    """The values that survival has bounds on: name -> [w or worlds at rest, len(place)].

    Args:
        looks, still_db: of the frames to be judged.
        truth: what they are compared with.
        place: of the frames in `looks`.
        first: place of frame 1 in `looks`.
        by_path: the older form, see the module's docstring.
    """
    n, true = truth.worlds, truth.looks
    own = (looks.colour[:n, place] - looks.colour[:n, first, None]).abs().mean(dim=-1)
    views = Views.none(2 * n, true.sharp) if by_path else truth.views
    moved, alike = [], []
    for i in range(2 * n):
        mine, path = looks.colour[n + i, place], true.colour[n + i]
        decoded = torch.cat([path, views.colour[i, : views.sharp.shape[1]]])
        drawn = views.colour[i, views.sharp.shape[1] :]
        distance = torch.cdist(mine, decoded, p=1) / mine.shape[1]
        nearest = distance.amin(dim=1)
        if len(drawn):
            nearest = torch.minimum(nearest, (torch.cdist(mine, drawn, p=1) / mine.shape[1]).amin(dim=1))
        moved.append(nearest)
        alike.append(distance.topk(len(decoded) if by_path else min(ALIKE, len(decoded)), largest=False).indices)

    def ratio(mine: Tensor, theirs: Tensor, seen: Tensor) -> Tensor:
        still = mine[:n, place]
        still = still / theirs[:n, truth.at(steps_of(truth))] if by_path else _beyond(still, theirs[:n, None])
        every = torch.cat([theirs[n:], seen], dim=1)
        return torch.cat([still, *(_beyond(mine[n + i, place], every[i][alike[i]])[None] for i in range(2 * n))])

    return {
        "still_db": still_db[:, place],
        "colour": torch.cat([own, torch.stack(moved)]),
        "sharpness": ratio(looks.sharp, true.sharp, views.sharp),
        "spread": ratio(looks.spread, true.spread, views.spread),
    }


def _broken(values: _Values, worlds: int) -> dict[str, Tensor]:
    """Which bounds break: name -> bool [w, frames]."""
    rest = torch.zeros_like(values["colour"], dtype=torch.bool)
    rest[:worlds] = values["still_db"] < STILL_DB
    return {
        "colour": values["colour"] > COLOUR,
        "sharpness": (values["sharpness"] < SHARPNESS[0]) | (values["sharpness"] > SHARPNESS[1]),
        "spread": (values["spread"] < SPREAD[0]) | (values["spread"] > SPREAD[1]),
        "still_db": rest,
    }


def _survival(broken: dict[str, Tensor], worlds: int, frames: list[int]) -> dict[str, Any]:
    whole = _any(broken)
    times = torch.tensor([*frames, frames[-1] + EVERY], device=whole.device) / FPS

    def first(marks: Tensor) -> Tensor:
        ended = torch.cat([marks, torch.ones_like(marks[:, :1])], dim=1)
        return times[ended.int().argmax(dim=1)]

    kinds = {"all": slice(0, 3 * worlds), **kinds_of(worlds)}
    return {
        "median_seconds": {kind: rounded(first(whole)[part].median()) for kind, part in kinds.items()},
        "median_seconds_of_each_bound": {name: rounded(first(marks).median()) for name, marks in broken.items()},
        "share_of_frames_broken": {kind: rounded(whole[part].float().mean()) for kind, part in kinds.items()},
    }


def both_forms(looks: Looks, still_db: Tensor, truth: Truth, place: list[int], first: int) -> dict[str, Any]:
    """Survival of frames, as it is and in the older form, and the values behind the first one."""
    steps, n = steps_of(truth), truth.worlds
    values = _values(looks, still_db, truth, place, first, by_path=False)
    at = truth.at(steps)
    game = _broken(_values(truth.looks, truth.still_db, truth, at, truth.shown.index(1), by_path=False), n)
    broken = {name: marks & ~game[name] for name, marks in _broken(values, n).items()}
    older = _broken(_values(looks, still_db, truth, place, first, by_path=True), n)
    return {
        "survival": _survival(broken, n, steps) | {"share_counted_at_rest": rounded(1 - _any(game)[:n].float().mean())},
        "survival_by_path": _survival(older, n, steps),
        "values": values,
    }


def _any(broken: dict[str, Tensor]) -> Tensor:
    """Whether any of the bounds breaks: bool [w, frames]."""
    return torch.stack(list(broken.values())).any(dim=0)


def rounded(value: Tensor) -> float:
    """As a number with four decimals."""
    return round(float(value), 4)
