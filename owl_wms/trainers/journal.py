"""What a run reports: always one JSON line a step on disk, and Weights & Biases when it is installed, configured and
reachable.

Usage:
    journal = Journal(folder, wandb_cfg, config={...})
    journal.log(12, {"diffusion_loss": 0.9})
    journal.clips(12, [Path("step_12_0.mp4")], decode.stats().reason)
    journal.close()
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from owl_wms import env
from owl_wms.errors import ConfigError

_log = logging.getLogger(__name__)


class WandbSection(Protocol):
    """What is read of the `wandb` section; all may be None."""

    @property
    def name(self) -> str | None: ...
    @property
    def project(self) -> str | None: ...
    @property
    def run_name(self) -> str | None: ...


class Journal:
    """Reports of one run, written by rank 0."""

    def __init__(self, folder: Path, wandb_cfg: WandbSection | None, config: Mapping[str, Any]) -> None:
        """Open `{folder}/log.jsonl` for appending, and W&B when a project and WANDB_API_KEY are given.

        Raises:
            ConfigError: the folder cannot be made, or the file not be opened.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            key = "train.checkpoint_dir"
            raise ConfigError(f"{key}: {folder}: cannot be written: {error.strerror}", path=folder, key=key) from error
        self._start = time.monotonic()
        self._run = _start_wandb(wandb_cfg, config)

    def log(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Record the values of a step; a later line for the same step, after a resume, supersedes the earlier one.

        JSON has no NaN and no infinity: such values are written as the strings "nan", "inf" and "-inf".
        """
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def clips(self, step: int, paths: Sequence[Path], decoded_by: str) -> None:
        """Record decoded clips and what decoded them; videos also go to W&B under `samples`."""
        self.log(step, {"samples": ", ".join(path.name for path in paths), "decoded_by": decoded_by})
        videos = [path for path in paths if path.suffix == ".mp4"]
        if self._run is not None and videos:
            import wandb

            self._run.log({"samples": [wandb.Video(str(path), format="mp4") for path in videos]}, step=step)

    def close(self) -> None:
        """Finish both."""
        self._file.close()
        if self._run is not None:
            self._run.finish()


def _start_wandb(cfg: WandbSection | None, config: Mapping[str, Any]) -> Any:
    """A W&B run, or None; a service that cannot be reached costs a warning, not the training run."""
    if cfg is None or not cfg.project:
        return None
    if env.read("WANDB_API_KEY") is None:
        _log.warning("wandb.project is set but WANDB_API_KEY is not: logging to disk only")
        return None
    try:
        import wandb

        return wandb.init(entity=cfg.name, project=cfg.project, name=cfg.run_name, config=dict(config))
    except Exception as error:  # not installed, refused or unreachable: its errors share no base class
        remedy = "if it is not installed: pip install 'owl_wms[train]'"
        _log.warning("Weights & Biases is not available (%s): logging to disk only; %s", error, remedy)
        return None
