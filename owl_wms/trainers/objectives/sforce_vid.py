"""`sforce_vid`: self forcing. The student continues clips from its own frames, and only the last step of each frame
is learnt from.

Usage:
    SelfForceTrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.errors import ConfigError
from owl_wms.nn.kv_cache import KVCache
from owl_wms.sampling import batch_permute_to_length
from owl_wms.trainers.objectives.dmd import DMDTrainer, Rollout, context_noise


class SelfForceTrainer(DMDTrainer):
    """Batches (latents, mouse, buttons) as first context; reports `critic_loss`, `dmd_loss`, `g_norm`."""

    trainer_id = "sforce_vid"

    def build_model(self) -> nn.Module:
        if not self.model_cfg.causal:
            raise ConfigError("sforce_vid rolls out with a cache; set model.causal to true", key="model.causal")
        return super().build_model()

    def rollout(self, batch: Batch) -> Rollout:
        """Return the last window of the context and the frames after it.

        All ranks draw the same numbers of frames and steps, or the fastest would wait for the slowest at every update.
        Frames that leave the window again before the rollout ends are made without gradient: nothing is learnt from
        them but what later frames remember.
        """
        cfg = self.train_cfg
        assert cfg.min_rollout_frames is not None
        video, mouse, btn = batch[:3]
        x = self.to_latents(video)
        window, levels = x.shape[1], self._levels()
        shared = torch.Generator().manual_seed(cfg.seed * 1_000_003 + self.step)
        most = max(cfg.max_rollout_frames or window, cfg.min_rollout_frames)
        frames = int(torch.randint(cfg.min_rollout_frames, most + 1, (), generator=shared, device="cpu"))
        steps = torch.randint(1, len(levels) + 1, (frames,), generator=shared, device="cpu").tolist()
        mouse, btn = batch_permute_to_length(mouse, btn, window + frames)
        cache = KVCache(self.model_cfg, max_window=min(window, self.model_cfg.n_frames))
        self._remember(x, mouse[:, :window], btn[:, :window], cache)
        made = []
        for index, count in enumerate(steps):
            now = slice(window + index, window + index + 1)
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= frames - window):
                frame = self._next_frame(x[:, :1], mouse[:, now], btn[:, now], cache, levels[:count])
            self._remember(frame.detach(), mouse[:, now], btn[:, now], cache)
            made.append(frame)
        whole = torch.cat([x, *made], dim=1)[:, -window:]
        generated = torch.arange(window, device=x.device) >= window - frames
        return Rollout(x=whole, generated=generated.expand(len(x), -1), mouse=mouse[:, -window:], btn=btn[:, -window:])

    def _levels(self) -> tuple[float, ...]:
        """Return the noise levels of the student's steps, falling from 1."""
        cfg = self.train_cfg
        assert cfg.rollout_steps is not None
        return cfg.student_levels or tuple(1 - step / cfg.rollout_steps for step in range(cfg.rollout_steps))

    def _next_frame(
        self, like: Tensor, mouse: Tensor, btn: Tensor, cache: KVCache, levels: tuple[float, ...]
    ) -> Tensor:
        """Return a frame [b, 1, c, h, w]: Euler steps between `levels` without gradient, and a jump from the last of
        them to the clean frame with it.

        Steps are cut short at a random one, so the jump starts from a different noise level each time.
        """
        cache.disable_cache_updates()
        x = torch.randn_like(like)

        def velocity(level: float) -> Tensor:
            t = torch.full(like.shape[:2], level, dtype=torch.float32, device=like.device)
            v: Tensor = self.model(x, t, mouse, btn, kv_cache=cache)
            return v.float()

        with torch.no_grad():
            for level, following in pairwise(levels):
                x = x - (level - following) * velocity(level)
        return x - levels[-1] * velocity(levels[-1])

    @torch.no_grad()
    def _remember(self, x: Tensor, mouse: Tensor, btn: Tensor, cache: KVCache) -> None:
        """Put frames into the cache, at the noise level of the history in play; a full cache forgets the oldest."""
        cache.enable_cache_updates()
        noise = context_noise(self.train_cfg)
        for start in range(0, x.shape[1], cache.largest_pass):
            part = slice(start, start + cache.largest_pass)
            piece = x[:, part]
            t = torch.full(piece.shape[:2], noise, dtype=torch.float32, device=x.device)
            self.model(piece.lerp(torch.randn_like(piece), noise), t, mouse[:, part], btn[:, part], kv_cache=cache)
