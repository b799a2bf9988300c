"""`owl-wms trt`: build, list, show, verify, prune and time compiled decoders, and list the plans.

Why a command: programs are built before a service starts, looked at when something is slow, and checked when a disk is
in doubt; none of that should need Python.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from owl_wms import env
from owl_wms.cache import CacheStore, EntryInfo
from owl_wms.cli import say
from owl_wms.cli._trt_build import CACHE, bench, build, mib, open_store
from owl_wms.errors import CacheError, ConfigError
from owl_wms.settings import TensorRTConfig

app = typer.Typer(no_args_is_help=True, help="Build, list, show, verify, prune and time compiled decoders.")

NAME = typer.Argument(..., help="Entry name, or the beginning of one.")


app.command()(build)


@app.command()
def plans() -> None:
    """List the plans that a build chooses among, with the precisions of each."""
    from owl_wms.trt.plans import PLANS

    table = Table()
    for heading in ("plan", "precisions", "what it does"):
        table.add_column(heading, overflow="fold")
    for plan in PLANS.values():
        table.add_row(Text(plan.name), Text(", ".join(plan.precisions)), Text(plan.summary))
    Console().print(table)


@app.command("list")
def list_entries(
    cache_dir: str | None = CACHE, as_json: bool = typer.Option(False, "--json", help="Print a JSON list.")
) -> None:
    """List all entries, most recently used first, and why one would not be used on this machine."""
    store = _store_to_look_at(cache_dir)
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
            mib(info.size_bytes),
            _when(info.last_used_unix),
            Text(info.reason),
        )
    Console().print(table)


@app.command()
def show(name: str = NAME, cache_dir: str | None = CACHE) -> None:
    """Print one entry's manifest as JSON: key material and build report."""
    info = _find(open_store(TensorRTConfig.resolve(cache_dir=cache_dir)), name)
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
    cache_dir: str | None = CACHE,
) -> None:
    """Hash entries against their manifests; exit code 1 when one is bad."""
    if bool(name) == every:
        raise ConfigError("verify takes the name of an entry, or --all", key="name")
    store = _store_to_look_at(cache_dir)
    chosen = store.verify(name, repair=repair)
    if name and not chosen:
        raise CacheError(f"no entry begins with {name!r}; see owl-wms trt list", path=store.directory)
    console = Console()
    for info in chosen:
        say(console, f"{info.status:10} {info.name} {info.reason}")
    bad = [info for info in chosen if info.status in ("corrupt", "unreadable")]
    console.print(f"{len(chosen)} checked, {len(bad)} bad")
    if bad:
        raise typer.Exit(1)


@app.command()
def prune(
    max_gib: float | None = typer.Option(
        None, "--max-gib", min=0.0, help="Size to prune to; 0 removes all not in use."
    ),
    cache_dir: str | None = CACHE,
) -> None:
    """Delete what dead builds left, then the least recently used entries above the size limit."""
    if max_gib is not None and not math.isfinite(max_gib):
        raise ConfigError(f"--max-gib must be a number of GiB >= 0; got {max_gib}", key="max_gib")
    store = _store_to_look_at(cache_dir)
    result = store.prune(None if max_gib is None else int(max_gib * 1024**3))
    console = Console()
    console.print(f"removed {len(result.removed)} ({mib(result.freed_bytes)}), left {mib(result.left_bytes)}")
    if result.in_use:
        console.print(f"left, being in use: {', '.join(result.in_use)}")


app.command()(bench)


def _store_to_look_at(cache_dir: str | None) -> CacheStore:
    """The cache, and a word where there is none yet: a misspelt path would otherwise look like an empty cache."""
    store = open_store(TensorRTConfig.resolve(cache_dir=cache_dir))
    if not os.path.lexists(store.directory):
        say(Console(stderr=True), f"{store.directory}: there is no such directory yet")
    return store


def _find(store: CacheStore, name: str) -> EntryInfo:
    found = [info for info in store.entries(env.describe_machine()) if info.name.startswith(name)]
    if len(found) != 1:
        names = ", ".join(info.name for info in found)
        text = f"several entries begin with {name!r}: {names}" if found else f"no entry begins with {name!r}"
        raise CacheError(f"{store.directory}: {text}; `owl-wms trt list` shows all", path=store.directory)
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


def _when(seconds: int) -> str:
    if not seconds:
        return "-"
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
