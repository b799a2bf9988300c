"""Runs a job over a list of items on an engine, and reports on what earlier runs did.

Usage:
    for outcome in run(job, source, suffixes, engine="local", workers=2): ...
    state = status(job, source, suffixes)
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from importlib import util
from typing import NamedTuple

import torch

from owl_wms import env
from owl_wms.batch import ranks
from owl_wms.batch.items import Item, cut, is_there, list_items
from owl_wms.batch.job import Job, announce, announced
from owl_wms.batch.ledger import Failures, Index, Part, run_name
from owl_wms.batch.local import run_local
from owl_wms.batch.lock import held, quiet
from owl_wms.batch.on_ray import join, run_ray
from owl_wms.batch.outputs import count_frames
from owl_wms.batch.progress import Board, Tally
from owl_wms.batch.store import Store
from owl_wms.batch.worker import Block, Outcome, storing
from owl_wms.errors import BatchError, ConfigError, DataError

ENGINES = ("ray", "ranks", "local")
_PAUSE_MINUTES = 5


class Status(NamedTuple):
    """The state of a generation, as its ledger has it.

    Attributes:
        done, failed, left: items; `left` includes the failed ones, which the next run tries again.
        frames: written so far.
        rate: frames per second over the last run, or None where it cannot be told.
        seconds_left: for the items left at that rate, or None.
    """

    done: int
    failed: int
    left: int
    frames: int
    rate: float | None
    seconds_left: float | None


def choose_engine(name: str | None) -> str:
    """Returns the engine of this name, or by default: Ray if it is installed and RAY_ADDRESS is set; ranks under
    torchrun or srun; else local.

    Raises:
        ConfigError: another name, or `ranks` without a launcher.
    """
    if name is not None and name not in ENGINES:
        raise ConfigError(f"--engine must be one of {', '.join(ENGINES)}, got {name!r}", key="engine")
    launched = ranks.place()
    if name == "ranks" and launched is None:
        raise ConfigError("--engine ranks needs RANK and WORLD_SIZE: start it with torchrun or srun", key="engine")
    if name is not None:
        return name
    if env.read("RAY_ADDRESS") is not None and util.find_spec("ray") is not None:
        return "ray"
    return "ranks" if launched is not None else "local"


def run(
    job: Job,
    source: str,
    suffixes: tuple[str, ...],
    *,
    engine: str | None = None,
    workers: int | None = None,
    devices: list[str | None] | None = None,
    on_gpus: bool | None = None,
    tally: Tally | None = None,
) -> Iterator[Outcome]:
    """Processes what is missing, and yields an outcome per item as it ends (and one without a key per block).

    Args:
        job: from `prepare`.
        source, suffixes: see `list_items`.
        engine: see `choose_engine`.
        workers: processes or actors; by default one per GPU, or one without a GPU. Ray's GPUs are those of the cluster.
        devices: of local workers, in turn; by default every GPU.
        on_gpus: whether each Ray actor gets a GPU; by default if the cluster has one.
        tally: is kept up to date; the items are then counted too, by a second listing.

    Raises:
        BatchError: another run is writing there, or outputs cannot be stored.
        ConfigError, DataError: an argument or the source cannot be used.
    """
    chosen = choose_engine(engine)
    if chosen == "local" and workers is not None and not 1 <= workers <= env.MOST_PROCESSES:
        text = f"workers must be 1 to {env.MOST_PROCESSES} on this machine, got {workers}"
        raise ConfigError(text, key="workers")
    on_ranks = chosen == "ranks"
    rank, world = (ranks.place() if on_ranks else None) or (0, 1)
    with ExitStack() as stack:
        check = stack.enter_context(held(job, rank if on_ranks else None))
        ledger = job.ledger()
        store = ledger.store
        with storing(job.out):
            name = run_name(announced(job))
        with quiet(job), storing(job.out):
            if on_ranks:
                store.remove_abandoned()
            else:
                shutil.rmtree(store.staging(""), ignore_errors=True)
            if rank == 0:
                announce(job, name)
        with storing(job.out):
            index = ledger.index()
            stack.callback(index.close)
            ledger.adopt(index, name, (rank, world))
        seen = Tally() if tally is None else tally
        board = Board(store, rank, world, seen) if on_ranks else None
        listing = (source, suffixes, job.out)
        counting = threading.Thread(target=_count, args=(*listing, seen), name="owl-wms-count", daemon=True)
        if tally is not None:
            counting.start()
        missing = _missing(job, list_items(*listing), index, rank, world, seen)
        if chosen == "ray":
            count, gpus = join(workers, on_gpus)
            outcomes = run_ray(job, _named(missing, name, rank, count), count, run=name, gpus=gpus)
        else:
            places = devices or ([ranks.device()] if on_ranks else _every_gpu())
            count = workers or len(places)
            places = [places[number % len(places)] for number in range(count)]
            outcomes = run_local(job, _named(missing, name, rank, count), places)
        stack.callback(outcomes.close)  # the workers end before the output is given free
        for outcome in outcomes:
            check()
            if outcome.key:
                seen.take(outcome)
            if board is not None:
                board.post()
            yield outcome
        if tally is not None:
            counting.join()  # about as far as the listing that has just ended
        if board is not None:
            board.post(now=True)
        with storing(job.out):
            ledger.write_failures(shared=on_ranks)
        if not on_ranks:  # whose other processes may be at work
            shutil.rmtree(store.staging(""), ignore_errors=True)


def _missing(job: Job, items: Iterator[Item], index: Index, rank: int, world: int, tally: Tally) -> Iterator[Item]:
    """Yields the items of this rank, every `world`-th from number `rank` on, that are not done.

    Raises:
        BatchError: another file, which is still there, has given an item's outputs their names.
    """
    for number, item in enumerate(items):
        if index.is_done(item.key(job.generation)):
            tally.earlier += 1
        elif number % world == rank:
            other = index.made_of(item.name)
            if other not in (None, item.url) and is_there(str(other)):
                text = f"{job.out}: has outputs of {other}, which those of {item.url} would replace"
                raise BatchError(f"{text}; give another --out", out=job.out)
            yield item


def _count(source: str, suffixes: tuple[str, ...], out: str, tally: Tally) -> None:
    with suppress(DataError):  # which the run itself raises
        tally.total = sum(1 for _ in list_items(source, suffixes, out))


def _named(items: Iterator[Item], run: str, rank: int, workers: int) -> Iterator[Block]:
    return ((f"{run}-{rank}-{number}", block) for number, block in enumerate(cut(items, workers)))


def _every_gpu() -> list[str | None]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or [None]


def status(job: Job, source: str, suffixes: tuple[str, ...]) -> Status:
    """Returns how far the work on `source` is, from the ledger and a listing.

    Raises:
        BatchError: the ledger cannot be read.
        DataError: the source cannot be listed.
    """
    index = Index()
    minutes: dict[int, tuple[int, float, float]] = {}  # frames, first and last second
    failures = Failures()
    with storing(job.out):
        for line in job.ledger().lines():
            index.take([line])
            failures.take(line)
            if line.get("event") == "done":
                at = float(line["at"])
                frames, first, last = minutes.get(int(at // 60), (0, at, at))
                first, last = min(first, at - float(line.get("seconds", 0))), max(last, at)
                minutes[int(at // 60)] = frames + int(line.get("frames", 0)), first, last
    done = left = 0
    for item in list_items(source, suffixes, job.out):
        if index.is_done(item.key(job.generation)):
            done += 1
        else:
            left += 1
    total = index.frames
    index.close()
    rate = _last_rate(minutes)
    seconds = left * (total / done) / rate if rate and done else None
    return Status(done, len(failures.by_item), left, total, rate, seconds)


def _last_rate(minutes: dict[int, tuple[int, float, float]]) -> float | None:
    """Returns the frames per second of the last stretch of work without a pause of `_PAUSE_MINUTES`."""
    stretch: list[int] = []
    for minute in sorted(minutes, reverse=True):
        if stretch and stretch[-1] - minute > _PAUSE_MINUTES:
            break
        stretch.append(minute)
    if not stretch:
        return None
    seconds = max(minutes[m][2] for m in stretch) - min(minutes[m][1] for m in stretch)
    return sum(minutes[m][0] for m in stretch) / seconds if seconds > 0 else None


def verify(job: Job) -> Iterator[tuple[str, str]]:
    """Yields (output, what is wrong) for every output whose hash or frame count is not what the ledger says.

    Its item is recorded as lost, so the next run makes it again.

    Raises:
        BatchError: another run is writing there.
    """
    with held(job), storing(job.out):
        ledger, name, part = job.ledger(), run_name(announced(job)), None
        index = Index(kept=("done",))
        index.take(ledger.lines())
        for line in index.lines("done"):
            wrong = [
                (output["name"], reason)
                for output in line.get("outputs", ())
                if (reason := _fault(ledger.store, output, job.form)) is not None
            ]
            if wrong:
                if part is None:
                    announce(job, name)
                    part = Part(ledger.store, f"{name}-verify")
                part.add("lost", line["key"])
                yield from wrong
        index.close()
        if part is not None:
            part.close()


def _fault(store: Store, output: dict[str, object], form: str) -> str | None:
    name = str(output["name"])
    digest = store.digest(name)
    if digest is None:
        return "is not there"
    if digest != output["sha256"]:
        return "its hash is not the one that was recorded"
    copy = store.staging("verify") / f"output.{form}"
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        whole = store.download(name, copy)  # a store that cannot be asked now has not lost the output
        try:
            frames = count_frames(whole, form)
        except (OSError, ValueError, DataError, BatchError) as error:
            return f"cannot be read: {error}"
    finally:
        shutil.rmtree(copy.parent, ignore_errors=True)
    return None if frames == output["frames"] else f"has {frames} frames, {output['frames']} were written"
