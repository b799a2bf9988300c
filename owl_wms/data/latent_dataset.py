"""The rendered game as a data set of latents: play, render, encode, store, one row of an `NpyTable` per episode.

Several players act at once as a batch, each in a world of its own. A stored frame is the picture after `60 / fps` game
frames under one control, so its controls are those that led to it.

Usage:
    encoder = load_encoder(None, "examples/demo/demo_vae.yml", "examples/demo/demo_vae.safetensors").to(device)
    make_game_latents("data/game", encoder, episodes=64, frames=240, fps=20, first_seed=10_000_000)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from owl_wms.data.game_controls import ScriptedPlayer
from owl_wms.data.game_world import FRAMES_PER_SECOND, GameWorld
from owl_wms.data.npy_table import NpyTableWriter
from owl_wms.errors import ConfigError

LATENT_COLUMN = "depth_latent"  # upstream's name for latents of colour and depth
_WARM_UP = 20  # game frames before the first stored one


@torch.no_grad()
def make_game_latents(
    path: Path | str,
    encoder: nn.Module,
    *,
    episodes: int,
    frames: int,
    fps: int = 20,
    first_seed: int = 10_000_000,
    batch: int = 8,
    size: tuple[int, int] = (360, 640),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Append episodes of scripted play to a table with columns depth_latent, mouse, buttons, seed, fps.

    Args:
        path: the table's folder; created when absent.
        encoder: frames [b, 4, H, W] in [-1, 1] -> latents [b, c, h, w]; its parameters say device and precision.
        episodes: rows to write.
        frames: stored frames in each.
        fps: stored frames a second, a divisor of 60.
        first_seed: seed of the first world; episode i plays in world first_seed + i.
        batch: players at once.
        size: height and width of rendered frames.
        progress: called with (frames done, frames in all).

    Returns:
        Rows written.

    Raises:
        ConfigError: a number below 1, or fps that does not divide 60.
        DataError: the folder holds a table of other columns.
    """
    for name, value in {"episodes": episodes, "frames": frames, "fps": fps, "batch": batch}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", key=name)
    if FRAMES_PER_SECOND % fps:
        raise ConfigError(f"fps must divide {FRAMES_PER_SECOND}, got {fps}", key="fps")
    writer = NpyTableWriter(path, (LATENT_COLUMN, "mouse", "buttons"), columns=("seed", "fps"))
    for start in range(0, episodes, batch):
        players = min(batch, episodes - start)
        done = start * frames

        def report(frame: int, done: int = done, players: int = players) -> None:
            if progress is not None:
                progress(done + frame * players, episodes * frames)

        latents, mouse, buttons = _play(encoder, first_seed + start, players, frames, fps, size, report)
        for player in range(players):
            arrays = {LATENT_COLUMN: latents[player], "mouse": mouse[player], "buttons": buttons[player]}
            writer.append(arrays, seed=first_seed + start + player, fps=fps)
    return episodes


def _play(
    encoder: nn.Module,
    seed: int,
    players: int,
    frames: int,
    fps: int,
    size: tuple[int, int],
    report: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 latents [players, frames, c, h, w], mouse [players, frames, 2], uint8 buttons [players, frames, 11]."""
    weight = next(encoder.parameters())
    world = GameWorld(seed, players, weight.device)
    script = ScriptedPlayer(world)
    for _ in range(_WARM_UP):
        world.step(*script.controls())
    latents: list[Tensor] = []
    mice: list[Tensor] = []
    held: list[Tensor] = []
    for frame in range(frames):
        mouse, buttons = script.controls()
        for _ in range(FRAMES_PER_SECOND // fps):
            world.step(mouse, buttons)
        picture = world.render(height=size[0], width=size[1]).to(weight.dtype)
        latents.append(encoder(picture).float().cpu())
        mice.append(mouse.float().cpu())
        held.append(buttons.to(torch.uint8).cpu())
        report(frame + 1)
    stacked = [torch.stack(parts, dim=1).numpy() for parts in (latents, mice, held)]
    return stacked[0], stacked[1], stacked[2]
