"""`owl-wms decode-dataset` and `owl-wms encode-dataset`: every file of a folder or bucket, on every GPU, resumable.

Usage:
    owl-wms decode-dataset latents/ --out frames/ --vae-config configs/vae/dec_dist.yml --checkpoint dec.pt
    torchrun --nproc-per-node 8 -m owl_wms decode-dataset s3://b/in --out s3://b/out --vae-config C --checkpoint K
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from owl_wms.cli import _bounds as bounds
from owl_wms.cli import say
from owl_wms.cli._options import Dtype, TensorRT

if TYPE_CHECKING:
    from rich.progress import TaskID

    from owl_wms.batch import Job
    from owl_wms.batch.progress import Tally
    from owl_wms.batch.run import Status

_log = logging.getLogger(__name__)
Input = Annotated[str, typer.Argument(metavar="INPUT", help="Folder, s3:// prefix, file, or manifest .jsonl or .txt.")]
Out = Annotated[str, typer.Option(help="Folder or s3:// prefix; each generation gets a folder below it.")]
Checkpoint = Annotated[str, typer.Option(help="Weights of the autoencoder.")]
Engine = Annotated[
    str | None, typer.Option(help="ray, ranks (torchrun, srun) or local. Default: as this process was started.")
]
Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs, a worker on each; by default every visible one.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers without a GPU; one by default.")]
BatchSize = Annotated[int, typer.Option(min=1, max=bounds.MOST_FRAMES, help="Frames per batch.")]
Limit = Annotated[float, typer.Option(min=0.1, help="Seconds that one item may take.")]
Metrics = Annotated[
    int | None, typer.Option(min=0, max=65_535, help="Port for Prometheus; 0 takes a free one. Ranks add theirs.")
]
Show = Annotated[bool, typer.Option("--status", help="Print how much is done, and do nothing.")]
Verify = Annotated[bool, typer.Option(help="Check hash and frame count of every output, and do nothing else.")]


def decode_dataset(
    source: Input,
    out: Out,
    checkpoint: Checkpoint,
    vae_config: Annotated[str | None, typer.Option(help="YAML of the autoencoder; not needed with --family.")] = None,
    family: Annotated[str | None, typer.Option(help="taehv: the sizes are read from its checkpoint.")] = None,
    form: Annotated[str, typer.Option("--format", help="npy, mp4, tar or parquet.")] = "npy",
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of mp4, 1 to 240. Default: each file's, else 60.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Multiply latents by this first (vae_scale). Default: each file's, else 1.")
    ] = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    tensorrt: TensorRT = True,
    engine: Engine = None,
    gpus: Gpus = None,
    workers: Workers = None,
    time_limit: Limit = 3600.0,
    metrics_port: Metrics = None,
    status: Show = False,
    verify: Verify = False,
) -> None:
    """Decode every file of latents in a dataset; a second run does what is missing."""
    from owl_wms.batch import DecodeClips
    from owl_wms.batch.items import LATENT_SUFFIXES
    from owl_wms.batch.outputs import FRAME_FORMS
    from owl_wms.cli import _shared as shared

    bounds.check_number("--scale", scale, bounds.SCALES)
    bounds.check_number("--time-limit", time_limit, (0.1, 10**6))
    bounds.check_number("--fps", fps, bounds.FPS)
    shared.check_family(family, vae_config)
    settings = {"scale": scale, "batch_size": batch_size, "dtype": dtype, "family": family, "tensorrt": tensorrt}
    make = partial(
        DecodeClips, vae_config, checkpoint, family=family, dtype=dtype, batch_size=batch_size, scale=scale,
        tensorrt=tensorrt,
    )  # fmt: skip
    job = _job(make, out, form, FRAME_FORMS, settings, vae_config, checkpoint, fps=fps, time_limit=time_limit)
    _go(job, source, LATENT_SUFFIXES, engine, gpus, workers, metrics_port, status, verify)


def encode_dataset(
    source: Input,
    out: Out,
    vae_config: Annotated[str, typer.Option(help="YAML of the autoencoder.")],
    checkpoint: Checkpoint,
    form: Annotated[str, typer.Option("--format", help="pt, npy or safetensors.")] = "pt",
    scale: Annotated[float, typer.Option(help="Divide latents by this (vae_scale).")] = 1.0,
    resize: Annotated[bool, typer.Option(help="Scale frames of another size instead of refusing them.")] = False,
    batch_size: BatchSize = 8,
    dtype: Dtype = None,
    engine: Engine = None,
    gpus: Gpus = None,
    workers: Workers = None,
    time_limit: Limit = 3600.0,
    metrics_port: Metrics = None,
    status: Show = False,
    verify: Verify = False,
) -> None:
    """Encode every clip of a dataset to latents; a second run does what is missing."""
    from owl_wms.batch import EncodeClips
    from owl_wms.batch.items import FRAME_SUFFIXES
    from owl_wms.batch.outputs import LATENT_FORMS

    bounds.check_number("--scale", scale, bounds.SCALES)
    bounds.check_number("--time-limit", time_limit, (0.1, 10**6))
    if (remark := bounds.unstated_scale(form, scale)) is not None:
        say(Console(stderr=True), remark)
    settings = {"scale": scale, "batch_size": batch_size, "dtype": dtype, "resize": resize}
    make = partial(EncodeClips, vae_config, checkpoint, dtype=dtype, batch_size=batch_size, scale=scale, resize=resize)
    job = _job(make, out, form, LATENT_FORMS, settings, vae_config, checkpoint, encodes=True, time_limit=time_limit)
    _go(job, source, FRAME_SUFFIXES, engine, gpus, workers, metrics_port, status, verify)


def _job(
    make: Any,
    out: str,
    form: str,
    forms: tuple[str, ...],
    settings: dict[str, Any],
    vae_config: str | None,
    checkpoint: str,
    **rest: Any,
) -> Job:
    from owl_wms.batch import prepare
    from owl_wms.batch.job import digest_of_files
    from owl_wms.errors import ConfigError

    if form not in forms:
        raise ConfigError(f"--format must be one of {', '.join(forms)}, got {form!r}", key="format")
    settings = {**settings, "vae_config": digest_of_files(vae_config), "checkpoint": digest_of_files(checkpoint)}
    job, others = prepare(make, out, form=form, settings=settings, **rest)
    text = f"outputs go to {job.out}"
    if others:
        text += f"; {out} also has {', '.join(others)}, made by another checkpoint or other settings"
    say(Console(stderr=True), text)
    return job


def _go(
    job: Job,
    source: str,
    suffixes: tuple[str, ...],
    engine: str | None,
    gpus: int | None,
    workers: int | None,
    metrics_port: int | None,
    show: bool,
    verify: bool,
) -> None:
    from owl_wms.batch import ranks
    from owl_wms.batch import run as engines
    from owl_wms.batch.progress import Tally
    from owl_wms.errors import ConfigError

    if show:
        _print_status(engines.status(job, source, suffixes))
        return
    if verify:
        raise typer.Exit(_print_wrong(engines.verify(job)))
    console = Console(stderr=True)
    chosen = engines.choose_engine(engine)
    if gpus is not None and workers is not None:
        raise ConfigError("--gpus and --workers: give one of them, --gpus for a worker on each GPU", key="gpus")
    if gpus is not None and chosen == "ranks":
        raise ConfigError("--gpus: each rank has one GPU; say in torchrun or srun how many ranks there are", key="gpus")
    if gpus is not None and chosen == "local":
        _check_gpus(gpus)
    rank = ranks.place() if chosen == "ranks" else None
    if metrics_port is not None:
        _serve(metrics_port, console)
    tally, begun = Tally(), time.perf_counter()
    # One screen for the whole job: rank 0 shows all ranks.
    with _View(console, tally, shown=rank is None or rank[0] == 0) as view:
        how: dict[str, Any] = {"engine": chosen, "workers": workers or gpus, "on_gpus": True if gpus else None}
        for outcome in engines.run(job, source, suffixes, tally=tally, **how):
            if not outcome.key:
                continue
            view.update()
            if outcome.state == "failed":
                _log.warning("%s: %s", outcome.item, outcome.reason)
            text = "%s: %s, %d frames in %.2f s by %s"
            _log.debug(text, outcome.item, outcome.state, outcome.frames, outcome.seconds, outcome.worker)
        view.update()
    seconds = time.perf_counter() - begun
    mine = Tally(workers=tally.workers).sum()
    if mine.done + mine.failed:
        text = f"{mine.done} done, {mine.failed} failed, {mine.frames} frames, {mine.frames / seconds:.1f} frames/s"
        text += f"; {tally.earlier} files were done before" if tally.earlier else ""
    else:
        text = _why_nothing(engines.status(job, source, suffixes), source, suffixes)
    say(console, text if rank is None else f"rank {rank[0]}: {text}")
    if mine.failed:
        say(console, f"reasons: {job.out}/_ledger/failed.jsonl")
        raise typer.Exit(1)


def _why_nothing(state: Status, source: str, suffixes: tuple[str, ...]) -> str:
    """Says why a run did nothing; raises DataError if its source has nothing to do."""
    from owl_wms.errors import DataError

    if not state.done + state.left:
        raise DataError(f"{source}: holds no file that ends in {', '.join(suffixes)}", path=source)
    elsewhere = f", {state.left} are in work elsewhere" if state.left else ""
    return f"nothing is left to do: {state.done} files were done before{elsewhere}"


def _print_status(state: Status) -> None:
    text = f"done {state.done}, failed {state.failed}, left {state.left}"
    if state.rate is not None:
        text += f", {state.rate:.1f} frames/s in the last run"
    if state.seconds_left is not None and state.left:
        text += f", {state.seconds_left:.0f} s left at that rate"
    typer.echo(text)


def _print_wrong(found: Iterator[tuple[str, str]]) -> bool:
    """Prints the outputs that are wrong, and why; returns whether there are any."""
    wrong = 0
    for output, reason in found:
        typer.echo(os.fsencode(f"{output}: {reason}"))  # a name may be no UTF-8
        wrong += 1
    typer.echo(f"{wrong} wrong outputs; run without --verify to make them again" if wrong else "all as recorded")
    return wrong > 0


def _check_gpus(gpus: int) -> None:
    """Raises ConfigError if this machine shows fewer GPUs."""
    import torch

    from owl_wms.errors import ConfigError

    count = torch.cuda.device_count()
    if gpus > count:
        remedy = f"give at most {count}" if count else "leave it out; owl-wms doctor says why"
        raise ConfigError(f"--gpus {gpus}: this machine shows {count}; {remedy}", key="gpus")


class _View:
    """The progress of the whole job on one line, and with -v a line per worker."""

    def __init__(self, console: Console, tally: Tally, *, shown: bool) -> None:
        from owl_wms.cli import _shared as shared

        self._tally, self._begun = tally, time.perf_counter()
        self._bar = shared.progress(console, "items")
        self._bar.disable = not shown
        self._whole = self._bar.add_task("items", total=None)
        self._per_worker = _log.isEnabledFor(logging.INFO)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _View:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Shows the tally as it is now."""
        tally, seconds = self._tally, time.perf_counter() - self._begun
        counts = tally.sum()
        text = f"{counts.frames / seconds:.1f} frames/s, {counts.failed} failed"
        ended = tally.earlier + counts.done + counts.failed
        self._bar.update(self._whole, total=tally.total, completed=ended, description=text)
        for worker, has in sorted({**tally.workers, **tally.others}.items()) if self._per_worker else ():
            text = f"{worker}: {has.frames / seconds:.1f} frames/s, {has.failed} failed"
            if worker not in self._tasks:
                self._tasks[worker] = self._bar.add_task(text, total=None)
            self._bar.update(self._tasks[worker], completed=has.done + has.failed, description=text)


def _serve(port: int, console: Console) -> None:
    """Serves this process's counters to Prometheus; ranks of one machine take the ports from `port` on."""
    from owl_wms.batch import ranks
    from owl_wms.errors import ConfigError

    try:
        import prometheus_client
    except ImportError as error:
        text = "--metrics-port needs prometheus-client: pip install prometheus-client; or leave it out"
        raise ConfigError(text, key="metrics_port") from error
    taken = port + ranks.local_rank() if port else 0
    try:
        server, _ = prometheus_client.start_http_server(taken)
    except OSError as error:
        text = f"--metrics-port {taken}: {error.strerror}; name another port, or 0 for a free one"
        raise ConfigError(text, key="metrics_port") from error
    say(console, f"metrics: http://localhost:{server.server_port}/metrics")
