"""Sources of pictures: anything that turns one set of controls into one picture.

`InteractivePipeline` is a source backed by a model; `GameSource` is the rendered game itself, so that the page, the
network and the codec can be tried before there is a model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import FRAME_SIZE, GameWorld
from owl_wms.inference.controls import GAME_CONTROLS, Button
from owl_wms.inference.pixels import to_uint8

_WARM_UP = 30  # game frames
WORLDS_APART = 1000  # seeds of twins


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture, or several that one set of controls gave, and what they cost.

    Attributes:
        image: uint8 [H, W, 3] on the CPU, RGB (or BGR where that was asked for).
        index: frames since the last restart, from 0.
        model_ms: time that made the latent, or rendered the game; milliseconds.
        decode_ms: time that made pixels of it, copy to the CPU included; 0 where nothing is decoded.
        later: pictures to be shown after `image` at the same rate, before the next controls are taken.
    """

    image: np.ndarray
    index: int
    model_ms: float
    decode_ms: float
    later: tuple[np.ndarray, ...] = ()


class Source(Protocol):
    """Describes something that can be played; one thread at a time uses it.

    Attributes:
        controls: its buttons, in the order in which it takes them.
    """

    controls: tuple[Button, ...]

    def __call__(self, mouse: Tensor, buttons: Tensor) -> Frame:
        """Returns the next frame. mouse [2] nominally -1 to 1; buttons bool [n_buttons] in the order of `controls`."""

    def restart(self) -> None:
        """Begins the same world again."""

    def new_world(self, seed: int) -> None:
        """Begins the world of a seed, 0 to 2**31 - 1; the same seed gives the same world."""

    def change_steps(self, by: int) -> int:
        """Adds `by` sampling steps per frame; returns how many there are now (0 where there are none)."""

    def twin(self, number: int) -> Source:
        """Returns the source of player `number` (from 1): models are shared, world and history are its own."""

    def describe(self) -> dict[str, Any]:
        """Returns what runs, as JSON: `source`, `backend`, `reason`, `steps`, `seed`; some say more."""


class GameSource:
    """The rendered game as a source, as it is or through an autoencoder.

    Args:
        seed: world to start in.
        repeat: game frames (of 1/60 s) a step; they share one control.
        height, width: of the rendered picture; an autoencoder with a fixed output ignores them.
        encode: [1, 4, H, W] in [-1, 1] to latents [1, c, h, w]; None shows the rendering.
        decode: [1, 1, c, h, w] to [1, 1, C, H, W], as the bridge makes it. With `encode` only.
        device: where to render.
    """

    controls = GAME_CONTROLS

    def __init__(
        self,
        seed: int = 0,
        *,
        repeat: int = 1,
        height: int = FRAME_SIZE[0],
        width: int = FRAME_SIZE[1],
        encode: Callable[[Tensor], Tensor] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if (encode is None) != (decode is None):
            raise ValueError("encode and decode must be given together or not at all")
        self._seed, self._size, self._device = seed, (height, width), torch.device(device)
        self._repeat = repeat
        self._encode, self._decode = encode, decode
        self._index = 0
        self._world = self._enter()

    @torch.no_grad()
    def __call__(self, mouse: Tensor, buttons: Tensor) -> Frame:
        """See `Source`."""
        began = time.perf_counter()
        for _ in range(self._repeat):
            self._world.step(mouse.view(1, 2).to(self._device), buttons.view(1, -1).to(self._device))
        picture = render(self._world, height=self._size[0], width=self._size[1])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        rendered = time.perf_counter()
        if self._encode is not None and self._decode is not None:
            picture = self._decode(self._encode(picture).unsqueeze(0))[0]
        image = to_uint8(picture[0]).cpu().numpy()
        done = time.perf_counter()
        index, self._index = self._index, self._index + 1
        decode_ms = (done - rendered) * 1e3 if self._decode is not None else 0.0
        return Frame(image=image, index=index, model_ms=(rendered - began) * 1e3, decode_ms=decode_ms)

    def _enter(self) -> GameWorld:
        """A fresh world in which the scripted player has already turned away from the nearest wall."""
        world = GameWorld(self._seed, 1, self._device)
        script = ScriptedPlayer(world)
        for _ in range(_WARM_UP):
            world.step(*script.controls())
        return world

    def restart(self) -> None:
        """See `Source`."""
        self.new_world(self._seed)

    def new_world(self, seed: int) -> None:
        """See `Source`."""
        self._seed, self._index = seed, 0
        self._world = self._enter()

    def twin(self, number: int) -> GameSource:
        """Another world behind the same autoencoder; see `Source`."""
        twin = copy.copy(self)
        twin._seed += number * WORLDS_APART
        twin._index, twin._world = 0, twin._enter()
        return twin

    def change_steps(self, by: int) -> int:
        """The game has none."""
        return 0

    def describe(self) -> dict[str, Any]:
        """See `Source`."""
        stats = describe_decode(self._decode) if self._decode is not None else {"backend": "none", "reason": "rendered"}
        name = "rendered game" if self._decode is None else "rendered game through the autoencoder"
        return {
            "source": name,
            "steps": 0,
            "seed": self._seed,
            "height": self._size[0],
            "width": self._size[1],
            **stats,
        }


def describe_decode(decode: Any) -> dict[str, Any]:
    """Describes which backend a decode function uses and why, from its `stats()`; a plain function is PyTorch."""
    stats = getattr(decode, "stats", None)
    if stats is None:
        return {"backend": "pytorch", "reason": "a plain function decodes"}
    found = stats()
    read = found.get if isinstance(found, dict) else lambda key, default=None: getattr(found, key, default)
    return {"backend": str(read("backend", "unknown")), "reason": str(read("reason", "") or "")}
