"""Beginnings for play and sampling: latents with the controls that belong to them.

From a file (`.pt` or `.safetensors` with `latents`, `mouse`, `buttons`), from a row of a table (`TABLE#12`), or
rendered: the scripted player walks through the game and an encoder turns what it sees into latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from owl_wms.data.npy_table import LATENT_COLUMN, NpyTable
from owl_wms.data.starter import button_names
from owl_wms.errors import DataError
from owl_wms.files import at_home
from owl_wms.game.buttons import BUTTONS
from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import FRAME_SIZE, GameWorld
from owl_wms.media.arrays import read_arrays
from owl_wms.media.read_facts import read_facts

NAMES = ("latents", "mouse", "buttons")
CONTEXT_FRAMES = 12
"""Frames of a beginning that is rendered, or taken from a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One beginning.

    Attributes:
        latents: [1, n, c, h, w] in the model's scale (divided by image_scale).
        mouse: [1, n, 2].
        buttons: [1, n, n_buttons], 0 or 1.
        later: mouse [1, m, 2] and buttons [1, m, n_buttons] that were recorded after the beginning; None if none were.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor
    later: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Context:
        """Returns the context on another device."""
        later = None if self.later is None else (self.later[0].to(device, dtype), self.later[1].to(device, dtype))
        return Context(**{name: getattr(self, name).to(device, dtype) for name in NAMES}, later=later)

    def controls_after(self, frames: int) -> tuple[Tensor, Tensor] | None:
        """Returns the recorded controls of the next frames, begun again where they end; None if none were recorded.

        Args:
            frames: how many.

        Returns:
            mouse [1, frames, 2] and buttons [1, frames, n_buttons].
        """
        if self.later is None:
            return None
        mouse, buttons = self.later
        places = torch.arange(frames, device=mouse.device) % mouse.shape[1]
        return mouse[:, places], buttons[:, places]


def fit_buttons(held: Tensor, n_buttons: int) -> Tensor:
    """Returns the game's buttons [..., k] as [..., n_buttons]: the first ones, and zeros for those that it lacks."""
    missing = max(0, n_buttons - held.shape[-1])
    return torch.nn.functional.pad(held, (0, missing))[..., :n_buttons]


def load_contexts(
    path: Path | str,
    *,
    channels: int,
    grid: tuple[int, int],
    n_buttons: int,
    scale: float,
    names: Sequence[str] | None = None,
) -> list[Context]:
    """Returns the beginnings in a file, or the one of a table's row.

    Args:
        path: `.pt` or `.safetensors` with `latents` [k, n, c, h, w] or [n, c, h, w] as an encoder gives them, `mouse`
            and `buttons` with the same leading dimensions. Or `TABLE#12`: the first `CONTEXT_FRAMES` frames of row 12
            of a table, counted from 0, which also brings the controls that were recorded after them.
        channels, grid, n_buttons: what the model takes; `grid` is height and width of its latents.
        scale: the latents are divided by it, after they were multiplied by the `vae_scale` that the file states.
        names: the model's buttons; a table that has the same ones in another order is refused.

    Returns:
        k beginnings (1 for a row, and for a file without the first dimension).

    Raises:
        DataError: the file cannot be read, or holds something else; says which tensor and why.
    """
    path, later = at_home(path), None
    row = _row_of(path)
    if row is None:
        tensors, scale = _read(path), scale / (read_facts(path).vae_scale or 1.0)
    else:
        tensors = _read_row(*row)
        stored = button_names(row[0], n_buttons)
        if names is not None and stored != tuple(names) and set(stored) == set(names):
            text = f"its buttons are {', '.join(stored)}, those of the model {', '.join(names)}"
            remedy = "each column would press another button: give a table in the model's order"
            raise DataError(f"{path}: {text}; {remedy}", path=path)
        tensors, later = _split(tensors, CONTEXT_FRAMES)
    for name in NAMES:
        if not isinstance(tensors.get(name), Tensor):
            raise DataError(f"{path}: must hold the tensors {', '.join(NAMES)}; {name} is missing", path=path)
    latents, mouse, buttons = (tensors[name].float() for name in NAMES)
    if latents.ndim == 4:
        latents, mouse, buttons = latents[None], mouse[None], buttons[None]
    wanted = {"latents": (channels, *grid), "mouse": (2,), "buttons": (n_buttons,)}
    for name, tensor in zip(NAMES, (latents, mouse, buttons), strict=True):
        if tensor.shape[:2] != latents.shape[:2] or tuple(tensor.shape[2:]) != wanted[name] or latents.ndim != 5:
            raise DataError(
                f"{path}: {name} must be [k, n, {', '.join(map(str, wanted[name]))}], got {list(tensor.shape)}",
                path=path,
            )
        if not tensor.isfinite().all():
            raise DataError(f"{path}: {name} has values that are not finite", path=path)
    return [
        Context(latents=latents[i : i + 1] / scale, mouse=mouse[i : i + 1], buttons=buttons[i : i + 1], later=later)
        for i in range(latents.shape[0])
    ]


def _row_of(path: Path) -> tuple[Path, int] | None:
    """Splits `TABLE#12`; None for what is a file, or no folder.

    Raises:
        DataError: a table without a row.
    """
    table, sign, number = str(path).rpartition("#")
    if sign and number.isdecimal() and len(number) < 12 and Path(table).is_dir():
        return Path(table), int(number)
    if path.is_dir():
        count = len(NpyTable(path).rows)
        text = f"is a table: say which of its {count} rows to begin from, as {path}#0 to {path}#{count - 1}"
        raise DataError(f"{path}: {text}" if count else f"{path}: is a table without rows", path=path)
    return None


def _read_row(path: Path, index: int) -> Mapping[str, Tensor]:
    table = NpyTable(path)
    if index >= len(table.rows):
        last = f"{path}#{len(table.rows) - 1} is the last" if table.rows else "the table has no rows"
        raise DataError(f"{path}#{index}: no such row; {last}", path=path, index=index)
    length = table.rows[index].length
    columns = {"latents": LATENT_COLUMN, "mouse": "mouse", "buttons": "buttons"}
    found = {name: column for name, column in columns.items() if column in table.columns}
    return {name: torch.from_numpy(table.slice(index, column, 0, length)) for name, column in found.items()}


def _split(tensors: Mapping[str, Tensor], frames: int) -> tuple[Mapping[str, Tensor], tuple[Tensor, Tensor] | None]:
    """Splits a clip's tensors [n, ...] into its first frames and the controls after them, [1, n - frames, ...]."""
    first = {name: tensor[:frames] for name, tensor in tensors.items()}
    if not {"mouse", "buttons"} <= tensors.keys() or len(tensors["mouse"]) <= frames:
        return first, None
    return first, (tensors["mouse"][None, frames:].float(), tensors["buttons"][None, frames:].float())


def _read(path: Path) -> Mapping[str, Tensor]:
    loaded = read_arrays(path)
    if not isinstance(loaded, Mapping):
        wanted = "a beginning is a file of latents, mouse and buttons by name, as `owl-wms sample --latents` writes"
        raise DataError(f"{path}: holds one {type(loaded).__name__} without a name; {wanted}", path=path)
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
