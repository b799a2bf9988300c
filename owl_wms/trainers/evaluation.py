"""Clips during training: the averaged model continues held-out latents, the bridge decodes them, they are written to
disk.

Every rank samples its share and writes its own files, so there is nothing to gather and shapes need not agree. Random
numbers are forked: how often a run is looked at does not change what it learns. With `use_tensorrt` the decoder runs
through `torch.compile(backend="tensorrt")`; the first rank of a node builds it before the others start.

Usage:
    evaluator = Evaluator(trainer, sample_loader=None)
    paths = evaluator.run()          # [.../samples/step_1000_0.mp4, ...]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from owl_wms.data.loaders import Loader
from owl_wms.data.loading import Batch
from owl_wms.errors import ConfigError
from owl_wms.sampling import SampleResult, get_sampler_cls
from owl_wms.trainers.distributed import rank_zero_first
from owl_wms.trainers.output import write_clip

if TYPE_CHECKING:
    from owl_wms.runtime import VideoDecode
    from owl_wms.trainers.base import BaseTrainer

Decode = Callable[[Tensor], Tensor]
_log = logging.getLogger(__name__)
_SEED = 20_000_003  # apart from the seeds of training steps


class Evaluator:
    """Samples, decodes and writes clips for one trainer.

    Attributes:
        decoded_by: backend of the last clips, and why; empty before the first and where nothing is decoded.
    """

    def __init__(self, trainer: BaseTrainer, sample_loader: Loader | None) -> None:
        """Build the sampler and, on first use, loader and decoders.

        Raises:
            ConfigError: an unknown sampler or arguments that it does not take.
        """
        self._trainer = trainer
        self._given_loader = sample_loader
        self._batches: Iterator[Batch] | None = None
        self._decoders: tuple[VideoDecode | None, Decode | None] | None = None
        self.decoded_by = ""
        cfg = trainer.train_cfg
        try:
            self.sampler = get_sampler_cls(cfg.sampler_id or "")(**(cfg.sampler_kwargs or {}))
        except TypeError as error:
            raise ConfigError(f"sampler {cfg.sampler_id!r}: {error}", key="train.sampler_kwargs") from error

    @torch.no_grad()
    def run(self) -> list[Path]:
        """Write this rank's clips of the current step; returns their paths."""
        trainer, cfg = self._trainer, self._trainer.train_cfg
        if self._batches is None:
            loader = self._given_loader or trainer.make_loader(
                cfg.sample_data_id, cfg.sample_data_kwargs, -(-cfg.n_samples // trainer.world_size)
            )
            self._batches = trainer.endless(loader)
        batch = next(self._batches)
        cuda = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(_SEED + trainer.step * trainer.world_size + trainer.rank)
            core = core_of(trainer.ema.model)
            with torch.autocast(trainer.device.type, torch.bfloat16):
                result = trainer.sample(self.sampler, core, batch)
        latents = result.latents.float() * cfg.vae_scale
        sound = None
        if result.latents_audio is not None and cfg.audio_vae_scale is not None:
            sound = result.latents_audio.float() * cfg.audio_vae_scale
        self._keep_latents(latents, sound)
        if self._decoders is None:
            self._decoders = self._make_decoders(latents)
        decode, decode_audio = self._decoders
        if decode is None:
            return []
        video = decode(latents.bfloat16())
        stats = decode.stats()
        self.decoded_by = f"{stats.backend}: {stats.reason}"
        audio = decode_audio(sound.bfloat16()) if decode_audio is not None and sound is not None else None
        return self._write(video, audio, result)

    def _write(self, video: Tensor, audio: Tensor | None, result: SampleResult) -> list[Path]:
        trainer = self._trainer
        suffix = "" if trainer.world_size == 1 else f"_rank{trainer.rank}"
        stem = trainer.folder / "samples" / f"step_{trainer.step}{suffix}"
        paths = []
        for index, clip in enumerate(video):
            sound = None if audio is None else audio[index]
            paths.append(write_clip(stem.with_name(f"{stem.name}_{index}"), clip, sound, fps=trainer.train_cfg.fps))
        return paths

    def _keep_latents(self, latents: Tensor, sound: Tensor | None) -> None:
        """`vid.{step}.pt` and `aud.{step}.pt` in `eval_sample_dir`, when there is one."""
        trainer = self._trainer
        if trainer.train_cfg.eval_sample_dir is None:
            return
        folder = Path(trainer.train_cfg.eval_sample_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = "" if trainer.rank == 0 else f".rank{trainer.rank}"
        for name, value in (("vid", latents), ("aud", sound)):
            if value is not None:
                torch.save(value.cpu(), folder / f"{name}.{trainer.step}{rank}.pt")

    def _make_decoders(self, latents: Tensor) -> tuple[VideoDecode | None, Decode | None]:
        """The video decoder and, where configured, the sound's; None for what has no checkpoint."""
        cfg, trainer = self._trainer.train_cfg, self._trainer
        if cfg.vae_ckpt_path is None and cfg.vae_id is None:
            _log.warning("train.vae_ckpt_path is not set: evaluation keeps latents only, no clips are decoded")
            return None, None
        # Imported here: a run without a decoder needs none of it.
        from owl_wms.utils.owl_vae_bridge import (
            get_decoder_only,
            make_batched_audio_decode_fn,
            make_batched_decode_fn,
        )

        decoder = get_decoder_only(cfg.vae_id, cfg.vae_cfg_path, cfg.vae_ckpt_path, device=trainer.device)
        decoder.requires_grad_(False)
        # The training configuration's tensorrt_* fields hold here; a call's own use_tensorrt would outrank them.
        decode = make_batched_decode_fn(
            decoder, cfg.vae_batch_size, use_tensorrt=cfg.use_tensorrt, config=cfg, jit=True
        )
        if trainer.world_size > 1 and cfg.use_tensorrt:
            with rank_zero_first(trainer.local_rank):
                decode(latents[:1, :1].bfloat16())
        decode_audio = None
        if cfg.audio_vae_ckpt_path is not None:
            audio = get_decoder_only(
                cfg.audio_vae_id, cfg.audio_vae_cfg_path, cfg.audio_vae_ckpt_path, device=trainer.device
            )
            decode_audio = make_batched_audio_decode_fn(audio.requires_grad_(False), cfg.vae_batch_size)
        return decode, decode_audio


def core_of(model: nn.Module) -> nn.Module:
    """The network that samplers take: `.core` of a wrapper, or the model itself."""
    return model.core if hasattr(model, "core") else model  # type: ignore[return-value]
