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

SKIP = 3  # 60 game frames per second -> 20 latent frames
_WARM_UP = 20  # game frames before the first recorded one
CHUNK = 64  # frames rendered and encoded at once
_STOPS = (8, 32)  # frame at which a player who rests for good stops


@dataclass(kw_only=True, slots=True)
class Episodes:
    """Recorded play. The tensors may have room for more episodes than there are: see `with_room` and `len`.

    Attributes:
        latents: float16 [e, n, c, h, w], as the encoder gives them.
        mouse: float32 [e, n, 2].
        buttons: float32 [e, n, 11], 0 or 1.
        added: episodes that were ever written, the first ones included; None for all places.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor
    added: int | None = None

    def __len__(self) -> int:
        """Returns how many episodes there are: places from 0 on that hold play."""
        places = len(self.mouse)
        return places if self.added is None else min(self.added, places)

    def with_room(self, places: int) -> Episodes:
        """Returns a copy with so many places, of which these episodes take the first ones; at least their number."""
        rooms = [x.new_zeros(max(places, len(self)), *x.shape[1:]) for x in self._tensors()]
        whole = Episodes(latents=rooms[0], mouse=rooms[1], buttons=rooms[2], added=0)
        whole.add(self)
        return whole

    def add(self, part: Episodes) -> None:
        """Copies episodes of the same length into free places, then over the oldest ones.

        The tensors stay where they are. Copies are queued on the current stream, so batches that were gathered before
        keep their values. `part` may be on another device.

        Raises:
            ValueError: episodes of another shape, or more than there are places.
        """
        places, count = len(self.mouse), len(part)
        if any(x.shape[1:] != y.shape[1:] for x, y in zip(self._tensors(), part._tensors(), strict=True)):
            raise ValueError(f"episodes are {list(self.latents.shape[1:])}, got {list(part.latents.shape[1:])}")
        if count > places:
            raise ValueError(f"there are {places} places, got {count} episodes")
        added = places if self.added is None else self.added
        first = added % places
        until = min(count, places - first)
        for mine, new in zip(self._tensors(), part._tensors(), strict=True):
            mine[first : first + until].copy_(new[:until])
            mine[: count - until].copy_(new[until:count])
        self.added = added + count

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.latents, self.mouse, self.buttons

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


def advance(world: GameWorld, mouse: Tensor, buttons: Tensor) -> None:
    """Take the game frames of one latent frame."""
    for _ in range(SKIP):
        world.step(mouse, buttons)


def chunks(world: GameWorld) -> list[GameWorld]:
    """Cut a world into parts that are rendered and encoded at once: `CHUNK` players each, fewer in the last one."""
    return [world.part(i, min(i + CHUNK, world.batch)) for i in range(0, world.batch, CHUNK)]


def play(
    world: GameWorld,
    controls: Callable[[int], tuple[Tensor, Tensor]],
    frames: int,
    encode: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    draw: Callable[..., Tensor] = render,
    advance: Callable[[GameWorld, Tensor, Tensor], None] = advance,
) -> Episodes:
    """Step, render and encode `frames` latent frames.

    Args:
        world: its players are moved.
        controls: of the number k of a frame: its mouse [B, 2] and buttons [B, 11].
        frames: to be made.
        encode: [b, 4, H, W] in [-1, 1] to what is kept; called with at most `CHUNK` frames at once.
        size: H and W.
        draw: `render`, or a compiled form of it.
        advance: `advance`, or a quicker form of it.
    """
    latents, mice, held = [], [], []
    for frame in range(frames):
        mouse, buttons = controls(frame)
        advance(world, mouse, buttons)
        coded = [encode(draw(part, height=size[0], width=size[1])).half() for part in chunks(world)]
        latents.append(torch.cat(coded))
        mice.append(mouse.float())
        held.append(buttons.float())
    made, mouse, buttons = (torch.stack(part, dim=1) for part in (latents, mice, held))
    return Episodes(latents=made, mouse=mouse, buttons=buttons)


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
    draw: Callable[..., Tensor] = render,
    advance: Callable[[GameWorld, Tensor, Tensor], None] = advance,
    after_frame: Callable[[], None] = lambda: None,
) -> Episodes:
    """Episodes of restless players in fresh worlds; `encode`, `draw` and `advance` as in `play`.

    `after_frame` is called once per frame; what it raises ends the recording. The share `resting` of the players stops
    early and rests to the end, which pieces of some frames never show.
    """
    world = enter(players, first_seed, device)
    player = RestlessPlayer(world)
    index = torch.arange(players, device=device)
    stop = _STOPS[0] + index % (_STOPS[1] - _STOPS[0])
    stop = torch.where(index < round(resting * players), stop, frames)

    def controls(frame: int) -> tuple[Tensor, Tensor]:
        after_frame()
        mouse, buttons = player.controls()
        going = (frame < stop)[:, None]
        return mouse * going, buttons & going

    return play(world, controls, frames, encode, size, draw, advance)


class MemoryLoader:
    """Random windows of episodes in memory, in the form that trainers read; endless, so an epoch never ends."""

    epoch = 0

    def __init__(self, data: Episodes, window: int, batch_size: int, seed: int = 0) -> None:
        self._data, self._window, self._batch_size = data, window, batch_size
        self._seed, self._seen = seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data, device = self._data, self._data.mouse.device
        frames = data.mouse.shape[1]
        steps = torch.arange(self._window, device=device)
        while True:
            generator = torch.Generator(device=device).manual_seed(self._seed * 1_000_003 + self._seen)
            episode = torch.randint(len(data), (self._batch_size, 1), generator=generator, device=device)
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
