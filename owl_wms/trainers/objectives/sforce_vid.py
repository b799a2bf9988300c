"""`sforce_vid`: self forcing. The student continues clips from its own frames, and only the last step of each frame
is learnt from.

Usage:
    SelfForceTrainer(cfg.train, cfg.wandb, cfg.model).train()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.errors import ConfigError
from owl_wms.nn.kv_cache import KVCache
from owl_wms.sampling import batch_permute_to_length
from owl_wms.trainers.objectives.dmd import DMDTrainer, Rollout, expand


class SelfForceTrainer(DMDTrainer):
    """Batches (latents, mouse, buttons) as first context; reports `critic_loss`, `dmd_loss`, `g_norm`."""

    trainer_id = "sforce_vid"

    def build_model(self) -> nn.Module:
        if not self.model_cfg.causal:
            raise ConfigError("sforce_vid rolls out with a cache; set model.causal to true", key="model.causal")
        return super().build_model()

    def rollout(self, batch: Batch) -> Rollout:
        """The last window of the context and what follows it.

        All ranks draw the same numbers of frames and steps, or the fastest would wait for the slowest at every update.
        """
        cfg = self.train_cfg
        assert cfg.min_rollout_frames is not None
        assert cfg.rollout_steps is not None
        video, mouse, btn = batch[:3]
        x = self.to_latents(video)
        window = x.shape[1]
        shared = torch.Generator().manual_seed(cfg.seed * 1_000_003 + self.step)
        most = max(window, cfg.min_rollout_frames)
        frames = int(torch.randint(cfg.min_rollout_frames, most + 1, (), generator=shared, device="cpu"))
        steps = torch.randint(1, cfg.rollout_steps + 1, (frames,), generator=shared, device="cpu").tolist()
        mouse, btn = batch_permute_to_length(mouse, btn, window + frames)
        cache = KVCache(self.model_cfg, max_window=min(window, self.model_cfg.n_frames))
        self._remember(x, mouse[:, :window], btn[:, :window], cache)
        made = []
        for index, count in enumerate(steps):
            now = slice(window + index, window + index + 1)
            frame = self._next_frame(x[:, :1], mouse[:, now], btn[:, now], cache, count)
            self._remember(frame.detach(), mouse[:, now], btn[:, now], cache)
            made.append(frame)
        whole = torch.cat([x, *made], dim=1)[:, -window:]
        generated = torch.arange(window, device=x.device) >= window - frames
        return Rollout(x=whole, generated=generated.expand(len(x), -1), mouse=mouse[:, -window:], btn=btn[:, -window:])

    def _next_frame(self, like: Tensor, mouse: Tensor, btn: Tensor, cache: KVCache, steps: int) -> Tensor:
        """One frame [b, 1, c, h, w]: `steps` - 1 Euler steps without gradient, then a jump to the clean frame with it.

        Steps are 1 / rollout_steps long, so the jump starts from a different noise level each time.
        """
        assert self.train_cfg.rollout_steps is not None
        delta = 1 / self.train_cfg.rollout_steps
        cache.disable_cache_updates()
        x, t = torch.randn_like(like), torch.ones(like.shape[:2], dtype=torch.float32, device=like.device)
        with torch.no_grad():
            for _ in range(steps - 1):
                x = x - delta * self.model(x, t, mouse, btn, kv_cache=cache).float()
                t = t - delta
        return x - expand(t) * self.model(x, t, mouse, btn, kv_cache=cache).float()

    @torch.no_grad()
    def _remember(self, x: Tensor, mouse: Tensor, btn: Tensor, cache: KVCache) -> None:
        """Put clean frames (t = 0) into the cache, which forgets the oldest when it is full."""
        cache.enable_cache_updates()
        for start in range(0, x.shape[1], cache.largest_pass):
            part = slice(start, start + cache.largest_pass)
            piece = x[:, part]
            clean = torch.zeros(piece.shape[:2], dtype=torch.float32, device=x.device)
            self.model(piece, clean, mouse[:, part], btn[:, part], kv_cache=cache)
