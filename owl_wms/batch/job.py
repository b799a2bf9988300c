"""Says what one run does to every item, in a form that a worker process on any machine can be given.

Usage:
    job = prepare(partial(DecodeClips, "dec.yml", "dec.pt"), "s3://bucket/frames", form="npy", settings={...})
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from owl_wms.batch.ledger import Ledger
from owl_wms.batch.store import FOLDER, GENERATION, Store
from owl_wms.errors import ConfigError
from owl_wms.files import at_home, one_line
from owl_wms.vae.weight_files import files_of

SETTINGS = f"{FOLDER}/settings.json"
TIME_LIMIT = 3600.0
FPS = 60.0
"""Frames per second of mp4 where neither the run nor the file says them."""


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to process any block.

    Attributes:
        make: makes the worker's Clips; called once per worker with `device=`. It can be pickled.
        out: URL or path of the generation's folder.
        generation: stands for checkpoint, configuration and output settings in every item's key.
        form: an ending without its dot, of `FRAME_FORMS`, or of `LATENT_FORMS` with `encodes`.
        encodes: whether frames become latents.
        fps: frames per second of mp4; None is the rate that each file states, else `FPS`.
        time_limit: seconds that one item may take.
    """

    make: Callable[..., Any]
    out: str
    generation: str
    form: str
    encodes: bool = False
    fps: float | None = FPS
    time_limit: float = TIME_LIMIT

    def ledger(self) -> Ledger:
        """Returns the ledger of this generation."""
        return Ledger(Store(self.out))


def prepare(
    make: Callable[..., Any],
    out: str,
    *,
    form: str,
    settings: dict[str, Any],
    encodes: bool = False,
    fps: float | None = FPS,
    time_limit: float = TIME_LIMIT,
) -> tuple[Job, list[str]]:
    """Returns the job of these settings, and the names of other generations that `out` holds; writes nothing.

    Args:
        make, form, encodes, fps, time_limit: see Job.
        out: folder or URL that holds the generations.
        settings: everything that changes an output's bytes, as JSON can hold it.

    Raises:
        ConfigError: `out` cannot be used.
    """
    text = json.dumps({**settings, "form": form, "fps": fps, "encodes": encodes}, sort_keys=True)
    generation = f"{GENERATION}{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    try:
        store = Store(out)
        others = [name for name in _generations(store) if name != generation]
        whole = store.path(generation) if store.is_local else store.fs.unstrip_protocol(store.path(generation))
    except Exception as error:  # a store's library has errors of its own: no credentials, no such host
        hint = "install it (s3:// needs s3fs)" if isinstance(error, ImportError) else "check it"
        raise ConfigError(f"--out {out}: cannot be used: {one_line(error)}; {hint}", key="out") from error
    return Job(make, whole, generation, form, encodes, fps, time_limit), others


def _generations(store: Store) -> list[str]:
    try:
        found = store.fs.ls(store.root, detail=False)
    except FileNotFoundError:
        return []
    names = (path.rstrip("/").rpartition("/")[2] for path in found)
    return sorted(name for name in names if name.startswith(GENERATION))


def announce(job: Job, run: str) -> None:
    """Writes down which run is at work on the output.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps({"generation": job.generation, "form": job.form, "run": run})
    Store(job.out).write(SETTINGS, text.encode())


def announced(job: Job) -> str | None:
    """Returns the name of the last run that was announced, or None."""
    try:
        found = json.loads(Store(job.out).read(SETTINGS) or b"{}")
    except (ValueError, RecursionError):
        return None
    return str(found["run"]) if isinstance(found, dict) and "run" in found else None


def digest_of_files(path: str | None) -> str:
    """Returns the SHA-256 of a file, or of several with their names: a folder's, or shards'; `""` for None.

    Raises:
        ConfigError: it cannot be read.
        CheckpointError: an index of shards that cannot be used.
    """
    if path is None:
        return ""
    root, digest = at_home(path), hashlib.sha256()
    try:
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else files_of(root)
        top = root if root.is_dir() or len(files) == 1 else root.parent
        for file in files:
            digest.update(os.fsencode(file.relative_to(top)) + b"\0")
            with file.open("rb") as opened:
                while piece := opened.read(4 << 20):
                    digest.update(piece)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path", path=path) from error
    return digest.hexdigest()
