"""Clips during training: the averaged model continues held-out latents, the bridge decodes them, they are written to
disk.

Every rank samples its share. Rank 0 alone has the decoder: the others send it their latents, so with `use_tensorrt` the
decoder is compiled once, by one rank, through `torch.compile(backend="tensorrt")`, and the others spend no memory on
it. Random numbers are forked: how often a run is looked at does not change what it learns.

What is configured is tried before the first step (`prepare`), where a mistake costs nothing. What fails later costs the
clips of that step: a warning and a line in its log, and training goes on. Only a decoder that was told not to fall
back (`tensorrt_fallback: false`) ends the run. All ranks take part in the same exchanges whatever fails on one of them.

Usage:
    evaluator = Evaluator(trainer, sample_loader=None)
    evaluator.prepare()
    result = evaluator.run()          # result.paths == [.../samples/step_1000_0.mp4, ...] on rank 0
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from owl_wms.data.loaders import Loader
from owl_wms.data.loading import Batch
from owl_wms.errors import ConfigError, FastPathError, TrainingError
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.arrays import check_finite, save_array
from owl_wms.sampling import get_sampler_cls
from owl_wms.trainers.distributed import any_rank, gather_to_first
from owl_wms.trainers.output import write_clip
from owl_wms.trainers.run import Sampled
from owl_wms.whole import make_folder

if TYPE_CHECKING:
    from owl_wms.runtime import ClipDecode

Decode = Callable[[Tensor], Tensor]
_log = logging.getLogger(__name__)
_SEED = 20_000_003  # apart from the seeds of training steps


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """Outcome of one evaluation on this rank.

    Attributes:
        step: steps done when it was sampled.
        paths: clips written; empty where nothing is decoded.
        decoded_by: backend of the clips, and why; empty without clips.
        error: what failed on this rank, or None.
    """

    step: int
    paths: list[Path] = field(default_factory=list)
    decoded_by: str = ""
    error: str | None = None


class Evaluator:
    """Samples, decodes and writes clips for one trainer."""

    def __init__(self, trainer: Sampled, sample_loader: Loader | None) -> None:
        """Build the sampler.

        Raises:
            ConfigError: an unknown sampler or arguments that it does not take.
        """
        self._trainer = trainer
        self._given_loader = sample_loader
        self._batches: Iterator[Batch] | None = None
        self._decode: ClipDecode | None = None
        self._decode_audio: Decode | None = None
        self._staging: Path | None = None
        cfg = trainer.train_cfg
        try:
            self.sampler = get_sampler_cls(cfg.sampler_id or "")(**(cfg.sampler_kwargs or {}))
        except TypeError as error:
            raise ConfigError(f"sampler {cfg.sampler_id!r}: {error}", key="train.sampler_kwargs") from error

    def prepare(self) -> None:
        """Read the first batch of the evaluation's data on every rank, and load the decoders on rank 0.

        Raises:
            ConfigError, DataError, CheckpointError: data or decoder that cannot be used.
            TrainingError: that happened on another rank.
        """
        error: Exception | None = None
        try:
            batches = self._open_batches()
            self._batches = chain((next(batches),), batches)  # read, compared with the model, and not lost
            if self._trainer.rank == 0:
                self._load_decoders()
        except Exception as caught:
            error = caught
        self._stop_together(error)

    def run(self, staging: Path | None = None) -> Evaluation:
        """Sample on every rank, decode and write on rank 0; all ranks must call it.

        Args:
            staging: folder to write to instead of the run's own; `settle` moves the files.

        Returns:
            The files that were written, or the error.

        Raises:
            FastPathError: the compiled decoder failed and must not fall back.
            TrainingError: that happened on rank 0.
        """
        result, fatal = Evaluation(step=self._trainer.step), None
        self._staging = staging
        sampled: tuple[Tensor, Tensor | None] | None = None
        try:
            sampled = self._sample()
        except Exception as error:  # whatever it is, the run is worth more than a clip
            raise_interrupt(error)
            result.error = _described(error)
            self._batches = None  # a generator that raised is at its end
        # Kept on the CPU meanwhile: the first rank would otherwise hold everyone's latents on its device.
        gathered = gather_to_first(sampled)
        try:
            if self._decode is not None:
                self._write_all(gathered, result)
        except FastPathError as error:
            fatal = error
        except Exception as error:
            raise_interrupt(error)
            result.error = _described(error)
        self._stop_together(fatal)
        self._warn(result)
        return result

    def settle(self, result: Evaluation, staging: Path) -> None:
        """Move the files of `run(staging)` to their places, and name those in `result`.

        A file that cannot be moved costs the clips of this step, as what fails in `run` does.
        """
        samples, latents = self._trainer.folder / "samples", self._trainer.train_cfg.eval_sample_dir
        moved: list[Path] = []
        try:
            for name, place in (("samples", samples), ("latents", latents and Path(latents))):
                if place and (staging / name).is_dir():
                    make_folder(place)
                    for path in sorted((staging / name).iterdir()):
                        moved.append(Path(shutil.move(path, place / path.name)))
        except OSError as error:
            result.error = _described(error)
            self._warn(result)
        result.paths = [path for path in (samples / path.name for path in result.paths) if path in moved]

    def _warn(self, result: Evaluation) -> None:
        if result.error is not None:
            text = "step %d: evaluation failed on rank %d, training goes on: %s"
            _log.warning(text, result.step, self._trainer.rank, result.error)

    def _stop_together(self, error: Exception | None) -> None:
        """Raise `error`, and a TrainingError on the ranks that have none; also where they wait for each other."""
        failed = any_rank(error is not None, self._trainer.device)
        if error is not None:
            raise error
        if failed:
            raise TrainingError("evaluation cannot run on another rank; see its error", step=self._trainer.step)

    @torch.no_grad()
    def _sample(self) -> tuple[Tensor, Tensor | None]:
        """This rank's latents [b, n, c, h, w] and, for a model with sound, [b, n, c_a], as stored, on the CPU."""
        trainer, cfg = self._trainer, self._trainer.train_cfg
        if self._batches is None:
            self._batches = self._open_batches()
        batch = next(self._batches)
        cuda = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(_SEED + trainer.step * trainer.world_size + trainer.rank)
            core = core_of(trainer.ema.model)
            with torch.autocast(trainer.device.type, torch.bfloat16):
                result = trainer.sample(self.sampler, core, batch)
        latents = trainer.space.to_stored(result.latents.float()).cpu()
        check_finite(latents.flatten(0, 1), "what the averaged model sampled")
        sound = None
        if result.latents_audio is not None and cfg.audio_vae_scale is not None:
            sound = (result.latents_audio.float() * cfg.audio_vae_scale).cpu()
        self._keep_latents(latents, sound)
        return latents, sound

    def _open_batches(self) -> Iterator[Batch]:
        trainer, cfg = self._trainer, self._trainer.train_cfg
        share = -(-cfg.n_samples // trainer.world_size)
        loader = self._given_loader
        if loader is None:
            loader = trainer.make_loader(cfg.sample_data_id, cfg.sample_data_kwargs, share, "train.n_samples")
        return trainer.endless(loader, "sample_data_kwargs")

    @torch.no_grad()
    def _write_all(self, gathered: list[tuple[Tensor, Tensor | None] | None], result: Evaluation) -> None:
        """Decode and write what every rank sampled, and the trainer's predictions, on rank 0."""
        trainer = self._trainer
        stem = f"step_{trainer.step}"
        for rank, sampled in enumerate(gathered):
            if sampled is not None:
                name = stem if trainer.world_size == 1 else f"{stem}_rank{rank}"
                result.paths += self._write(name, *sampled)
        for name, latents in trainer.predictions().items():
            result.paths += self._write(f"{stem}_{name}", trainer.space.to_stored(latents), None)
        if result.paths and self._decode is not None:
            stats = self._decode.stats()
            result.decoded_by = f"{stats.backend}: {stats.reason}"

    def _write(self, name: str, latents: Tensor, sound: Tensor | None) -> list[Path]:
        trainer = self._trainer
        assert self._decode is not None  # asked for by `run`
        # Imported here: a run without a decoder needs none of it.
        from owl_wms.runtime import decode_pieces
        from owl_wms.runtime.steps import frames_per_latent

        audio = None
        if self._decode_audio is not None and sound is not None:
            audio = self._decode_audio(sound.to(trainer.device, torch.bfloat16))
        stem = (self._staging or trainer.folder) / "samples" / name
        return [
            write_clip(
                stem.with_name(f"{name}_{index}"),
                decode_pieces(self._decode, clip[None].to(trainer.device, torch.bfloat16)),
                None if audio is None else audio[index],
                fps=trainer.train_cfg.fps * frames_per_latent(self._decode.decoder),
            )
            for index, clip in enumerate(latents)
        ]

    def _keep_latents(self, latents: Tensor, sound: Tensor | None) -> None:
        """`vid.{step}.pt` and `aud.{step}.pt` in `eval_sample_dir`, when there is one."""
        trainer = self._trainer
        if trainer.train_cfg.eval_sample_dir is None:
            return
        folder = Path(trainer.train_cfg.eval_sample_dir) if self._staging is None else self._staging / "latents"
        make_folder(folder)
        rank = "" if trainer.rank == 0 else f".rank{trainer.rank}"
        for name, value in (("vid", latents), ("aud", sound)):
            if value is not None:
                save_array(folder / f"{name}.{trainer.step}{rank}.pt", value)

    def _load_decoders(self) -> None:
        """Load the video decoder and, if configured, the sound's; a decoder without a checkpoint stays None."""
        cfg, trainer = self._trainer.train_cfg, self._trainer
        if cfg.vae_ckpt_path is None and cfg.vae_id is None:
            _log.warning("train.vae_ckpt_path is not set: evaluation keeps latents only, no clips are decoded")
            return
        # Imported here: a run without a decoder needs none of it.
        from owl_wms.runtime import clip_decoder
        from owl_wms.runtime.latents import latent_channels
        from owl_wms.settings import TensorRTConfig
        from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_audio_decode_fn

        decoder = get_decoder_only(cfg.vae_id, cfg.vae_cfg_path, cfg.vae_ckpt_path, device=trainer.device)
        decoder.requires_grad_(False)
        wanted, taken = trainer.space.stored_channels(trainer.model_cfg.channels), latent_channels(decoder)
        if taken is not None and taken != wanted:
            raise ConfigError(
                f"train.vae_ckpt_path: the decoder takes latents of {taken} channels, and the model makes {wanted}; "
                "name the autoencoder that the data were encoded with",
                key="train.vae_ckpt_path",
            )
        # The training configuration's tensorrt_* fields hold here; a call's own use_tensorrt would outrank them.
        settings = TensorRTConfig.resolve(cfg, enabled=None if cfg.use_tensorrt else False)
        self._decode = clip_decoder(decoder, batch_size=cfg.vae_batch_size, settings=settings, jit=True, check="error")
        if cfg.audio_vae_ckpt_path is not None:
            audio = get_decoder_only(
                cfg.audio_vae_id, cfg.audio_vae_cfg_path, cfg.audio_vae_ckpt_path, device=trainer.device
            )
            self._decode_audio = make_batched_audio_decode_fn(
                audio.requires_grad_(False), cfg.vae_batch_size, check="error"
            )


def _described(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def core_of(model: nn.Module) -> nn.Module:
    """Return the network that samplers take: `.core` of a wrapper, or the model itself."""
    return model.core if hasattr(model, "core") else model  # type: ignore[return-value]
