"""Classifier-free guidance over a model with or without sound, with or without a cache.

In training the control *embedding* of an item is left out for its whole sequence, and so it is here: the batch is
doubled, its first half without controls, and each half has its own history in the cache. Upstream's samplers instead
feed zero controls, which is a different input (buttons at zero are embedded as -1), and both branches see the history
of the conditional one; `unconditional="zero_controls"` reproduces them.

Usage:
    guidance = Guidance(model=model.core, scale=1.3)
    (v,) = guidance.velocity((x,), t, mouse, buttons)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.nn.ring_cache import Cache

Unconditional = Literal["dropped", "zero_controls"]
Parts = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """v = u + scale (c - u), where c sees the controls and u does not.

    Attributes:
        model: a core: GameRFTCore for parts (video,), GameRFTAudioCore for parts (video, audio).
        scale: 1 runs the conditional branch alone, 0 or less the unconditional one alone.
        unconditional: what "without controls" means.
        max_level: highest noise level that the model is told; samples still begin as pure noise. A model knows only
            the levels of its training. For weights trained with upstream's levels (one in 70,000 is above 0.985), say
            0.985: at exactly 1 such weights of the game erred by 4.7, at 0.98 by 0.2 (mean squared, in latents).
    """

    model: Any
    scale: float = 1.0
    unconditional: Unconditional = "dropped"
    max_level: float = 1.0

    def __post_init__(self) -> None:
        if self.unconditional not in ("dropped", "zero_controls"):
            raise ConfigError(
                f"unconditional must be 'dropped' or 'zero_controls', got {self.unconditional!r}", key="unconditional"
            )
        if not math.isfinite(self.scale):
            raise ConfigError(f"cfg_scale must be finite, got {self.scale}", key="cfg_scale")
        if not 0 < self.max_level <= 1:
            raise ConfigError(f"max_level must be above 0 and at most 1, got {self.max_level}", key="max_level")

    def velocity(self, parts: Parts, t: Tensor, mouse: Tensor, btn: Tensor, cache: Cache | None = None) -> Parts:
        """Guided velocity of each part.

        Args:
            parts: (video [b, n, c, h, w],) or (video, audio [b, n, c_a]).
            t: [b, n] noise levels.
            mouse, btn: [b, n, 2], [b, n, n_buttons].
            cache: history, filled through this same object; kept up to date when its updates are on.

        Returns:
            The shapes of parts.
        """
        if self.unconditional == "dropped" and self.scale > 0 and self.scale != 1:
            b = t.shape[0]
            shown = torch.arange(2 * b, device=t.device) >= b
            both = self._run(
                tuple(p.repeat(2, *[1] * (p.ndim - 1)) for p in parts),
                t.repeat(2, 1),
                mouse.repeat(2, 1, 1),
                btn.repeat(2, 1, 1),
                shown,
                cache,
            )
            return tuple(self._mix(p[:b], p[b:]) for p in both)
        if self.scale == 1:
            return self._run(parts, t, mouse, btn, None, cache)
        if self.unconditional == "dropped":
            return self._run(parts, t, mouse, btn, torch.zeros(t.shape[0], dtype=torch.bool, device=t.device), cache)
        return self._zero_controls(parts, t, mouse, btn, cache)

    def _zero_controls(self, parts: Parts, t: Tensor, mouse: Tensor, btn: Tensor, cache: Cache | None) -> Parts:
        # Both branches look at the one history that the conditional branch keeps, so it runs last.
        updates = cache is not None and cache.should_update
        if cache is not None:
            cache.disable_cache_updates()
        without = self._run(parts, t, torch.zeros_like(mouse), torch.zeros_like(btn), None, cache)
        if cache is not None and updates:
            cache.enable_cache_updates()
        if self.scale <= 0 and not updates:
            return without
        shown = self._run(parts, t, mouse, btn, None, cache)
        return without if self.scale <= 0 else tuple(self._mix(u, c) for u, c in zip(without, shown, strict=True))

    def _mix(self, without: Tensor, shown: Tensor) -> Tensor:
        return without + self.scale * (shown - without)

    def _run(
        self, parts: Parts, t: Tensor, mouse: Tensor, btn: Tensor, shown: Tensor | None, cache: Cache | None
    ) -> Parts:
        told = t if self.max_level == 1 else t.clamp(max=self.max_level)
        out = self.model(*parts, told, mouse, btn, has_controls=shown, kv_cache=cache)
        return out if isinstance(out, tuple) else (out,)
