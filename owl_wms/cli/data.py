"""`owl-wms data`: make and inspect data sets of latents.

Usage:
    owl-wms data make data/game --episodes 64 --frames 240 --fps 20
    owl-wms data show data/game
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from owl_wms.configs.paths import EXAMPLES

_DEMO_VAE = EXAMPLES / "demo"
app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Make and inspect data sets of latents."""


@app.command()
def make(
    path: Annotated[Path, typer.Argument(help="Folder of the table; new worlds are appended to one that exists.")],
    episodes: int = typer.Option(16, min=1, help="Episodes to play, each in a world of its own."),
    frames: int = typer.Option(240, min=1, help="Stored frames in each episode."),
    fps: int = typer.Option(20, min=1, help="Stored frames a second; must divide 60."),
    seed: int = typer.Option(10_000_000, help="Seed of the first world."),
    batch: int = typer.Option(8, min=1, help="Players at once."),
    vae_config: Annotated[
        Path, typer.Option(help="The autoencoder's configuration.", show_default="the demo's")
    ] = _DEMO_VAE / "demo_vae.yml",
    vae_checkpoint: Annotated[Path, typer.Option(help="Its weights.", show_default="the demo's")] = (
        _DEMO_VAE / "demo_vae.safetensors"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
) -> None:
    """Render the game, encode it, and store latents, mouse and buttons as an .npy table."""
    from owl_wms.cli import _shared as shared
    from owl_wms.data.latent_dataset import make_game_latents
    from owl_wms.vae import load_encoder

    shared.check_number("--seed", seed, shared.SEEDS)
    where = shared.choose_device(device)
    shared.check_folder(path)
    encoder = load_encoder(None, vae_config, vae_checkpoint).to(where, shared.choose_dtype(None, where))
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("frames", total=episodes * frames)
        rows = make_game_latents(
            path,
            encoder,
            episodes=episodes,
            frames=frames,
            fps=fps,
            first_seed=seed,
            batch=batch,
            encoder_name=vae_checkpoint.name,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    typer.echo(f"{path}: {rows} episodes of {frames} frames at {fps} a second")


@app.command()
def show(path: Annotated[Path, typer.Argument(help="Folder of a table.")]) -> None:
    """Say what a table holds, after checking that every array of it can be opened."""
    from owl_wms.data.npy_table import NpyTable

    table = NpyTable(path)
    lengths = [row.length for row in table.rows]
    typer.echo(f"{path}: {len(lengths)} clips, {sum(lengths)} frames, columns {', '.join(table.columns)}")
    if lengths:
        typer.echo(f"frames in a clip: {min(lengths)} to {max(lengths)}")
        for column in table.columns:
            first = table.slice(0, column, 0, 1)
            typer.echo(f"{column}: {first.dtype} {list(first.shape[1:])} a frame")
