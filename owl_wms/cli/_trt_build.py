"""`owl-wms trt build` and `bench`: make a decoder's program, show how that goes, and time it against PyTorch.

Why apart from the other commands of `trt`: these two load a decoder and run it; the others look at files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from owl_wms import env
from owl_wms.cache import CacheStore
from owl_wms.cli import say
from owl_wms.cli._bounds import MOST_FRAMES
from owl_wms.errors import ConfigError
from owl_wms.settings import TensorRTConfig

VAE_ID = typer.Option(None, "--vae-id", help='"dcae" for diffusers\' AutoencoderDC.')
VAE_CONFIG = typer.Option(None, "--vae-config", help="YAML with a model section.")
CHECKPOINT = typer.Option(
    None, "--checkpoint", help=".pt or .safetensors; diffusers folder or hub id with --vae-id dcae."
)
BATCH = typer.Option(8, "--batch-size", min=1, max=MOST_FRAMES, help="Frames per batch.")
LATENT = typer.Option(
    "", "--latent", help="channels,height,width of one latent, as 128,8,8. Default: from --vae-config."
)
PRECISION = typer.Option(None, "--precision", help="auto, fp16, bf16, fp32, fp8 or int8.")
PLAN = typer.Option(None, "--plan", help="Only this plan (owl-wms trt plans); may be repeated.")
# Text, not Path: Path("") is the current directory, and the settings would not see that nothing was said.
CALIBRATION = typer.Option(None, "--calibration", help=".safetensors of latents that fp8 and int8 are calibrated on.")
CACHE = typer.Option(None, "--cache-dir", help="Cache directory; TENSORRT_CACHE_DIR overrides it.")
# TensorRT names a phase after the layers in it, which may be all of them.
PHASE_CHARACTERS = 48


def build(
    vae_id: str | None = VAE_ID,
    vae_config: Path | None = VAE_CONFIG,
    checkpoint: str | None = CHECKPOINT,
    batch_size: int = BATCH,
    latent: str = LATENT,
    precision: str | None = PRECISION,
    plan: list[str] | None = PLAN,
    calibration: str | None = CALIBRATION,
    cache_dir: str | None = CACHE,
) -> None:
    """Build a decoder's program, or find it in the cache, and print the result."""
    from owl_wms.runtime import VideoDecode
    from owl_wms.utils.owl_vae_bridge import get_decoder_only

    settings = _settings(precision, plan, calibration, cache_dir)
    if not settings.enabled:
        variable = env.TENSORRT_VARIABLES["enabled"]
        raise ConfigError(f"{variable} switches the compiled path off, so nothing is built; unset it", key=variable)
    _check_named(vae_id, vae_config, checkpoint)
    shape = _latent_shape(latent, vae_config)
    console = Console()
    # No markup: the names of TensorRT's phases hold brackets.
    said = TextColumn("{task.description}", style="progress.description", markup=False)
    with Progress(SpinnerColumn(), said, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the decoder, looking in the cache", total=None)
        decode = VideoDecode(
            get_decoder_only(vae_id, vae_config, checkpoint),
            batch_size=batch_size,
            settings=settings,
            strict=True,
            progress=_teller(bar, task),
        )
        state = decode.prepare(shape)
    (program,) = state.programs
    say(console, state.reason, "bold")
    console.print(f"build {state.build_seconds:.1f} s, load {state.load_seconds:.1f} s, {mib(state.cache_bytes)}")
    if program["not_kept"]:
        say(console, f"not stored, so every process will build it again: {program['not_kept']}", "yellow")
    else:
        _print_report(console, open_store(settings), program["entry"])


def bench(
    vae_id: str | None = VAE_ID,
    vae_config: Path | None = VAE_CONFIG,
    checkpoint: str | None = CHECKPOINT,
    batch_size: int = BATCH,
    latent: str = LATENT,
    precision: str | None = PRECISION,
    plan: list[str] | None = PLAN,
    calibration: str | None = CALIBRATION,
    cache_dir: str | None = CACHE,
    iterations: int = typer.Option(20, min=1, help="Timed runs of each; the median is shown."),
    compiled: bool = typer.Option(True, help="Also time torch.compile."),
    cpu: bool = typer.Option(False, "--cpu", help="Without a GPU, time PyTorch on the CPU; takes minutes."),
) -> None:
    """Time eager PyTorch, torch.compile and the program in one run, each with its error against fp32."""
    from owl_wms.cli.bench import measured
    from owl_wms.runtime import VideoDecode
    from owl_wms.utils.owl_vae_bridge import get_decoder_only

    settings = _settings(precision, plan, calibration, cache_dir)
    _check_named(vae_id, vae_config, checkpoint)
    shape = _latent_shape(latent, vae_config)
    decoder = get_decoder_only(vae_id, vae_config, checkpoint)
    decode = VideoDecode(decoder, batch_size=batch_size, settings=settings)
    decode.prepare(shape)  # what cannot be had is said first
    device = next(decoder.parameters()).device
    if device.type == "cpu" and not cpu:
        raise ConfigError("no CUDA device, so there is no program to time; --cpu times PyTorch alone", key="cpu")
    files = (vae_id, vae_config, checkpoint)
    rows = measured(decode, decoder, shape, files, compiled=compiled, iterations=iterations)
    table = Table(title=f"batch {decode.batch_size}, latent {list(shape)}, {device}")
    for heading in ("what", "ms per batch", "frames/s", "relative L2 error to fp32"):
        table.add_column(heading)
    for row in rows:
        if "failed" in row:
            table.add_row(row["way"], Text(row["failed"]))
            continue
        table.add_row(row["way"], f"{row['ms']:.3f}", f"{row['frames_per_second']:.1f}", f"{row['relative_error']:.2e}")
    console = Console()
    console.print(table)
    say(console, decode.stats().reason)


def _settings(
    precision: str | None, plan: list[str] | None, calibration: str | None, cache_dir: str | None
) -> TensorRTConfig:
    """The settings of these options, whose plans and files exist: without a GPU nothing else would look at them."""
    from owl_wms.trt.plans import PLANS

    for name in plan or ():
        if name not in PLANS:
            raise ConfigError(f"--plan must be one of {', '.join(PLANS)}; got {name!r}", key="plans")
    plans = tuple(plan or ()) or None
    settings = TensorRTConfig.resolve(precision=precision, plans=plans, calibration=calibration, cache_dir=cache_dir)
    if settings.calibration is not None and not settings.calibration.is_file():
        raise ConfigError(f"--calibration {settings.calibration}: no such file", key="calibration")
    return settings


def _check_named(vae_id: str | None, vae_config: Path | None, checkpoint: str | None) -> None:
    """Refuse what names no decoder in words of this command; what the loader says names keys of configurations."""
    if vae_id is None and (vae_config is None or checkpoint is None):
        missing = "--vae-config" if vae_config is None else "--checkpoint"
        raise ConfigError(f"{missing} is missing: give --vae-config and --checkpoint, or --vae-id dcae", key=missing)


def open_store(settings: TensorRTConfig) -> CacheStore:
    """The cache that the settings and `TENSORRT_CACHE_KEY` name."""
    return CacheStore(settings.cache_directory(), settings.cache_max_bytes, env.cache_hmac_key())


def mib(size_bytes: int) -> str:
    """A size as text."""
    return f"{size_bytes / 2**20:.1f} MiB"


def stage_text(event: dict[str, Any]) -> str:
    """One line for a build event: the stage, what it works on, TensorRT's own phase and step, or why it failed."""
    said = [str(event.get("stage", "working"))]
    said += [f"{key} {event[key]}" for key in ("plan", "precision") if event.get(key)]
    if phase := str(event.get("phase", "")):
        short = phase if len(phase) <= PHASE_CHARACTERS else f"{phase[:PHASE_CHARACTERS]}..."
        said.append(f"{short} {event['step']}/{event['steps']}" if event.get("steps") else short)
    if event.get("key"):
        said.append(" ".join(part for part in str(event["key"]).split("|") if part))
    if event.get("reason"):
        said.append(" ".join(str(event["reason"]).split()))
    return ", ".join(said)


def _teller(bar: Progress, task: TaskID) -> Callable[[dict[str, Any]], None]:
    def tell(event: dict[str, Any]) -> None:
        if event.get("reason"):  # a failed attempt stays on the screen; the next stage would wipe it off the bar
            say(bar.console, stage_text(event))
        else:
            bar.update(task, description=stage_text(event))

    return tell


def _latent_shape(text: str, vae_config: Path | None) -> tuple[int, int, int]:
    if text:
        parts = [part.strip() for part in text.replace("x", ",").split(",")]
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
            raise ConfigError(f"--latent is c,h,w, three sizes >= 1, for example 128,8,8; got {text!r}", key="latent")
        return int(parts[0]), int(parts[1]), int(parts[2])
    if vae_config is None:
        raise ConfigError("--latent c,h,w is needed without --vae-config, for example 128,8,8", key="latent")
    from owl_wms.configs import load_vae_model

    model = load_vae_model(vae_config)
    size = getattr(model, "latent_size", None)
    channels = getattr(model, "latent_channels", None)
    if not isinstance(size, int) or not isinstance(channels, int):
        raise ConfigError("this configuration does not say the latent size; give --latent c,h,w", key="latent")
    return channels, size, size


def _print_report(console: Console, store: CacheStore, name: str) -> None:
    """The build's report as the cache holds it. The program is loaded by now, so a missing report is no error."""
    info = next((info for info in store.entries() if info.name == name), None)
    if info is None or info.manifest is None:
        reason = "it is not in the cache any more" if info is None else info.reason
        say(console, f"{name} has no report to show: {reason}")
        return
    table = Table(title=name, show_header=False)
    for key, value in info.manifest.report.items():
        text = json.dumps(value)
        table.add_row(key, Text(text if len(text) < 400 else f"{text[:400]}... (owl-wms trt show)"))
    console.print(table)
