"""Training on the model's own frames as history, with the game's true frames as targets.

Why: a model that has only ever seen true frames keeps most of the error that it finds in its history. The game gives
the true frame for any controls, so the model can continue an episode by itself and be taught the true frame behind its
own frames.

A clip that moves shows places that nobody has seen before, so that its true frame is soon no longer determined and a
target that is not becomes a blur. Half of those clips therefore stay near the truth: each of their frames begins as the
true one under noise instead of as noise alone, and is made behind the model's own history like any other. They hold
the model's errors, at any length, and a target that is known.

Source: own frames made from true ones under noise are "Resampling Forcing" (Guo et al. 2025, arXiv 2512.15702).

Usage:
    loader = OwnHistoryLoader(data, space, window=24, batch_size=64)
    loader.renew(playing(ema.model.core, device), clips=256, keep=4, frames=72, step=0, steps=2, noise=(0.05, 0.3))
    trainer = OwnHistoryTrainer(cfg.train, None, cfg.model, loader=loader, sample_loader=loader)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from episodes import Episodes, MemoryLoader
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.models.latents import LatentSpace
from owl_wms.nn.ring_cache import RingCache
from owl_wms.sampling.captured import Captured, may_capture
from owl_wms.sampling.schedule import get_sd3_euler
from owl_wms.trainers.objectives.rft import RFTTrainer

DRAWN = -1  # in `history`: the trainer draws the length
NEAR_SHARE = 0.5  # of the clips that move: made near the truth
NEAR = (0.6, 0.97)  # levels at which their frames begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Horizon:
    """How many frames behind the last real one a window may end, where the true frame becomes unknown: in clips that
    move and are the model's alone. Others may end anywhere.

    Attributes:
        moving: frames.
    """

    moving: int = 8


def playing(core: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a core in the precision of play: bfloat16 on a GPU."""
    return copy.deepcopy(core).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


class OwnFrames:
    """Makes frames one by one behind its own, as play does, each clip at levels of its own.

    Args:
        core: in the precision of play, eval mode.
        steps: Euler steps a frame.
        window: frames that attention may span, the new one included.
        noise: [b] level at which history is stored.
        start: [b] level at which frames begin; 1 is play, below it the frame given to `make` shows through the noise.
    """

    def __init__(self, core: nn.Module, *, steps: int, window: int, noise: Tensor, start: Tensor) -> None:
        self._noise, self._start = noise[:, None], start[:, None]
        self._ring = RingCache(core.config, max_window=window, round_to=window)
        allowed, deltas = may_capture(core), get_sd3_euler(steps).tolist()
        # Not methods of this object: in a circle with it, graphs of gigabytes would wait for Python's collector.
        self._made = Captured(partial(_denoise, core, self._ring, self._start, deltas), allowed=allowed)
        self._kept = Captured(partial(_store, core, self._ring, self._noise), allowed=allowed)

    def make(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next frame [b, 1, c, h, w], made from the true one `x` as far as `start` lets it be seen."""
        made: Tensor = self._made(self._ring.shape, _noised(x, self._start, generator), mouse, btn)[0]
        return made

    def keep(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> None:
        """Store a frame with its controls."""
        self._kept(self._ring.shape, _noised(x, self._noise, generator), mouse, btn)
        self._ring.advance()


def _denoise(
    core: nn.Module, ring: RingCache, start: Tensor, deltas: list[float], x: Tensor, mouse: Tensor, btn: Tensor
) -> tuple[Tensor, ...]:
    level, size = start, start[..., None, None, None].to(x.dtype)
    for delta in deltas:
        x = x - delta * size * core(x, level, mouse, btn, kv_cache=ring)
        level = level - delta * start
    return (x,)


def _store(
    core: nn.Module, ring: RingCache, noise: Tensor, x: Tensor, mouse: Tensor, btn: Tensor
) -> tuple[Tensor, ...]:
    return (core(x, noise, mouse, btn, kv_cache=ring),)


def _noised(x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    return x.lerp(noise, level[..., None, None, None].to(x.dtype))


class OwnHistoryLoader:
    """Half true windows, half windows whose beginning is the model's own; endless.

    A batch is latents, mouse, buttons and `history` int64 [b]: the frames of a window that are history because they are
    the model's own or stand before those, or `DRAWN` for true windows.
    """

    epoch = 0

    def __init__(
        self,
        data: Episodes,
        space: LatentSpace,
        *,
        window: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        """Remember where frames come from."""
        self._data, self._space, self._window = data, space, window
        self._own = batch_size // 2
        self._true = MemoryLoader(data, window, batch_size - self._own, seed)
        self._seed = seed
        self._rounds: list[tuple[Tensor, Tensor]] = []
        self._places = torch.empty(0, 3, dtype=torch.long)  # [k, 3], episode, first frame, whether the truth is known
        self._frames = torch.empty(0)  # [k, frames, c, h, w] as stored, own frames behind the first window
        self.horizon = Horizon()

    @torch.no_grad()
    def renew(
        self,
        core: nn.Module,
        *,
        clips: int,
        keep: int,
        frames: int,
        step: int,
        steps: int,
        noise: tuple[float, float],
    ) -> None:
        """Let the model continue `clips` episodes from a window of true frames on, under the episodes' own controls.

        Args:
            core: the averaged model, in the precision of play.
            clips: continued at once.
            keep: calls of this function whose clips stay in the buffer.
            frames: own frames of each.
            step: of the trainer; fixes what is drawn.
            steps: Euler steps a frame, as in play.
            noise: lowest and highest level at which a clip's history is remembered.
        """
        data, device = self._data, self._data.mouse.device
        generator = torch.Generator(device=device).manual_seed(self._seed * 1_000_003 + step)
        episodes, length = data.mouse.shape[:2]
        frames = min(frames, length - self._window)
        episode = torch.randint(episodes, (clips, 1), generator=generator, device=device)
        start = torch.randint(length - self._window - frames + 1, (clips, 1), generator=generator, device=device)
        at = episode, start + torch.arange(self._window + frames, device=device)
        mouse, btn = data.mouse[at], data.buttons[at]

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(clips, generator=generator, device=device)

        # A clip is at rest when its controls are zero from the last real frame on; its true frame stays known.
        moves = (mouse[:, self._window :].any(dim=-1) | btn[:, self._window :].any(dim=-1)).any(dim=1)
        near = moves & (uniform(0, 1) < NEAR_SHARE)
        # A model in bfloat16, not autocast: only then are its passes captured as CUDA graphs.
        dtype = next(core.parameters()).dtype
        maker = OwnFrames(
            core,
            steps=steps,
            window=self._window,
            noise=uniform(*noise),
            start=torch.where(near, uniform(*NEAR), 1.0),
        )
        own = []
        for k in range(self._window + frames):
            x = self._space.to_model(data.latents[episode, start + k].float()).to(dtype)
            controls = mouse[:, k : k + 1], btn[:, k : k + 1]
            if k >= self._window:
                x = maker.make(x, *controls, generator)
                own.append(self._space.to_stored(x.float()).half())
            maker.keep(x, *controls, generator)
        made = torch.cat([episode, start, (near | ~moves).long()[:, None]], dim=1), torch.cat(own, dim=1)
        self._rounds = [*self._rounds, made][-keep:]
        if device.type == "cuda":
            torch.cuda.synchronize()  # the graphs that made them go with this call
        self._places, self._frames = (torch.cat(parts) for parts in zip(*self._rounds, strict=True))

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._true:
            drawn = torch.full((len(batch[0]),), DRAWN, dtype=torch.int64, device=batch[0].device)
            parts = zip((*batch, drawn), self._own_windows(), strict=True) if self._rounds else None
            yield (*batch, drawn) if parts is None else tuple(torch.cat(pair) for pair in parts)

    def _own_windows(self) -> Batch:
        data, window = self._data, self._window
        device = data.mouse.device
        seed = self._seed * 1_000_003 + 500_009 + self._true.state_dict()["seen"]
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(low: Tensor | int, high: Tensor | int) -> Tensor:
            """Whole numbers [b] from low to high, both included."""
            unit = torch.rand(self._own, generator=generator, device=device)
            return low + (unit * (high - low + 1)).long()

        chosen = draw(0, len(self._places) - 1)
        episode, start, known = self._places[chosen].unbind(dim=1)
        count = self._frames.shape[1]
        limit = torch.where(known > 0, count, self.horizon.moving).clamp(min=2, max=count)
        end = draw(2, limit)  # own frames up to the window's end
        targets = draw(1, end.clamp(max=window) - 1)  # so that one own frame at least is history
        history = window - targets
        at = (start + end)[:, None] + torch.arange(window, device=device)
        index = at - (start + window)[:, None]  # of own frames; below 0 the frame is real
        mine = (index >= 0) & (torch.arange(window, device=device) < history[:, None])
        made = self._frames[
            chosen[:, None], index.clamp(min=0)
        ]  # chosen by `where`: a mask as index would wait for the GPU
        latents = torch.where(mine[..., None, None, None], made, data.latents[episode[:, None], at])
        return latents, data.mouse[episode[:, None], at], data.buttons[episode[:, None], at], history

    def state_dict(self) -> dict[str, int]:
        """Batches given so far."""
        return self._true.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after those."""
        self._true.load_state_dict(state)


class OwnHistoryTrainer(RFTTrainer):
    """`rft` whose batches say which frames are history; batches (latents, mouse, buttons, history)."""

    batch_parts = ("latents", "mouse", "buttons", "history")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reports `diffusion_loss` over the frames behind a history, `latent_error`, and `own_error` of own windows."""
        video, mouse, btn, history = batch
        x = self.to_latents(video)
        found = self.model(x, mouse, btn, return_dict=True, levels=self.train_cfg.levels, history=history)
        loss = found["diffusion_loss"]
        reports = {"diffusion_loss": loss, "latent_error": self.space.error(x, found)}
        own = found["counted"] & (history >= 0)[:, None]
        share = self.space.error(x, {**found, "counted": own | (~own.any() & found["counted"])})
        return loss, {**reports, "own_error": share}
