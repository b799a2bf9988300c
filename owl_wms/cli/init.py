"""`owl-wms init`: a folder with a first configuration that fits the data, and a README that says what to run in it.

Usage:
    owl-wms init my_world --from data/mine --vae vae.yml --vae-checkpoint vae.pt
    owl-wms init my_world                                  # for the rendered game
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from owl_wms.cli import _bounds as bounds
from owl_wms.files import at_home, one_line


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make; the run's checkpoints will be in it.")],
    table: Annotated[
        Path | None, typer.Option("--from", help="Table of clips to train on; the rendered game if left out.")
    ] = None,
    vae: Annotated[Path | None, typer.Option("--vae", "--vae-config", help="YAML of the data's autoencoder.")] = None,
    vae_checkpoint: Annotated[Path | None, typer.Option(help="Weights of that autoencoder.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: what the table states.")] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the configuration and the README of an earlier run.")
    ] = False,
) -> None:
    """Write a first configuration that fits the data."""
    from owl_wms.cli import _shared as shared
    from owl_wms.configs.strict import read_yaml
    from owl_wms.configs.world import parse_world
    from owl_wms.data.npy_table import NpyTable
    from owl_wms.data.starter import Start
    from owl_wms.errors import ConfigError
    from owl_wms.whole import written_whole

    files = folder / "world.yml", folder / "README.md"
    shared.check_folder(folder)
    for file in files:
        shared.check_absent(file, overwrite=overwrite)
    bounds.check_number("--fps", fps, bounds.FPS)
    bounds.check_together("--vae", vae, "--vae-checkpoint", vae_checkpoint)
    if vae_checkpoint is not None and not at_home(vae_checkpoint).exists():
        raise ConfigError(f"{vae_checkpoint}: no such file or folder", path=vae_checkpoint, key="vae_checkpoint")
    if table is None and vae is not None:
        raise ConfigError("--vae goes with --from: the rendered game has its own autoencoder", key="vae")
    if table is None:
        start = Start.of_game(folder / "data")
    else:
        start = Start.of_table(NpyTable(table), vae_config=vae, vae_checkpoint=vae_checkpoint, fps=fps)
    try:
        for file, text in zip(files, (start.configuration(folder), start.readme()), strict=True):
            with written_whole(file) as draft:
                draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {one_line(error.strerror or error)}", path=folder) from error
    parse_world(read_yaml(files[0]), path=files[0])  # a path with a `$` in it is found here, not by the first `train`
    height, width = start.grid
    typer.echo(
        f"{files[0]}: latents {start.channels}x{height}x{width}, {start.n_buttons} buttons, {start.fps} frames per "
        f"second, vae_scale {start.scale:g}"
    )
    for remark in start.remarks:
        typer.echo(f"note: {remark}")
    first = "" if table is not None else f"owl-wms data make {start.table}, then "
    typer.echo(f"next: {first}owl-wms train {files[0]}")
