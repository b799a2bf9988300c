"""`owl-wms doctor`: what would decode on this machine, why, and what to do about it.

Why: "is TensorRT used, and if not, why not" must be answerable in one command, before anything is built or trained.
Exit code 0 when the compiled path is usable, 1 when PyTorch or nothing would decode.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from owl_wms import env
from owl_wms.errors import ConfigError
from owl_wms.settings import TensorRTConfig

if TYPE_CHECKING:
    from owl_wms.trt import TensorRTStatus

_FALLBACK = env.TENSORRT_VARIABLES["fallback_on_error"]


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print all that is known, as one JSON object."),
) -> None:
    """Report what would decode on this machine, and why."""
    facts = diagnose()
    console = Console()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        console.print(Text(facts["verdict"], style="bold green" if facts["usable"] else "bold yellow"))
        table = Table.grid(padding=(0, 2))
        for name, text in _rows(facts):
            table.add_row(Text(name, style="bold"), Text(text))
        console.print(table)
    if not facts["usable"]:
        raise typer.Exit(1)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns what a person looks for, one screen of it; `--json` has the rest."""
    tensorrt, gpu, machine, cache = facts["tensorrt"], facts["gpu"], facts["machine"], facts["cache"]
    settings = {key: value for key, value in facts["settings"].items() if key != "from_environment"}
    rows = [("TensorRT", tensorrt["version"] if tensorrt["available"] else tensorrt["reason"])]
    if not tensorrt["available"]:
        rows.append(("", tensorrt["remedy"]))
    rows += [("GPU", _gpu(machine)), ("driver", str(machine["driver"]))]
    if gpu["kernels"] != "-":
        rows += [("our kernels", gpu["kernels"]), ("", gpu["tested"]), ("plan", gpu["plan"])]
        rows.append(("precision", gpu["precision"]))
    held = f"{cache['entries']} programs, {_gib(cache['cache_bytes'])} of {_gib(cache['max_bytes'])}"
    rows += [("cache", cache["directory"]), ("", f"{held}; {_gib(cache['free_bytes'])} free on the disk")]
    if cache["refused"] != "-":
        rows.append(("", f"refused: {cache['refused']}"))
    rows += [
        ("torch", f"{machine['torch']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, {machine['triton']}"),
        ("libraries", f"{machine['torch_tensorrt']}; {machine['tensorrt']}; {machine['nvrtc']}"),
        ("Python", f"{machine['python']} on {machine['os']}"),
        ("settings", ", ".join(f"{key} {value}" for key, value in settings.items())),
    ]
    if facts["settings"]["from_environment"] != "-":
        rows.append(("", f"from the environment: {facts['settings']['from_environment']}"))
    return [*rows, ("more", "owl-wms doctor --json")]


def _gpu(machine: dict[str, Any]) -> str:
    if str(machine["gpu"]).startswith("unknown"):
        return str(machine["gpu"]).removeprefix("unknown: ")
    memory = _gib(machine["gpu_memory_bytes"])
    return f"{machine['gpu']}, compute capability {machine['compute_capability']}, {memory}"


def _gib(size: Any) -> str:
    return f"{size / 2**30:.1f} GiB" if isinstance(size, int) else str(size).removeprefix("unknown: ")


def diagnose() -> dict[str, Any]:
    """Everything the command prints, JSON-ready: `tensorrt`, `gpu`, `machine`, `cache`, `settings`, `usable`,
    `verdict`.
    """
    import torch

    from owl_wms import trt
    from owl_wms.cli._support import capability_of, our_kernels, support

    status = trt.status()
    machine = env.describe_machine()
    settings, refused = _from_environment()
    cuda = torch.cuda.is_available()
    capability = capability_of(machine["compute_capability"]) if cuda else None
    cache = _cache(settings, refused.get("cache_dir"))
    usable, verdict = _verdict(settings, refused, status, cuda, our_kernels(capability), cache["refused"])
    return {
        "tensorrt": {
            "available": status.available,
            "flavour": status.flavour,
            "version": status.version or "not installed",
            "reason": status.reason or "-",
            "remedy": status.remedy or "-",
        },
        "gpu": support(capability, status.available, settings.precision),
        "machine": machine,
        "cache": cache,
        "settings": _shown(settings, refused),
        "usable": usable,
        "verdict": verdict,
    }


def _cache(settings: TensorRTConfig, refused: str | None) -> dict[str, Any]:
    """The state of the cache, without that of the default one if `refused` says that the variable's cannot be used."""
    from owl_wms.cache import CacheStore

    directory = settings.cache_directory()
    state = CacheStore(directory, settings.cache_max_bytes, env.cache_hmac_key()).stats()
    if refused is not None:
        state = {"entries": "-", "cache_bytes": "-", "refused": refused}
    return {
        "directory": str(directory) if refused is None else "-",
        "entries": state["entries"],
        "cache_bytes": state["cache_bytes"],
        "max_bytes": settings.cache_max_bytes,
        "free_bytes": _free_bytes(directory) if refused is None else "-",
        "refused": state["refused"] or "-",
        "signed": env.cache_hmac_key() is not None,
    }


def _shown(settings: TensorRTConfig, refused: dict[str, str]) -> dict[str, Any]:
    """The settings by their shown names; of a refused one, why, since neither it nor the default is used."""
    fallback = "pytorch" if settings.fallback_on_error else "error"
    values = {"enabled": settings.enabled, "precision": settings.precision, "fallback": fallback}
    for key, text in refused.items():
        if key != "cache_dir":
            values["fallback" if key == "fallback_on_error" else key] = f"refused: {text}"
    used = ", ".join(key for key in env.tensorrt_overrides() if key not in refused) or "-"
    return {**values, "from_environment": used}


def _verdict(
    settings: TensorRTConfig, refused: dict[str, str], status: TensorRTStatus, cuda: bool, ours: bool, no_cache: str
) -> tuple[bool, str]:
    """Returns whether a compiled program would decode; and in a sentence what would, why, and what to do about it."""
    last = "PyTorch" if settings.fallback_on_error else f"an error ({_FALLBACK}=error)"
    if refused:
        return False, f"Nothing would decode: {'; '.join(refused.values())}"
    if not settings.enabled:
        return False, "PyTorch would decode: TENSORRT_ENABLED switches the compiled path off."
    if not cuda:
        remedy = "run on a machine with an NVIDIA GPU and driver"
        return False, _without_tensorrt(settings, "this machine has no CUDA device", remedy)
    if status.available:
        programs = "a program from the cache, else one that is built once and stored"
        if no_cache != "-":
            programs = f"a program that every process builds anew, since the cache is refused ({no_cache})"
        return True, f"TensorRT would decode: {programs}, else {last}."
    if ours:
        where = f"where the decoder has a fused form, else {last}"
        return True, f"Our kernels would decode without TensorRT, {where}: {status.reason}. Remedy: {status.remedy}."
    return False, _without_tensorrt(settings, status.reason, status.remedy)


def _from_environment() -> tuple[TensorRTConfig, dict[str, str]]:
    """The settings of the variables that can be used; and by setting, or variable where it is none, what is wrong with
    the others.
    """
    good: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for key, text in env.tensorrt_overrides().items():
        try:
            TensorRTConfig(**cast(Any, {key: text}))
            good[key] = text
        except ConfigError as error:
            refused[key] = f"{env.TENSORRT_VARIABLES[key]}: {error}"
    try:
        env.local_rank()
    except ConfigError as error:
        refused["LOCAL_RANK"] = str(error)
    return TensorRTConfig(**good), refused


def _without_tensorrt(settings: TensorRTConfig, reason: str, remedy: str) -> str:
    if settings.fallback_on_error:
        return f"PyTorch would decode: {reason}. Remedy: {remedy}."
    strict = f"{reason}, and {_FALLBACK}=error forbids PyTorch"
    return f"Nothing would decode: {strict}. Remedy: {remedy}; or unset {_FALLBACK}."


def _free_bytes(directory: Path) -> int | str:
    """Free space where the cache stands or would stand."""
    for place in (directory, *directory.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return f"unknown: no parent of {directory} can be read"
