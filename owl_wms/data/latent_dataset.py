"""Makes a data set of latents of the rendered game: play, render, encode, store, one row of an `NpyTable` per episode.

Several players act at once as a batch, each in a world of its own. A stored frame is the picture after `60 / fps` game
frames under one control, so its controls are those that led to it.

Usage:
    encoder = load_encoder(None, "examples/demo/demo_vae.yml", "examples/demo/demo_vae.safetensors").to(device)
    make_game_latents("data/game", encoder, episodes=64, frames=240, fps=20, first_seed=10_000_000)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from owl_wms.data.npy_table import LATENT_COLUMN, NpyTableWriter
from owl_wms.errors import ConfigError, DataError
from owl_wms.game.controls import RestlessPlayer, ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import FRAME_SIZE, FRAMES_PER_SECOND, GameWorld
from owl_wms.media.facts import Facts

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
    size: tuple[int, int] = FRAME_SIZE,
    channels: int = 4,
    encoder_name: str = "",
    vae_sha256: str | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Append episodes of play by `RestlessPlayer` to a table with columns depth_latent, mouse, buttons, seed, fps.

    A table holds every world once, at one frame rate, through one autoencoder. The last is stored as a digest in
    source.json; a table with rows and without that file may be appended to, and stays without it.

    Args:
        path: the table's folder; created when absent.
        encoder: frames [b, channels, H, W] in [-1, 1] -> latents [b, c, h, w]; its parameters say device and precision.
        episodes: rows to write.
        frames: stored frames in each.
        fps: stored frames per second, a divisor of 60.
        first_seed: seed of the first world; episode i plays in world first_seed + i.
        batch: players at once.
        size: height and width of rendered frames.
        channels: how many of red, green, blue and depth the encoder takes.
        encoder_name: for messages, beside the digest of its weights.
        vae_sha256: of the autoencoder's file of weights, stored with the table's facts.
        resume: make only those of the worlds that the table lacks, after a run that was stopped.
        progress: called with (frames done, frames in all).

    Returns:
        Rows written.

    Raises:
        ConfigError: a number below 1, or fps that does not divide 60.
        DataError: the folder holds a table of other columns, one of these worlds, another frame rate, or latents of
            another autoencoder; or it cannot be written.
    """
    for name, value in {"episodes": episodes, "frames": frames, "fps": fps, "batch": batch}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", key=name)
    if FRAMES_PER_SECOND % fps:
        raise ConfigError(f"fps must divide {FRAMES_PER_SECOND}, got {fps}", key="fps")
    writer = NpyTableWriter(path, (LATENT_COLUMN, "mouse", "buttons"), columns=("seed", "fps"), begin=False)
    wanted = list(range(first_seed, first_seed + episodes))
    if resume:
        held = {row.get("seed") for row in writer.rows if not row.get("missing")}
        wanted = [seed for seed in wanted if seed not in held]
    _require_new_worlds(writer, first_seed, 0 if resume else episodes, fps)
    _require_one_encoder(writer, encoder, encoder_name, fps, vae_sha256)
    done = 0
    for seeds in _in_a_row(wanted, batch):

        def report(frame: int, done: int = done, players: int = len(seeds)) -> None:
            if progress is not None:
                progress(done * frames + frame * players, len(wanted) * frames)

        shape = channels, *size
        latents, mouse, buttons = _play(encoder, seeds[0], len(seeds), frames, fps, shape, report)
        for player, seed in enumerate(seeds):
            arrays = {LATENT_COLUMN: latents[player], "mouse": mouse[player], "buttons": buttons[player]}
            writer.append(arrays, seed=seed, fps=fps)
        done += len(seeds)
    return len(wanted)


def _in_a_row(seeds: list[int], most: int) -> Iterator[list[int]]:
    """Yields seeds one behind the other, at most so many at once: those of worlds that are played together."""
    found: list[int] = []
    for seed in seeds:
        if found and (len(found) == most or seed != found[-1] + 1):
            yield found
            found = []
        found.append(seed)
    if found:
        yield found


def _require_new_worlds(writer: NpyTableWriter, first_seed: int, episodes: int, fps: int) -> None:
    present = [row for row in writer.rows if not row.get("missing")]  # a clip that was marked so may be made anew
    rates = sorted({row["fps"] for row in present if "fps" in row} - {fps})
    if rates:
        held = " and ".join(map(str, rates))
        raise DataError(
            f"{writer.path}: holds episodes at {held} frames per second, got fps (--fps) {fps}; ask for {rates[0]}, or "
            "choose another folder",
            path=writer.path,
        )
    seeds = sorted(row["seed"] for row in present if "seed" in row)
    taken = [seed for seed in seeds if first_seed <= seed < first_seed + episodes]
    if taken:
        raise DataError(
            f"{writer.path}: holds {len(taken)} of the worlds {first_seed} to {first_seed + episodes - 1} already, "
            f"{taken[0]} to {taken[-1]}; first_seed (--seed) {seeds[-1] + 1} is the next that is free, --resume makes "
            "only those that are lacking, or choose another folder",
            path=writer.path,
        )


def _require_one_encoder(
    writer: NpyTableWriter, encoder: nn.Module, name: str, fps: int, vae_sha256: str | None
) -> None:
    facts = Facts(fps=fps, vae=name or None, vae_sha256=vae_sha256, layout="n c h w")
    own = {"autoencoder": name, "sha256": _digest(encoder), **facts.to_dict()}
    if not len(writer):
        writer.set_source(own)
        return
    held = writer.source
    if held is not None and held.get("sha256") != own["sha256"]:
        raise DataError(
            f"{writer.path}: holds latents of {_named(held)}, got {_named(own)} (--vae-config, --vae-checkpoint); "
            "give the same weights, or choose another folder",
            path=writer.path,
        )


def _digest(encoder: nn.Module) -> str:
    """SHA-256 of the weights in bfloat16, to which both precisions of the command round: a CPU and a GPU agree."""
    found = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        rounded = value.detach().cpu().to(torch.bfloat16).contiguous()
        found.update(f"{key} {list(rounded.shape)} ".encode())
        found.update(rounded.view(torch.uint8).numpy().tobytes() if rounded.dim() else str(rounded.item()).encode())
    return found.hexdigest()


def _named(source: Mapping[str, object]) -> str:
    return f"{source.get('autoencoder') or 'an autoencoder'} with weights {str(source.get('sha256'))[:12]}"


def _play(
    encoder: nn.Module,
    seed: int,
    players: int,
    frames: int,
    fps: int,
    shape: tuple[int, int, int],
    report: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 latents [players, frames, c, h, w], mouse [players, frames, 2], uint8 buttons [players, frames, 11]."""
    weight = next(encoder.parameters())
    world = GameWorld(seed, players, weight.device)
    script = ScriptedPlayer(world)
    for _ in range(_WARM_UP):
        world.step(*script.controls())
    player = RestlessPlayer(world)
    latents: list[Tensor] = []
    mice: list[Tensor] = []
    held: list[Tensor] = []
    for frame in range(frames):
        mouse, buttons = player.controls()
        for _ in range(FRAMES_PER_SECOND // fps):
            world.step(mouse, buttons)
        picture = render(world, height=shape[1], width=shape[2]).to(weight.dtype)
        latents.append(encoder(picture[:, : shape[0]]).float().cpu())
        mice.append(mouse.float().cpu())
        held.append(buttons.to(torch.uint8).cpu())
        report(frame + 1)
    stacked = [torch.stack(parts, dim=1).numpy() for parts in (latents, mice, held)]
    return stacked[0], stacked[1], stacked[2]
