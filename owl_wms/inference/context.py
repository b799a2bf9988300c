"""Beginnings for play and sampling: latents with the controls that belong to them.

From a file (`.pt` or `.safetensors` with `latents`, `mouse`, `buttons`), or rendered: the scripted player walks
through the game and an encoder turns what it sees into latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import BUTTONS, FRAME_SIZE, GameWorld
from owl_wms.media.arrays import read_arrays

NAMES = ("latents", "mouse", "buttons")


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One beginning.

    Attributes:
        latents: [1, n, c, h, w] in the model's scale (divided by image_scale).
        mouse: [1, n, 2].
        buttons: [1, n, n_buttons], 0 or 1.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Context:
        """The same elsewhere."""
        return Context(**{name: getattr(self, name).to(device, dtype) for name in NAMES})


def fit_buttons(held: Tensor, n_buttons: int) -> Tensor:
    """Returns the game's buttons [..., k] as [..., n_buttons]: the first ones, and zeros for those that it lacks."""
    missing = max(0, n_buttons - held.shape[-1])
    return torch.nn.functional.pad(held, (0, missing))[..., :n_buttons]


def load_contexts(path: Path | str, *, channels: int, side: int, n_buttons: int, scale: float) -> list[Context]:
    """Beginnings from a file.

    Args:
        path: `.pt` or `.safetensors` with `latents` [k, n, c, h, w] or [n, c, h, w] as an encoder gives them, `mouse`
            and `buttons` with the same leading dimensions.
        channels, side, n_buttons: what the model takes.
        scale: the latents are divided by it.

    Returns:
        k beginnings (1 for a file without the first dimension).

    Raises:
        DataError: the file cannot be read, or holds something else; says which tensor and why.
    """
    path = Path(path)
    tensors = _read(path)
    for name in NAMES:
        if not isinstance(tensors.get(name), Tensor):
            raise DataError(f"{path}: must hold the tensors {', '.join(NAMES)}; {name} is missing", path=path)
    latents, mouse, buttons = (tensors[name].float() for name in NAMES)
    if latents.ndim == 4:
        latents, mouse, buttons = latents[None], mouse[None], buttons[None]
    wanted = {"latents": (channels, side, side), "mouse": (2,), "buttons": (n_buttons,)}
    for name, tensor in zip(NAMES, (latents, mouse, buttons), strict=True):
        if tensor.shape[:2] != latents.shape[:2] or tuple(tensor.shape[2:]) != wanted[name] or latents.ndim != 5:
            raise DataError(
                f"{path}: {name} must be [k, n, {', '.join(map(str, wanted[name]))}], got {list(tensor.shape)}",
                path=path,
            )
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} has values that are not finite", path=path)
    return [
        Context(latents=latents[i : i + 1] / scale, mouse=mouse[i : i + 1], buttons=buttons[i : i + 1])
        for i in range(latents.shape[0])
    ]


def _read(path: Path) -> Mapping[str, Tensor]:
    loaded = read_arrays(path)
    if not isinstance(loaded, Mapping):
        raise DataError(f"{path}: must hold a mapping of tensors, got {type(loaded).__name__}", path=path)
    return loaded


@torch.no_grad()
def render_context(
    encode: Callable[[Tensor], Tensor],
    *,
    frames: int,
    scale: float,
    repeat: int = 1,
    seed: int = 0,
    n_buttons: int = len(BUTTONS),
    size: tuple[int, int] = FRAME_SIZE,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Context:
    """Renders a beginning of the game itself.

    Args:
        encode: frames [k, 4, *size] in [-1, 1] to latents [k, c, h, w].
        frames: how many, at least 1.
        scale: the latents are divided by it.
        repeat: game frames (of 1/60 s) in one of the model's; they share one control.
        seed: of the world; the scripted player follows from it.
        n_buttons: how many the model takes; the game's first ones, and zeros for what it does not have.
        size: height and width to render, in pixels.
        device: where to render and encode.
        progress: called with (frames done, frames to do).

    Returns:
        fp32, on the device; frame k was rendered after its own controls were applied.
    """
    world = GameWorld(seed, 1, device)
    player = ScriptedPlayer(world)
    latents, mice, buttons = [], [], []
    for done in range(frames):
        progress(done, frames)
        mouse, held = player.controls()
        for _ in range(repeat):
            world.step(mouse, held)
        latents.append(encode(render(world, height=size[0], width=size[1])).float() / scale)
        mice.append(mouse.float())
        buttons.append(fit_buttons(held.float(), n_buttons))
    return Context(latents=torch.stack(latents, 1), mouse=torch.stack(mice, 1), buttons=torch.stack(buttons, 1))
