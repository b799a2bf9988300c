"""Makes one frame after another with a ring of history: the loop of play, and of the sampler `av_caching`.

A frame is denoised against the ring and returned. `remember` then noises it to `noise_prev` and passes it once more,
which stores it. Both are functions of fixed shapes with all changing values as tensors, so on a GPU each is captured as
one CUDA graph; on a CPU the same functions run as they are.

A model that never forgets the first frames it was shown (`sink_frames`) is shown the last so many frames of the context
first, and then the whole context: the newest frames that are true are the best to compare with for ever. They are
stored at the model's `sink_noise`, if it has one.

Usage:
    loop = FrameLoop(guidance, deltas=get_sd3_euler(4), noise_prev=0.2, max_window=24)
    loop.begin(context.latents, context.mouse, context.buttons, generator)
    latent = loop.denoise(mouse, buttons, generator)        # [b, 1, c, h, w]
    loop.remember(latent, mouse, buttons, generator)
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from owl_wms.nn.limits import within_limits
from owl_wms.nn.ring_cache import RingCache
from owl_wms.nn.setting import setting
from owl_wms.sampling.captured import Captured, may_capture
from owl_wms.sampling.guidance import Guidance
from owl_wms.sampling.schedule import check_order, take_step, zlerp

# While a captured ring fills, each length needs a graph of its own: lengths are rounded up to this many frames.
ROUND_TO = 64


class FrameLoop:
    """One history, continued frame by frame.

    Args:
        guidance: the model and how its controls are weighed.
        deltas: [steps] step sizes adding up to 1.
        noise_prev: noise level at which history is stored, 0 to 1.
        max_window: frames that attention may span, the new one included.
        order: of the steps, 1 or 2; see `owl_wms.sampling.schedule.take_step`.
        capture: False never uses CUDA graphs.
        fixed: None rounds lengths only if frames are captured; True always does, as compiled models want it.
        prefill: stores the context, if not `guidance`: the same model uncompiled spares shapes that are met once.

    Attributes:
        captures: whether passes become CUDA graphs.
        deltas: as given; others may be set, and hold from the next frame on.

    Raises:
        ConfigError: max_window or order out of range.
    """

    def __init__(
        self,
        guidance: Guidance,
        *,
        deltas: Tensor,
        noise_prev: float,
        max_window: int,
        order: int = 1,
        capture: bool = True,
        fixed: bool | None = None,
        prefill: Guidance | None = None,
    ) -> None:
        self.deltas, self.noise_prev, self._order = deltas, noise_prev, check_order(order)
        self.captures = capture and may_capture(guidance.model)
        rounded = self.captures if fixed is None else fixed
        self.ring = RingCache(guidance.model.config, max_window=max_window, round_to=ROUND_TO if rounded else 1)
        self._guidance = guidance
        self._denoise = Captured(self._denoise_frame, allowed=self.captures)
        self._store = self._prefill = Captured(partial(self._store_frame, guidance), allowed=self.captures)
        if prefill is not None:
            self._prefill = Captured(partial(self._store_frame, prefill), allowed=self.captures)
        self._like: Tensor | None = None

    @property
    def replayed(self) -> int:
        """Returns how many passes so far were replayed from CUDA graphs."""
        return self._denoise.replayed + self._store.replayed

    def begin(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator | None = None) -> None:
        """Forgets everything and stores a context.

        Args:
            x: [b, n, c, h, w] in the model's scale.
            mouse, btn: [b, m, 2], [b, m, n_buttons] with m >= n; those of the n frames come first.
            generator: source of noise, on the latents' device.
        """
        self.ring.reset()
        self._like = x.new_empty(x.shape[0], 1, *x.shape[2:])
        if self.ring.sinks:
            order = [*range(x.shape[1])[-self.ring.sinks :], *range(x.shape[1])]
            x, mouse, btn = x[:, order], mouse[:, order], btn[:, order]
        sinks, at_sinks = self.ring.sinks, setting(self._guidance.model.config, "sink_noise", self.noise_prev)
        noisy = zlerp(x, self.noise_prev, generator)
        if at_sinks != self.noise_prev:
            noisy[:, :sinks] = zlerp(x[:, :sinks], at_sinks, generator)
        for frame in range(x.shape[1]):
            span = slice(frame, frame + 1)
            level = at_sinks if frame < sinks else self.noise_prev
            self._keep(self._prefill, noisy[:, span], level, mouse[:, span], btn[:, span])

    def denoise(self, mouse: Tensor, btn: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the next frame, [b, 1, c, h, w]; what is stored stays as it is.

        Args:
            mouse, btn: [b, 1, 2], [b, 1, n_buttons].
        """
        assert self._like is not None, "begin comes first"
        like = self._like
        noise = torch.randn(like.shape, device=like.device, dtype=like.dtype, generator=generator)
        # Captured constants: step sizes are part of what a graph does.
        key = (self.ring.shape, tuple(self.deltas.tolist()))
        return self._denoise(key, noise, mouse, btn)[0]

    def remember(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator | None = None) -> None:
        """Stores a finished frame [b, 1, c, h, w] with its controls."""
        self._keep(self._store, zlerp(x, self.noise_prev, generator), self.noise_prev, mouse, btn)

    def _keep(self, store: Captured, noisy: Tensor, level: float, mouse: Tensor, btn: Tensor) -> None:
        t = torch.full(noisy.shape[:2], level, dtype=torch.float32, device=noisy.device)
        store(self.ring.shape, noisy, t, mouse, btn)
        self.ring.advance()

    def _denoise_frame(self, frame: Tensor, mouse: Tensor, btn: Tensor) -> tuple[Tensor, ...]:
        self.ring.disable_cache_updates()
        t = torch.ones(frame.shape[:2], dtype=torch.float32, device=frame.device)
        sizes = self.deltas.tolist()
        velocities: list[Tensor] = []
        for done, size in enumerate(sizes, 1):
            velocities += self._guidance.velocity((frame,), t, mouse, btn, self.ring)
            frame = take_step(frame, velocities, sizes[:done], self._order)
            t = t - size
        return (within_limits(self._guidance.model, frame),)

    def _store_frame(
        self, guidance: Guidance, noisy: Tensor, t: Tensor, mouse: Tensor, btn: Tensor
    ) -> tuple[Tensor, ...]:
        self.ring.enable_cache_updates()
        return guidance.velocity((noisy,), t, mouse, btn, self.ring)
