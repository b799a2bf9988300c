"""`owl-wms data`: make and inspect data sets of latents.

Usage:
    owl-wms data make data/game --episodes 64 --frames 240 --fps 20
    owl-wms data import clips/ --out data/mine --fps 12
    owl-wms data show data/mine --vae-config C --vae-checkpoint K --sheet frames.png
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from owl_wms.cli import _bounds as bounds
from owl_wms.cli import say
from owl_wms.cli._options import Device
from owl_wms.configs.paths import DEMO_VAE

MOST_CHANNELS = 16
"""More would fill the screen: their range is shown."""
app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Make and inspect data sets of latents."""


@app.command()
def make(
    path: Annotated[Path, typer.Argument(help="Folder of the table; new worlds are appended to one that exists.")],
    episodes: int = typer.Option(16, min=1, help="Episodes to play, each in a world of its own."),
    frames: int = typer.Option(240, min=1, help="Stored frames in each episode."),
    fps: int = typer.Option(20, min=1, help="Stored frames per second; must divide 60."),
    seed: int = typer.Option(10_000_000, help="Seed of the first world."),
    batch: int = typer.Option(8, min=1, help="Players at once."),
    vae_config: Annotated[Path, typer.Option(help="YAML of the autoencoder.", show_default="the demo's")] = DEMO_VAE[0],
    vae_checkpoint: Annotated[
        Path, typer.Option(help="Weights of the autoencoder.", show_default="the demo's")
    ] = DEMO_VAE[1],
    resume: Annotated[bool, typer.Option("--resume", help="Make only the worlds that the table lacks.")] = False,
    device: Device = None,
) -> None:
    """Render the game, encode it, and store latents, mouse and buttons as an .npy table."""
    from owl_wms.cli import _shared as shared
    from owl_wms.configs import pictures_of
    from owl_wms.data.latent_dataset import make_game_latents
    from owl_wms.errors import ConfigError
    from owl_wms.media.read_facts import weights_digest
    from owl_wms.vae import load_encoder

    bounds.check_number("--seed", seed, bounds.SEEDS)
    where = shared.choose_device(device)
    shared.check_folder(path)
    channels, size = pictures_of(vae_config)
    if channels > 4:
        raise ConfigError(
            f"{vae_config}: encodes {channels} channels, the game has 4; name another autoencoder", path=vae_config
        )
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
            size=size,
            channels=channels,
            encoder_name=vae_checkpoint.name,
            vae_sha256=weights_digest(vae_checkpoint),
            resume=resume,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(f"{path}: {rows} episodes of {frames} frames at {fps} per second")


@app.command(name="import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Array file, .tar, video, a folder of them, a Hugging Face data set's folder, or s3://bucket/prefix."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the table; clips that it lacks are added.")],
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: what the files state.")] = None,
    vae_config: Annotated[Path | None, typer.Option(help="YAML of the autoencoder that encodes videos.")] = None,
    vae_checkpoint: Annotated[Path | None, typer.Option(help="Weights of that autoencoder.")] = None,
    resize: Annotated[bool, typer.Option(help="Scale frames of another size instead of refusing them.")] = False,
    no_mouse: Annotated[bool, typer.Option("--no-mouse", help="There is no mouse: store one at rest.")] = False,
    batch: int = typer.Option(8, min=1, max=bounds.MOST_FRAMES, help="Frames encoded at once."),
    skip_bad: Annotated[bool, typer.Option(help="Leave out clips that cannot be used, each with one line.")] = False,
    device: Device = None,
) -> None:
    """Bring clips of latents, or videos with controls, into an .npy table; run it again to go on."""
    from owl_wms.cli import _shared as shared
    from owl_wms.data.importing import FrameEncoder, import_clips
    from owl_wms.errors import DataError

    bounds.check_number("--fps", fps, bounds.FPS)
    shared.check_folder(out)
    where = shared.choose_device(device)
    bounds.check_together("--vae-config", vae_config, "--vae-checkpoint", vae_checkpoint)
    encoder: FrameEncoder | None = None
    if vae_config is not None and vae_checkpoint is not None:
        encoder = _frame_encoder(vae_config, vae_checkpoint, where, batch, resize)
    console = Console(stderr=True)

    def left_out(error: DataError) -> None:
        say(console, f"left out: {error}")

    with console.status("importing") as status:
        done = import_clips(
            source,
            out,
            fps=fps,
            encoder=encoder,
            no_mouse=no_mouse,
            skip_bad=left_out if skip_bad else None,
            progress=lambda counts, name: status.update(f"{counts.added} clips, {counts.frames} frames: {name}"),
        )
    more = f", {done.present} were there already" * bool(done.present) + f", {done.skipped} left out" * bool(
        done.skipped
    )
    typer.echo(f"{out}: {done.added} clips, {done.frames} frames added{more}")


def _frame_encoder(config: Path, checkpoint: Path, where: Any, batch: int, resize: bool) -> Any:
    from owl_wms.cli import _shared as shared
    from owl_wms.configs import pictures_of
    from owl_wms.data.importing import FrameEncoder
    from owl_wms.media.facts import Facts
    from owl_wms.media.read_facts import weights_digest

    channels, size = pictures_of(config)
    precision = shared.choose_dtype(None, where)

    @functools.cache
    def module() -> Any:  # loaded for the first frames: a source that cannot be used is refused at once
        return shared.encoder_of(config, checkpoint, where, precision)

    return FrameEncoder(
        encode=lambda frames: module()(frames.to(where, precision)),
        channels=channels,
        size=size,
        batch=batch,
        resize=resize,
        facts=Facts(vae=checkpoint.name, vae_sha256=weights_digest(checkpoint)),
    )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Folder of a table.")],
    vae_config: Annotated[Path | None, typer.Option(help="YAML of the autoencoder, to see frames.")] = None,
    vae_checkpoint: Annotated[Path | None, typer.Option(help="Weights of that autoencoder.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Picture with five decoded frames. Default: frames.png.")] = None,
    device: Device = None,
) -> None:
    """Check every array of a table, print what it holds, and decode five of its frames."""
    from owl_wms.cli import _shared as shared
    from owl_wms.data.npy_table import NpyTable
    from owl_wms.data.starter import button_names
    from owl_wms.data.statistics import describe_table
    from owl_wms.errors import ConfigError, printable

    bounds.check_together("--vae-config", vae_config, "--vae-checkpoint", vae_checkpoint)
    if vae_config is None and sheet is not None:
        raise ConfigError("--sheet needs the autoencoder: give --vae-config and --vae-checkpoint", key="sheet")
    sheet = Path("frames.png") if sheet is None else sheet
    if vae_config is not None:
        shared.check_destination(sheet, ".png", ".jpg", ".webp")
    table = NpyTable(path)
    lengths = [row.length for row in table.rows]
    held = f"{len(lengths)} clips, {sum(lengths)} frames, columns {', '.join(table.columns)}"
    typer.echo(printable(f"{path}: {held}"))
    if not lengths:
        return
    typer.echo(f"frames in a clip: {min(lengths)} to {max(lengths)}")
    for column in table.columns:
        first = table.slice(0, column, 0, 1)
        typer.echo(f"{column}: {first.dtype} {list(first.shape[1:])} per frame")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=len(lengths))
        found = describe_table(table, progress=lambda done, total: bar.update(task, completed=done))
    if found.rates:
        seconds = sum(lengths) / found.rates[0]
        typer.echo(f"frames per second: {', '.join(f'{rate:g}' for rate in found.rates)} ({seconds:.0f} s in all)")
    if len(found.mean) > MOST_CHANNELS:
        means, stds = (f"{min(values):.4f} to {max(values):.4f}" for values in (found.mean, found.std))
        typer.echo(f"{len(found.mean)} channels: means {means}, standard deviations {stds}")
    else:
        for channel, (mean, std) in enumerate(zip(found.mean, found.std, strict=True)):
            typer.echo(f"channel {channel}: mean {mean:.4f}, standard deviation {std:.4f}")
    if found.vae_scale is not None:
        typer.echo(
            f"vae_scale: {found.vae_scale:g} gives latents a standard deviation of 1 (of {found.sampled} frames)"
        )
    if len(found.pressed):
        names = button_names(path, len(found.pressed))
        held = ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(names, found.pressed, strict=True))
        typer.echo(f"buttons held, share of the frames: {held}")
    if len(found.mouse):
        typer.echo(f"mouse: standard deviation {', '.join(f'{axis:.4f}' for axis in found.mouse)}")
    if vae_config is not None and vae_checkpoint is not None:
        _write_sheet(table, vae_config, vae_checkpoint, sheet, shared.choose_device(device))
        typer.echo(f"{sheet}: five decoded frames")


def _write_sheet(table: Any, config: Path, checkpoint: Path, sheet: Path, where: Any) -> None:
    import torch

    from owl_wms.cli import _shared as shared
    from owl_wms.data.npy_table import LATENT_COLUMN
    from owl_wms.errors import DataError
    from owl_wms.runtime import clip_decoder, decode_pieces
    from owl_wms.settings import TensorRTConfig
    from owl_wms.vae import load_decoder

    if LATENT_COLUMN not in table.columns:
        raise DataError(f"{table.path}: has no column {LATENT_COLUMN} to decode", path=table.path)
    picks = [(len(table.rows) * i // 5, i) for i in range(5)]
    places = [(row, table.rows[row].length * (2 * i + 1) // 10) for row, i in picks]
    latents = torch.cat([torch.from_numpy(table.slice(r, LATENT_COLUMN, at, at + 1)) for r, at in places])
    precision = shared.choose_dtype(None, where)
    decoder = load_decoder(None, config, checkpoint).to(where, precision)
    run = clip_decoder(decoder, settings=TensorRTConfig.resolve(enabled=False), check="error")
    frames = torch.cat([piece.clone() for piece in decode_pieces(run, latents[:, None])])
    shared.save_sheet(sheet, frames, [f"clip {row}, frame {at}" for row, at in places])
