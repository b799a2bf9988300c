"""Episodes of the rendered game as latents on the device, with the controls that belong to them.

A latent frame is the picture after `SKIP` game frames under one and the same control, so that motion between frames
is large enough to learn from: the controls of frame k are those that led to it.

Usage:
    data = record(players=256, frames=48, first_seed=10_000_000, encode=encode, device="cuda")
    data.latents, data.mouse, data.buttons      # [256, 48, 128, 8, 8], [256, 48, 2], [256, 48, 11]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from owl_wms.game.controls import RestlessPlayer, ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld

SKIP = 3  # 60 game frames a second -> 20 latent frames
_WARM_UP = 20  # game frames before the first recorded one
_CHUNK = 64  # frames rendered and encoded at once
_STOPS = (8, 32)  # frame at which a player who rests for good stops


@dataclass(frozen=True, kw_only=True, slots=True)
class Episodes:
    """Recorded play.

    Attributes:
        latents: float16 [e, n, c, h, w], as the encoder gives them.
        mouse: float32 [e, n, 2].
        buttons: float32 [e, n, 11], 0 or 1.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor

    def __len__(self) -> int:
        """How many episodes."""
        return self.mouse.shape[0]

    @staticmethod
    def join(parts: list[Episodes]) -> Episodes:
        """Episodes of equal length, one after the other."""
        return Episodes(
            latents=torch.cat([p.latents for p in parts]),
            mouse=torch.cat([p.mouse for p in parts]),
            buttons=torch.cat([p.buttons for p in parts]),
        )


def enter(players: int, first_seed: int, device: torch.device | str) -> GameWorld:
    """Players in worlds of their own, some scripted steps after the start."""
    world = GameWorld(first_seed, players, device)
    script = ScriptedPlayer(world)
    for _ in range(_WARM_UP):
        world.step(*script.controls())
    return world


def play(
    world: GameWorld,
    controls: Callable[[int], tuple[Tensor, Tensor]],
    frames: int,
    encode: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    chunk: int = _CHUNK,
) -> Episodes:
    """Step, render and encode `frames` latent frames; `controls(k)`: frame k's mouse [B, 2] and buttons [B, 11]."""
    latents, mice, held = [], [], []
    for frame in range(frames):
        mouse, buttons = controls(frame)
        for _ in range(SKIP):
            world.step(mouse, buttons)
        parts = [world.part(i, min(i + chunk, world.batch)) for i in range(0, world.batch, chunk)]
        latents.append(torch.cat([encode(render(part, height=size[0], width=size[1])).half() for part in parts]))
        mice.append(mouse.float())
        held.append(buttons.float())
    stacked = (torch.stack(part, dim=1) for part in (latents, mice, held))
    return Episodes(**dict(zip(("latents", "mouse", "buttons"), stacked, strict=True)))


@torch.no_grad()
def record(
    *,
    players: int,
    frames: int,
    first_seed: int,
    encode: Callable[[Tensor], Tensor],
    device: torch.device | str,
    size: tuple[int, int] = (360, 640),
    resting: float = 0.2,
) -> Episodes:
    """Episodes of restless players in fresh worlds; `encode`: [B, 4, H, W] in [-1, 1] to what is kept.

    The share `resting` of the players stops early and rests to the end, which pieces of some frames never show.
    """
    world = enter(players, first_seed, device)
    player = RestlessPlayer(world)
    index = torch.arange(players, device=device)
    stop = _STOPS[0] + index % (_STOPS[1] - _STOPS[0])
    stop = torch.where(index < round(resting * players), stop, frames)

    def controls(frame: int) -> tuple[Tensor, Tensor]:
        mouse, buttons = player.controls()
        going = (frame < stop)[:, None]
        return mouse * going, buttons & going

    return play(world, controls, frames, encode, size)


class MemoryLoader:
    """Random windows of episodes in memory, in the form that trainers read; endless, so an epoch never ends."""

    epoch = 0

    def __init__(self, data: Episodes, window: int, batch_size: int, seed: int = 0) -> None:
        self._data, self._window, self._batch_size = data, window, batch_size
        self._seed, self._seen = seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data, device = self._data, self._data.mouse.device
        episodes, frames = data.mouse.shape[:2]
        steps = torch.arange(self._window, device=device)
        while True:
            generator = torch.Generator(device=device).manual_seed(self._seed * 1_000_003 + self._seen)
            episode = torch.randint(episodes, (self._batch_size, 1), generator=generator, device=device)
            start = torch.randint(frames - self._window + 1, (self._batch_size, 1), generator=generator, device=device)
            at = episode, start + steps
            self._seen += 1
            yield data.latents[at], data.mouse[at], data.buttons[at]

    def state_dict(self) -> dict[str, int]:
        """Batches given so far."""
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after those."""
        self._seen = state["seen"]
