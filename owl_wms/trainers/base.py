"""Shared by all trainers: setup, the loop, average, checkpoints, resume, evaluation, reports. A trainer adds its loss.

A step's random numbers are a function of (seed, step, rank), and the loader's position is stored. A run that was killed
and resumed therefore repeats the losses of one that was not. Nothing is written, moved or deleted before the first step
is done. A signal (see `signals`) ends the loop after the current step with a checkpoint; all ranks agree on it. A step
is applied whole or not at all (see `undo`), and a run that fails saves its last whole step first. Nothing that is not
finite is ever applied to the weights or saved. Evaluation samples on all ranks and decodes on rank 0, the only one that
has, and compiles, the decoder (see `evaluation`).

Usage:
    trainer = get_trainer_cls("rft")(cfg.train, cfg.wandb, cfg.model, rank, local_rank, world_size)
    trainer.train()
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms import env
from owl_wms.configs.vae import WandbConfig
from owl_wms.configs.world import TrainingConfig, WorldModelConfig, require_trainer_keys
from owl_wms.data.loaders import Loader, get_loader
from owl_wms.data.loading import BATCH_KEY, Batch
from owl_wms.errors import TrainingError
from owl_wms.models.latents import LatentSpace
from owl_wms.sampling import SampleResult, batch_permute_to_length, continue_video
from owl_wms.temporary import temporary_folder
from owl_wms.trainers.batches import BatchRule, batches_per_update, endless
from owl_wms.trainers.checkpoints import (
    averaged_weights,
    checkpoint_path,
    latest_checkpoint,
    load_core_weights,
    save_checkpoint,
    save_output,
    set_aside,
)
from owl_wms.trainers.distributed import any_rank, barrier, choose_device
from owl_wms.trainers.ema import EMA
from owl_wms.trainers.evaluation import Evaluation, Evaluator, core_of
from owl_wms.trainers.guards import REMEDY, broken_weight, raise_if_rank_lost, require_finite, rescue
from owl_wms.trainers.metrics import Metrics
from owl_wms.trainers.optim.optimisers import build_optimiser, build_schedule
from owl_wms.trainers.phases import Loss, Phase
from owl_wms.trainers.progress import Progress, StartLog
from owl_wms.trainers.restore import restore
from owl_wms.trainers.run_lock import RunLock
from owl_wms.trainers.run_log import RunLog
from owl_wms.trainers.signals import StopRequest, stop_signals
from owl_wms.trainers.undo import Undo

_log = logging.getLogger(__name__)
LATEST = "latest"
_ASIDE = "%s held checkpoints of another run, with steps after %d: they are in %s now; --resume continues a run"


class BaseTrainer(ABC):
    """A training run on one rank.

    Attributes:
        model: what is trained and averaged.
        step: optimiser steps done.
        position: of the loader after that step.
        saved_step: steps that are on disk.
        losses: means of every step of this process, oldest first.
    """

    trainer_id: str
    batch_parts: tuple[str, ...] = ("latents", "mouse", "buttons")
    ema_beta = 0.999
    clip: float | None = 10.0
    stops_by_epochs = True

    def __init__(
        self,
        train_cfg: TrainingConfig,
        wandb_cfg: WandbConfig | None,
        model_cfg: WorldModelConfig,
        global_rank: int = 0,
        local_rank: int = 0,
        world_size: int = 1,
        *,
        loader: Loader | None = None,
        sample_loader: Loader | None = None,
        max_seconds: float | None = None,
    ) -> None:
        """Build models, optimisers and loaders.

        Args:
            train_cfg, wandb_cfg, model_cfg: sections of the configuration.
            global_rank, local_rank, world_size: what `setup()` returned.
            loader: training batches, instead of those of `train.data_id`.
            sample_loader: evaluation batches, instead of those of `train.sample_data_id`.
            max_seconds: end the loop, with a checkpoint, after this long.

        Raises:
            ConfigError, DataError, CheckpointError: a configuration, data or weights that cannot be used, or a folder
                in which another run is under way.
        """
        # Before anything is put on a GPU: otherwise every rank first fills GPU 0.
        self.device = choose_device(local_rank)
        require_trainer_keys(train_cfg, self.trainer_id)
        self.train_cfg, self.wandb_cfg, self.model_cfg = train_cfg, wandb_cfg, model_cfg
        self.rank, self.local_rank, self.world_size = global_rank, local_rank, world_size
        self.folder = Path(train_cfg.checkpoint_dir)
        self._lock = RunLock(self.folder)  # of rank 0 alone
        if global_rank == 0:
            self._lock.look()
        self.step = self.saved_step = 0
        self.losses: list[dict[str, float]] = []
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._signal = StopRequest()  # on this rank, at any moment
        self._stop = False  # agreed by all ranks, between two steps
        self._begun = False  # whether `train` has restored what this run continues
        self._opened = False  # whether this run has its folder
        self.run_log: RunLog | None = None  # on rank 0, once it has
        self._start_log = StartLog(enabled=global_rank == 0)
        self._start_log.log("building model and optimisers")
        self.space = LatentSpace.of(train_cfg).to(self.device)
        torch.manual_seed(train_cfg.seed)
        self.model = self.build_model().to(self.device).train()
        self.ema = EMA(self.model, self.ema_beta)
        self.phases = self.build_phases()
        self._start_log.log("opening the training data")
        self.loader = loader or self.make_loader(train_cfg.data_id, train_cfg.data_kwargs, train_cfg.batch_size)
        self._batches = self.endless(self.loader, "data_kwargs")
        self.position = self.loader.state_dict()
        self._environment = env.describe_machine()
        self.evaluator = Evaluator(self, sample_loader)
        self.metrics = Metrics(self.device)

    # Methods that a trainer implements.

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build the model that is trained, on the CPU; also the place to load teachers."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch on the device, and the values to report; runs under bf16 autocast."""

    def build_phases(self) -> list[Phase]:
        """Build the updates of a step, in order."""
        return [self.phase("model", self.model, self.loss, self.train_cfg.opt, self.train_cfg.opt_kwargs)]

    def sample(self, sampler: Any, core: nn.Module, batch: Batch) -> SampleResult:
        """Continue a batch with the averaged core; here for video, with controls of other items once its own end."""
        video, mouse, btn = batch[:3]
        mouse, btn = batch_permute_to_length(mouse, btn, video.shape[1] + sampler.num_frames)
        return continue_video(sampler, core, self.to_latents(video), mouse, btn)

    def predictions(self) -> dict[str, Tensor]:
        """Further clips [b, n, c, h, w] in the model's scale that an evaluation shows, by name; most have none."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """Return further entries of the checkpoint."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027  (most trainers add nothing)
        """Take those entries."""

    # Methods that all trainers share.

    def phase(
        self, name: str, model: nn.Module, loss: Loss, opt: str, opt_kwargs: dict[str, Any] | None, *, repeats: int = 1
    ) -> Phase:
        """Build a phase with this run's accumulation, schedule and clipping; Muon bounds its updates and has none."""
        cfg = self.train_cfg
        optimiser = build_optimiser(opt, model, opt_kwargs)
        return Phase(
            name,
            model,
            loss,
            optimiser,
            accumulation=batches_per_update(cfg, self.world_size, logs=(name, self.rank) == ("model", 0)),
            repeats=repeats,
            clip=None if opt == "Muon" else self.clip,
            schedule=build_schedule(cfg.scheduler, cfg.scheduler_kwargs, optimiser, last_step=cfg.max_steps),
        )

    def train(self) -> None:
        """Run until epochs, `max_steps`, `max_seconds` or a signal end it; the last state is saved.

        Raises:
            ConfigError, DataError, CheckpointError: before the first step, a file or a setting cannot be used; the
                run's folder is as it was.
            TrainingError: a loss, gradient or weight is no longer finite, and nothing was saved over; or another rank
                ended, and rank 0 saved the last whole step.
            DataError: a row that cannot be used; the steps before it are saved.
        """
        if self._begun:  # a notebook may call `train` again, which goes on from where this run is
            self.loader.load_state_dict(self.position)
            self._batches = self.endless(self.loader, "data_kwargs")  # whatever raised in the old ones has ended them
        else:
            self.resume()
            self.saved_step, self._begun = self.step, True
        self._start_log.log("loading evaluation data and decoder")
        self.evaluator.prepare()
        self._stop, failed = False, True
        try:
            progress = Progress(total=self.train_cfg.max_steps, done=self.step, enabled=self.rank == 0)
            with stop_signals(logs=self.rank == 0) as self._signal, progress:
                while not self._finished():
                    values = self._evaluate_and_step()
                    progress.show(self.step, values)
                    if self.run_log is not None:
                        self.run_log.log(self.step, values)
                    require_finite(self.step, values)
                    if self.lost_folder:
                        self._lock.check(self.step)
                    if self.step % self.train_cfg.save_interval == 0:
                        self.save()
                if any_rank(self.step != self.saved_step, self.device):  # rank 0 alone knows of a step that was rescued
                    self.save()
                if not self._stop:
                    self.evaluate()
                elif self._signal:
                    _log.warning("%s: the run ends after step %d; --resume continues it", self._signal.by, self.step)
            failed = False
        except BaseException as error:  # KeyboardInterrupt too: a second Ctrl-C ends the step, not what is saved
            rescue(self, error)
            raise_if_rank_lost(error, self.step)
            raise
        finally:
            if self.run_log is not None:
                self.run_log.close(failed=failed)
            self.run_log, self._opened = None, False
            self._lock.release()

    def train_step(self) -> dict[str, float]:
        """Make one step of all phases; returns means over micro-batches and ranks, the seconds and the rate.

        If it raises before all phases and the average are updated, weights, optimisers and position are those of the
        step before.
        """
        started = time.perf_counter()
        # Fixed by the step, so that a resumed run draws what the killed one would have drawn.
        torch.manual_seed((self.train_cfg.seed * 1_000_003 + self.step) * self.world_size + self.rank)
        self.model.train()
        self.metrics.forget()  # what a step that failed has left
        with Undo() as undo:
            undo.keep_values(self, "step", "position")
            undo.keep_values(self.ema, "steps")
            for phase in self.phases:
                phase.update(self._batches, self.metrics, self.step, undo)
            undo.keep(self.ema.model)
            self.ema.update(self.model)
            self.step, self.position = self.step + 1, self.loader.state_dict()
        late = self._deadline is not None and time.monotonic() > self._deadline
        values, self._stop = self.metrics.pop(stop=bool(self._signal) or late)
        self.losses.append(values)
        rate = float(self.phases[-1].optimiser.param_groups[0]["lr"])
        return {**values, "lr": rate, "time": time.perf_counter() - started}

    def checkpoint(self) -> dict[str, Any]:
        """Return the run's state: `model`, `ema`, `opt`, `steps`, the data position, configuration, machine, and what
        the trainer adds.
        """
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "opt": self.phases[-1].optimiser.state_dict(),
            "steps": self.step,
            "data": self.position,
            "config": self.configuration(),
            "environment": self._environment,
            **self.extra_state(),
        }

    def save(self) -> None:
        """Write `step_{n}.pt`, and the averaged weights alone to `output_path`; by rank 0, the others wait.

        Raises:
            TrainingError: weights that are not finite, on all ranks alike; the files stay as they are.
        """
        if (broken := broken_weight(self.checkpoint())) is not None:
            text = f"step {self.step}: weight {broken!r} is NaN or infinite and nothing is saved; {REMEDY}"
            raise TrainingError(text, step=self.step)
        if self.rank == 0:
            self.write_checkpoint()
        barrier()
        self.saved_step = self.step

    def write_checkpoint(self) -> None:
        """Write the files of `save`, on this rank alone and without a look at the weights.

        Raises:
            TrainingError: another run has taken the folder over; nothing is written.
        """
        self._lock.check(self.step)
        save_checkpoint(checkpoint_path(self.folder, self.step), self.checkpoint())
        if self.train_cfg.output_path is not None:
            save_output(Path(self.train_cfg.output_path), averaged_weights(self.ema.state_dict()))

    @property
    def lost_folder(self) -> bool:
        """True if another run has the folder, so that this one writes nothing there."""
        return self._lock.lost

    def resume(self) -> None:
        """Continue from `resume_ckpt`, where `latest` means the newest in the checkpoint folder, if there is one.

        A run that does not continue another starts from `init_ckpt`, weights alone, where that is given. Settings are
        those of the configuration, also where the checkpoint has others.

        Raises:
            CheckpointError: a file that cannot be read or holds another architecture.
        """
        wanted = self.train_cfg.resume_ckpt
        path = latest_checkpoint(self.folder) if wanted == LATEST else wanted
        if path is not None:
            self._start_log.log(f"restoring {path}")
            restore(self, path)
        elif self.train_cfg.init_ckpt is not None:
            load_core_weights(core_of(self.model), self.train_cfg.init_ckpt)
            self.ema = EMA(self.model, self.ema_beta)

    def to_latents(self, video: Tensor) -> Tensor:
        """Return stored latents in the scale of the world model."""
        return self.space.to_model(video)

    def _finished(self) -> bool:
        cfg = self.train_cfg
        if self._stop or (cfg.max_steps is not None and self.step >= cfg.max_steps):
            return True
        return self.stops_by_epochs and self.loader.epoch >= cfg.epochs

    def _evaluate_and_step(self) -> dict[str, float]:
        """Evaluate, if this step is due for it, and make the next one; the first step opens the run's folder."""
        if self._opened:
            self.evaluate()
            return self.train_step()
        with temporary_folder("clips") as place:
            found = None
            if self._evaluation_due():
                self._start_log.log("making the first clips")
                found = self.evaluator.run(place)
            self._start_log.log("making the first step")
            values = self.train_step()
            self._start_log.log("the run is under way")
            self._open()
            if found is not None:
                self.evaluator.settle(found, place)
                self._report(found)
        return values

    def _open(self) -> None:
        """Take the run's folder: set other runs' checkpoints aside and begin the run's log, once, on rank 0."""
        if self._opened:
            return
        self._opened = True
        if self.rank != 0:
            return
        self._lock.take()
        if (aside := set_aside(self.folder, self.saved_step)) is not None:
            _log.warning(_ASIDE, self.folder, self.saved_step, aside.name)
        self.run_log = RunLog(self.folder, self.wandb_cfg, self.configuration(), tensorboard=self.train_cfg.tensorboard)

    def configuration(self) -> dict[str, Any]:
        """Return the sections of the configuration, as they go into checkpoints and reports."""
        return {"train": self.train_cfg.model_dump(mode="json"), "model": self.model_cfg.model_dump(mode="json")}

    def evaluate(self) -> None:
        """Sample, decode and report, if this step is due for it; all ranks must call it."""
        if self._evaluation_due():
            self._open()
            self._report(self.evaluator.run())

    def _evaluation_due(self) -> bool:
        return self.step % self.train_cfg.sample_interval == 0

    def _report(self, result: Evaluation) -> None:
        if self.run_log is not None and result.paths:
            self.run_log.clips(result.step, result.paths, result.decoded_by)
        if self.run_log is not None and result.error is not None:
            self.run_log.log(result.step, {"evaluation_error": result.error})

    def make_loader(
        self, data_id: str | None, kwargs: dict[str, Any] | None, batch_size: int, batch_key: str = BATCH_KEY
    ) -> Loader:
        """Build a loader for this rank; `batch_key` is the key of the configuration that `batch_size` comes from."""
        cfg = self.train_cfg
        settings = {"seed": cfg.seed, "rank": self.rank, "world_size": self.world_size, **(kwargs or {})}
        return get_loader(data_id or "", batch_size, batch_key=batch_key, **settings)

    def endless(self, loader: Loader, section: str) -> Iterator[Batch]:
        """Batches on the device, each compared with the model; `section` is the key of `train` they come from."""
        kwargs = getattr(self.train_cfg, section)
        rule = BatchRule(self.batch_parts, self.model_cfg, self.space, f"train.{section}", kwargs)
        return endless(loader, rule, self.device)
