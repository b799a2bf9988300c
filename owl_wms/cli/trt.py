"""`owl-wms trt`: build, list, show, verify, prune and time compiled decoders.

Why a command: programs are built before a service starts, looked at when something is slow, and checked when a disk is
in doubt; none of that should need Python.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from owl_wms import env
from owl_wms.cache import CacheStore, EntryInfo
from owl_wms.errors import CacheError, ConfigError, FastPathError
from owl_wms.settings import TensorRTConfig

app = typer.Typer(no_args_is_help=True, help="Build, list, show, verify, prune and time compiled decoders.")

VAE_ID = typer.Option(None, "--vae-id", help='"dcae" for diffusers\' AutoencoderDC.')
VAE_CONFIG = typer.Option(None, "--vae-config", help="YAML with a model section.")
CHECKPOINT = typer.Option(
    None, "--checkpoint", help=".pt or .safetensors; diffusers folder or hub id with --vae-id dcae."
)
BATCH = typer.Option(8, "--batch-size", min=1, help="Frames a batch.")
LATENT = typer.Option("", "--latent", help="c,h,w of one latent frame; from the configuration when not said.")
PRECISION = typer.Option(None, "--precision", help="auto, fp16, bf16, fp32, fp8 or int8.")
PLANS = typer.Option(None, "--plan", help="Only this plan; may be repeated.")
CACHE = typer.Option(None, "--cache-dir", help="Cache directory; TENSORRT_CACHE_DIR overrides it.")
CALIBRATION = typer.Option(None, "--calibration", help=".safetensors of latents that fp8 and int8 are calibrated on.")
NAME = typer.Argument(..., help="Entry name, or the beginning of one.")


@app.command()
def build(
    vae_id: str | None = VAE_ID,
    vae_config: Path | None = VAE_CONFIG,
    checkpoint: str | None = CHECKPOINT,
    batch_size: int = BATCH,
    latent: str = LATENT,
    precision: str | None = PRECISION,
    plan: list[str] | None = PLANS,
    calibration: Path | None = CALIBRATION,
    cache_dir: Path | None = CACHE,
) -> None:
    """Build a decoder's program (or find it in the cache) and say what came of it."""
    from owl_wms.runtime import VideoDecode
    from owl_wms.utils.owl_vae_bridge import get_decoder_only

    settings = TensorRTConfig.resolve(
        precision=precision, plans=tuple(plan or ()) or None, calibration=calibration, cache_dir=cache_dir
    )
    shape = _latent_shape(latent, vae_config)
    console = Console()
    columns = (SpinnerColumn(), TextColumn("[progress.description]{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading the decoder, looking in the cache", total=None)
        decode = VideoDecode(
            get_decoder_only(vae_id, vae_config, checkpoint),
            batch_size=batch_size,
            settings=settings,
            strict=True,
            progress=lambda event: bar.update(task, description=_stage_text(event)),
        )
        state = decode.prepare(shape)
    console.print(Text(state.reason, style="bold"))
    console.print(f"build {state.build_seconds:.1f} s, load {state.load_seconds:.1f} s, {_mib(state.cache_bytes)}")
    if settings.use_cache:
        _print_report(console, _find(_store(settings), state.programs[-1]["entry"]))


@app.command("list")
def list_entries(cache_dir: Path | None = CACHE, as_json: bool = typer.Option(False, "--json")) -> None:
    """Every entry, most recently used first, and why one would not be used on this machine."""
    store = _store(TensorRTConfig.resolve(cache_dir=cache_dir))
    entries = store.entries(env.describe_machine())
    if as_json:
        typer.echo(json.dumps([_as_dict(info) for info in entries], indent=2))
        return
    table = Table(title=str(store.directory))
    for heading in ("entry", "state", "plan", "precision", "shape", "ms", "size", "last used", "reason"):
        table.add_column(heading, overflow="fold")
    for info in entries:
        found = _as_dict(info)
        table.add_row(
            *(Text(str(found[key])) for key in ("name", "status", "plan", "precision", "input_shape", "latency_ms")),
            _mib(info.size_bytes),
            _when(info.last_used_unix),
            Text(info.reason),
        )
    Console().print(table)


@app.command()
def show(name: str = NAME, cache_dir: Path | None = CACHE) -> None:
    """One entry's manifest: key material and build report, as JSON."""
    info = _find(_store(TensorRTConfig.resolve(cache_dir=cache_dir)), name)
    manifest = info.manifest
    shown: dict[str, Any] = {**_as_dict(info), "path": str(info.path)}
    if manifest is not None:
        shown.update(key=manifest.key, sha256=manifest.sha256, material=manifest.material, report=manifest.report)
    typer.echo(json.dumps(shown, indent=2))


@app.command()
def verify(
    name: str = typer.Argument("", help="Entry name, or the beginning of one."),
    every: bool = typer.Option(False, "--all", help="Every entry."),
    repair: bool = typer.Option(False, "--repair", help="Move bad entries to quarantine."),
    cache_dir: Path | None = CACHE,
) -> None:
    """Hash entries against their manifests; exit code 1 when one is bad."""
    if bool(name) == every:
        raise ConfigError("verify takes the name of an entry, or --all", key="name")
    store = _store(TensorRTConfig.resolve(cache_dir=cache_dir))
    checked = store.verify(repair=repair)
    chosen = checked if every else [info for info in checked if info.name.startswith(name)]
    if name and not chosen:
        raise CacheError(f"no entry begins with {name!r}; see owl-wms trt list", path=store.directory)
    console = Console()
    for info in chosen:
        console.print(Text(f"{info.status:10} {info.name} {info.reason}"), soft_wrap=True)
    bad = [info for info in chosen if info.status in ("corrupt", "unreadable")]
    console.print(f"{len(chosen)} checked, {len(bad)} bad")
    if bad:
        raise typer.Exit(1)


@app.command()
def prune(
    max_gib: float | None = typer.Option(
        None, "--max-gib", min=0.0, help="Size to prune to; 0 removes all not in use."
    ),
    cache_dir: Path | None = CACHE,
) -> None:
    """Sweep leftovers and evict least recently used entries."""
    store = _store(TensorRTConfig.resolve(cache_dir=cache_dir))
    result = store.prune(None if max_gib is None else int(max_gib * 1024**3))
    console = Console()
    console.print(f"removed {len(result.removed)} ({_mib(result.freed_bytes)}), left {_mib(result.left_bytes)}")
    if result.in_use:
        console.print(f"kept, in use: {', '.join(result.in_use)}")


@app.command()
def bench(
    vae_id: str | None = VAE_ID,
    vae_config: Path | None = VAE_CONFIG,
    checkpoint: str | None = CHECKPOINT,
    batch_size: int = BATCH,
    latent: str = LATENT,
    precision: str | None = PRECISION,
    plan: list[str] | None = PLANS,
    calibration: Path | None = CALIBRATION,
    cache_dir: Path | None = CACHE,
    iterations: int = typer.Option(20, min=1),
    compiled: bool = typer.Option(True, help="Also time torch.compile, the baseline that counts."),
) -> None:
    """Time eager PyTorch, torch.compile and the program in one run, each with its error against fp32."""
    import torch

    from owl_wms.runtime import VideoDecode, measure_inference_time
    from owl_wms.utils.owl_vae_bridge import get_decoder_only

    settings = TensorRTConfig.resolve(
        precision=precision, plans=tuple(plan or ()) or None, calibration=calibration, cache_dir=cache_dir
    )
    shape = _latent_shape(latent, vae_config)
    decoder = get_decoder_only(vae_id, vae_config, checkpoint)
    decode = VideoDecode(decoder, batch_size=batch_size, settings=settings)
    tensor = next(decoder.parameters())
    z = torch.randn(1, batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(tensor.device, tensor.dtype)
    plain = VideoDecode(decoder, batch_size=batch_size, settings=TensorRTConfig(enabled=False))
    ways: dict[str, Any] = {"eager": plain}
    if compiled:
        inductor = torch.compile(decoder, dynamic=False)
        ways["torch.compile"] = lambda x: inductor(x[0])[None]
    ways[f"owl_wms ({decode.prepare(shape).backend})"] = decode
    with torch.no_grad():
        truth = get_decoder_only(vae_id, vae_config, checkpoint, device=tensor.device, dtype=torch.float32)
        exact = truth(z[0].float())[None].double()
        del truth
    table = Table(title=f"batch {batch_size}, latent {list(shape)}, {tensor.device}")
    for heading in ("what", "ms a batch", "frames/s", "relative L2 error to fp32"):
        table.add_column(heading)
    for name, way in ways.items():
        ms = measure_inference_time(way, z, iterations=iterations)
        with torch.no_grad():
            error = float((way(z).double() - exact).norm() / exact.norm())
        table.add_row(name, f"{ms:.3f}", f"{batch_size / ms * 1e3:.1f}", f"{error:.2e}")
    console = Console()
    console.print(table)
    console.print(Text(decode.stats().reason), soft_wrap=True)


def _latent_shape(text: str, vae_config: Path | None) -> tuple[int, int, int]:
    if text:
        parts = text.replace("x", ",").split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
            raise ConfigError(f"--latent is c,h,w, three sizes >= 1, for example 128,8,8; got {text!r}", key="latent")
        return int(parts[0]), int(parts[1]), int(parts[2])
    if vae_config is None:
        raise ConfigError("--latent c,h,w is needed without --vae-config, for example 128,8,8", key="latent")
    from owl_wms.configs import load_vae_config

    model = load_vae_config(vae_config).model
    size = getattr(model, "latent_size", None)
    channels = getattr(model, "latent_channels", None)
    if not isinstance(size, int) or not isinstance(channels, int):
        raise ConfigError("this configuration does not say the latent size; give --latent c,h,w", key="latent")
    return channels, size, size


def _store(settings: TensorRTConfig) -> CacheStore:
    return CacheStore(settings.cache_directory(), settings.cache_max_bytes, env.cache_hmac_key())


def _find(store: CacheStore, name: str) -> EntryInfo:
    found = [info for info in store.entries(env.describe_machine()) if info.name.startswith(name)]
    if len(found) != 1:
        names = ", ".join(info.name for info in found) or "none"
        raise CacheError(f"{name!r} must begin exactly one entry's name; it begins: {names}", path=store.directory)
    return found[0]


def _as_dict(info: EntryInfo) -> dict[str, Any]:
    report = {} if info.manifest is None else info.manifest.report
    material = {} if info.manifest is None else info.manifest.material
    return {
        "name": info.name,
        "status": info.status,
        "reason": info.reason,
        "plan": report.get("plan", "-"),
        "precision": report.get("precision", "-"),
        "input_shape": material.get("input_shape", "-"),
        "latency_ms": report.get("latency_ms", "-"),
        "size_bytes": info.size_bytes,
        "last_used_unix": info.last_used_unix,
    }


def _print_report(console: Console, info: EntryInfo) -> None:
    if info.manifest is None:
        raise FastPathError("save", f"{info.name} cannot be read back: {info.reason}", "run owl-wms trt verify --all")
    table = Table(title=info.name, show_header=False)
    for key, value in info.manifest.report.items():
        text = json.dumps(value)
        table.add_row(key, Text(text if len(text) < 400 else f"{text[:400]}... (owl-wms trt show)"))
    console.print(table)


def _stage_text(event: dict[str, Any]) -> str:
    rest = [f"{key} {event[key]}" for key in ("plan", "precision", "detail") if event.get(key)]
    return ", ".join([str(event.get("stage", "working")), *rest])


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _when(seconds: int) -> str:
    if not seconds:
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
