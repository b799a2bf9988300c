"""Code that decode, encode, sample and demo share: choosing a device, checking outputs, and saying what ran.

Why: three commands that answer "what decoded this, and why" must answer alike.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor, nn

from owl_wms import env
from owl_wms.cli._bounds import DTYPES, check_dtype, device_number
from owl_wms.configs import TAEHV_VAE_ID, load_vae_model
from owl_wms.configs.paths import expanded
from owl_wms.errors import ConfigError
from owl_wms.media import sinks
from owl_wms.media.pictures import contact_sheet, depth_bytes, save_picture
from owl_wms.media.watch import VIDEO_SUFFIXES, pyav
from owl_wms.runtime.stats import DecodeStats
from owl_wms.timing import Spent
from owl_wms.vae import fold_weight_norm, load_encoder
from owl_wms.vae.on_cpu import channels_last_on_cpu

try:
    import resource
except ImportError:  # Windows keeps no such account
    resource = None  # type: ignore[assignment]

_MIB = 1024**2
STAGES = ("read", "decode", "copy", "encode", "write")
"""Of a decode, in the order in which a frame passes through them."""


def choose_device(name: str | None) -> torch.device:
    """The device of that name, by default the first GPU, else the CPU.

    Raises:
        ConfigError: no such device here, or a kind that nothing here was written for (mps, xpu); a LOCAL_RANK that is
            no number, when no name is given.
    """
    if name is None:
        env.local_rank()  # a command runs on the first GPU, and a bad value is an error all the same
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = device_number(name)
    if number is not None and number >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices", key="device")
    return torch.device(name)


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """bf16, fp16 or fp32 by name; by default bf16 on a GPU and fp32 on a CPU, which computes bf16 slowly.

    Raises:
        ConfigError: another name.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    check_dtype(name)
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def check_destination(path: Path, *suffixes: str, key: str = "") -> None:
    """Refuse an output file before the work is done rather than after it.

    Args:
        path: the file.
        suffixes: endings that can be written; none means any.
        key: of the configuration that names it, for the message.

    Raises:
        ConfigError: an ending that cannot be written, a folder of that name, or a place where no file can be made.
        DataError: a clip, and PyAV is not installed.
    """
    said = f"{key}: {path}" if key else str(path)
    _require_meant(said, path, key)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        pyav(said)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{said}: must end in {' or '.join(suffixes)}, got {path.suffix!r}", path=path, key=key)
    if os.path.isdir(path):
        raise ConfigError(f"{said}: is a folder", path=path, key=key)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{said}: cannot be written: a pipe, a socket or a device stands there", path=path, key=key)
    if os.path.ismount(os.path.realpath(path)):  # as `docker run -v FILE:FILE` makes it
        text = "is a mount, which a finished file cannot take the place of: mount its folder, or name another file"
        raise ConfigError(f"{said}: {text}", path=path, key=key)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise ConfigError(f"{said}: cannot be written: {os.strerror(errno.EACCES)}", path=path, key=key)
    # Also where the file exists: a new one is made beside it and takes its place at the end.
    _try_to_write_below(said, Path(os.path.realpath(path)).parent)


def check_family(family: str | None, vae_config: Path | str | None) -> None:
    """Raises ConfigError unless a configuration or a known family, or both without contradiction, name the decoder."""
    if family not in (None, TAEHV_VAE_ID) or (family is None and vae_config is None):
        got = f"--family {family} is not known" if family else "neither --vae-config nor --family is given"
        raise ConfigError(f"{got}; give --vae-config FILE, or --family {TAEHV_VAE_ID}", key="family")
    if family is not None and vae_config is not None and (found := load_vae_model(vae_config).model_id) != family:
        raise ConfigError(
            f"--family {family}, but {vae_config} is of model_id {found!r}; give one of them", key="family"
        )


def check_absent(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a file, or a folder with something in it, that is there already.

    Raises:
        ConfigError: it is there, and `overwrite` is False.
    """
    if not overwrite and (os.path.isfile(path) or (os.path.isdir(path) and any(path.iterdir()))):
        raise ConfigError(f"{path}: exists; --overwrite replaces it", path=path, key="overwrite")


def check_not_read(path: Path, *inputs: Path | None) -> None:
    """Refuse an output that is one of the files that the command reads: to overwrite means an earlier output.

    Raises:
        ConfigError: it is one of them, also by another path or a link.
    """
    for file in inputs:
        if file is not None and os.path.realpath(path) == os.path.realpath(file):
            raise ConfigError(f"{path}: is a file that this command reads; name another output", path=path)


def check_output(path: Path, form: str, *, overwrite: bool) -> None:
    """Refuse what `media.sinks` cannot write to before the work is done.

    Args:
        path: a name of `sinks.outputs`.
        form: of `sinks.form_of`.
        overwrite: whether what is there may be replaced.

    Raises:
        ConfigError: as `check_destination`, `check_folder`, `check_absent` and `sinks.check_replaceable`, or standard
            output is a terminal.
    """
    if path == sinks.STDOUT:
        if sys.stdout is None:  # the shell closed it: `>&-`
            raise ConfigError("--out -: standard output is closed", key="out")
        if sys.stdout.isatty():
            raise ConfigError("--out -: standard output is a terminal; put `| ffmpeg -i - ...` or `> FILE` behind it")
        return
    if f".{form}" in sinks.PICTURES:
        check_folder(path)
        sinks.check_replaceable(path)
    else:
        check_destination(path)
    check_absent(path, overwrite=overwrite)


def check_folder(path: Path, *, key: str = "") -> None:
    """Refuse an output folder before the work is done; it need not exist.

    Args:
        path: the folder.
        key: of the configuration that names it, for the message.

    Raises:
        ConfigError: a file of that name, or a place where no file can be made.
    """
    said = f"{key}: {path}" if key else str(path)
    _require_meant(said, path, key)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"{said}: is a file, a folder is wanted", path=path, key=key)
    _try_to_write_below(said, Path(os.path.realpath(path)))


def _require_meant(said: str, path: Path, key: str) -> None:
    """Refuse a name that a shell would have replaced, `~/x` in quotes for example, before a folder `~` is made."""
    try:
        meant = expanded(path)
    except ValueError as error:
        raise ConfigError(f"{said[:200]}: is a name {error}", path=path, key=key) from None
    if meant != path:
        raise ConfigError(f"{said}: no shell replaced this name: write it in full", path=path, key=key)


def _try_to_write_below(said: str, folder: Path) -> None:
    """Make a file without a name in the nearest folder that exists: permission bits tell root nothing about /proc."""
    nearest = next((place for place in (folder, *folder.parents) if os.path.exists(place)), Path())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"{said}: cannot be written: {nearest}: {error.strerror}", path=folder) from error


class _RateColumn(ProgressColumn):
    """Shows the rate of the last seconds, in what the bar counts."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} {self._unit}/s")


def progress(console: Any, unit: str = "frames") -> Progress:
    """A bar with counts, rate and time left, on the given console; `unit` is what it counts."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
        console=console,
    )


class Sheet:
    """Keeps up to eight of `count` frames, evenly spread, and makes a contact sheet of them."""

    def __init__(self, count: int) -> None:
        shown = min(8, count)
        self._places = sorted({round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)})
        self._pictures: list[Tensor] = []
        self._seen = 0

    def take(self, frames: Tensor) -> None:
        """Looks at the next uint8 [k, H, W, C] frames."""
        inside = [place - self._seen for place in self._places if 0 <= place - self._seen < len(frames)]
        self._pictures += [frames[place].clone() for place in inside]
        self._seen += len(frames)

    def save(self, path: Path) -> None:
        """Writes them, each under its number."""
        save_sheet(path, torch.stack(self._pictures), [f"frame {place}" for place in self._places])


def save_sheet(path: Path, frames: Tensor, labels: list[str]) -> None:
    """Writes uint8 frames [k, H, W, C] side by side: colour and, if there is a fourth channel, depth below it."""
    rows = {"decoded": frames[..., :3].contiguous()}
    if frames.shape[3] > 3:
        rows["depth"] = depth_bytes(frames[..., 3].float() / 127.5 - 1)
    save_picture(path, contact_sheet(rows, times=labels))


def encoder_of(config: Path, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns an autoencoder's encoder in the form in which it is fast: weight norm folded, channels_last on a CPU."""
    encoder = fold_weight_norm(load_encoder(None, config, checkpoint))
    return channels_last_on_cpu(encoder.to(device, dtype), device)


def time_split(spent: Spent, seconds: float) -> str:
    """Describes where the time went: seconds of every stage, which overlap, and of all together."""
    parts = ", ".join(f"{stage} {spent.seconds[stage]:.2f} s" for stage in STAGES if stage in spent.seconds)
    return f"{seconds:.2f} s; {parts} (at the same time)"


def peak_memory(device: torch.device) -> str:
    """Peak memory so far: allocated on the GPU, or of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / _MIB:.0f} MiB on {torch.cuda.get_device_name(device)}"
    if resource is None:
        return "unknown on this system"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB of process memory"


def stats_rows(stats: DecodeStats) -> list[tuple[str, str]]:
    """Lists what decoded, why, and what it cost, as labelled text."""
    compiled = stats.backend not in ("pytorch", "none")
    reason = f"{stats.reason} fits these latents" if compiled else stats.reason
    rows = [("decoded by", stats.backend), ("because", reason)]
    for program in stats.programs:
        if program.get("plan"):
            shape = "x".join(map(str, program["shape"]))
            rows.append(("program", f"{shape}, plan {program['plan']}, {program['precision']}, {program['state']}"))
    if stats.builds or stats.hits:
        rows.append(("cache", f"{stats.hits} found, {stats.builds} built in {stats.build_seconds:.1f} s"))
    if stats.fallbacks:
        failures = ", ".join(f"{count} at {stage}" for stage, count in stats.failures.items())
        rows.append(("fell back to PyTorch", f"{stats.fallbacks} batches ({failures})"))
    return rows
