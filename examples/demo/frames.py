"""Training frames: a pool on the device, rendered at the start and refreshed while training goes on.

Why a pool: rendering is fast, but moving players through their worlds is a chain of small operations; a pool lets
each frame be seen a few times and the worlds be advanced rarely. Values are bytes: a fifth of a per cent of the range.

Usage:
    pool = FramePool(16000, first_seed=1_000_000, device="cuda")
    batch = pool.sample(16, generator)     # [16, 4, 360, 640] float32 in [-1, 1]
    pool.refresh()                         # replaces the 64 oldest frames
"""

from __future__ import annotations

import torch
from torch import Tensor

from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld


class FramePool:
    """The newest `count` frames of ever new worlds, in a ring of uint8 [count, 4, height, width]."""

    def __init__(
        self,
        count: int,
        first_seed: int,
        device: torch.device | str,
        size: tuple[int, int] = (360, 640),
        players: int = 512,
    ) -> None:
        self.chunk, self.size, self.players = min(64, players), size, players
        self.rendered, self.device = 0, torch.device(device)
        self._seed, self._part, self._rounds = first_seed, 0, 0
        self._frames = torch.empty(count, 4, *size, dtype=torch.uint8, device=device)
        self._enter_worlds()
        while self.rendered < count:
            self.refresh()

    def refresh(self) -> None:
        """Render one chunk over the oldest frames; every `players` frames all move on, sometimes into new worlds."""
        if self._part >= self.players:
            self._part, self._rounds = 0, self._rounds + 1
            if self._rounds % 6 == 0:
                self._enter_worlds()
            self._advance(12)
        part = self.world.part(self._part, self._part + self.chunk)
        self._part += self.chunk
        frames = ((render(part, height=self.size[0], width=self.size[1]) + 1) * 127.5).round_().to(torch.uint8)
        where = (torch.arange(len(frames), device=self.device) + self.rendered) % len(self._frames)
        self._frames[where] = frames
        self.rendered += len(frames)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random frames of the pool, float32 [count, 4, height, width] in [-1, 1]."""
        index = torch.randint(len(self._frames), (count,), device=self.device, generator=generator)
        return self._frames[index].float().div_(127.5).sub_(1)

    def _enter_worlds(self) -> None:
        self.world = GameWorld(self._seed, self.players, self.device)
        self._seed += self.players
        self.player = ScriptedPlayer(self.world)
        self._advance(20)

    def _advance(self, frames: int) -> None:
        for _ in range(frames):
            self.world.step(*self.player.controls())


def held_out_frames(
    worlds: int, per_world: int, device: torch.device | str, size: tuple[int, int] = (360, 640)
) -> Tensor:
    """Frames of seeds 0 to `worlds` - 1, a second apart: float32 [worlds * per_world, 4, height, width] in [-1, 1]."""
    world = GameWorld(0, worlds, device)
    player = ScriptedPlayer(world)
    frames = []
    for _ in range(per_world):
        for _ in range(60):
            world.step(*player.controls())
        frames.append(torch.cat([render(world.part(i, i + 1), height=size[0], width=size[1]) for i in range(worlds)]))
    return torch.cat(frames)
