"""Training on the model's own frames as history, with the game's true frames as targets.

Why: a model that has only ever seen true frames keeps most of the error that it finds in its history. The game gives
the true frame for any controls, so the model can continue an episode by itself and be taught the true frame behind its
own frames.

A clip that moves shows places that nobody has seen before, so that its true frame is soon no longer determined and a
target that is not becomes a blur. Most of those clips therefore stay near the truth: each of their frames begins as the
true one under noise instead of as noise alone, and is made behind the model's own history like any other. They hold
the model's errors, at any length, and a target that is known. A clip at rest is the model's alone: its true frame is
known for ever.

The history of some windows drifts besides (`drift.py`).

A model with `sink_frames` plays behind the last so many frames of its context, which it never forgets, so windows begin
with such frames: in windows with own frames the last real ones; in true windows earlier frames of the same episode, or
the last ones of a history. What lies between them and the window may be nothing or the whole episode.

Source: own frames made from true ones under noise are "Resampling Forcing" (Guo et al. 2025, arXiv 2512.15702).

Usage:
    loader = OwnHistoryLoader(data, space, window=24, batch_size=64)
    loader.renew(playing(ema.model.core, device), clips=256, keep=4, frames=72, step=0, steps=2, noise=(0.05, 0.3))
    trainer = OwnHistoryTrainer(cfg.train, None, cfg.model, loader=loader, sample_loader=loader)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
from drift import Drift
from episodes import Episodes
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.models.latents import LatentSpace
from owl_wms.nn.limits import within_limits
from owl_wms.nn.ring_cache import RingCache
from owl_wms.nn.setting import setting
from owl_wms.sampling.captured import Captured, may_capture
from owl_wms.sampling.schedule import get_sd3_euler, take_step
from owl_wms.trainers.objectives.rft import RFTTrainer

DRAWN = -1  # in `history`: the trainer draws the length
NEAR_SHARE = 0.85  # of the clips that move: made near the truth
RECENT_SINKS = 0.25  # of the true windows of a model with sinks: they are the last frames of the history
NEAR = (0.6, 0.97)  # levels at which their frames begin
DRIFTING = 0.4  # share of windows whose history drifts, where there is a drift


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
        steps: per frame.
        order: of the steps, as in play.
        window: frames that attention may span, the new one included.
        noise: [b] level at which history is stored, but for sinks of a model with a `sink_noise`.
        start: [b] level at which frames begin; 1 is play, below it the frame given to `make` shows through the noise.
    """

    def __init__(
        self, core: nn.Module, *, steps: int, window: int, noise: Tensor, start: Tensor, order: int = 1
    ) -> None:
        self._noise, self._start = noise[:, None], start[:, None]
        self._ring = RingCache(core.config, max_window=window, round_to=window)
        allowed, deltas = may_capture(core), get_sd3_euler(steps).tolist()
        # Not methods of this object: in a circle with it, graphs of gigabytes would wait for Python's collector.
        self._made = Captured(partial(_denoise, core, self._ring, self._start, deltas, order), allowed=allowed)
        self._kept = Captured(partial(_store, core, self._ring), allowed=allowed)
        self._at_sinks = setting(core.config, "sink_noise", None)
        self._stored = 0

    def make(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next frame [b, 1, c, h, w], made from the true one `x` as far as `start` lets it be seen."""
        made: Tensor = self._made(self._ring.shape, _noised(x, self._start, generator), mouse, btn)[0]
        return made

    def keep(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> None:
        """Store a frame with its controls."""
        clean = self._at_sinks is not None and self._stored < self._ring.sinks
        level = torch.full_like(self._noise, self._at_sinks) if clean else self._noise
        self._kept(self._ring.shape, _noised(x, level, generator), level, mouse, btn)
        self._ring.advance()
        self._stored += 1


def _denoise(
    core: nn.Module,
    ring: RingCache,
    start: Tensor,
    deltas: list[float],
    order: int,
    x: Tensor,
    mouse: Tensor,
    btn: Tensor,
) -> tuple[Tensor, ...]:
    level, size = start, start[..., None, None, None].to(x.dtype)
    velocities: list[Tensor] = []
    for done, delta in enumerate(deltas, 1):
        velocities.append(size * core(x, level, mouse, btn, kv_cache=ring))
        x = take_step(x, velocities, deltas[:done], order)
        level = level - delta * start
    return (within_limits(core, x),)


def _store(
    core: nn.Module, ring: RingCache, x: Tensor, level: Tensor, mouse: Tensor, btn: Tensor
) -> tuple[Tensor, ...]:
    return (core(x, level, mouse, btn, kv_cache=ring),)


def _noised(x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    return x.lerp(noise, level[..., None, None, None].to(x.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clips:
    """Continued episodes, with the truth of their own: the episodes that they are from may be overwritten.

    Attributes:
        latents, mouse, buttons: what happened, [k, real + own, ...].
        made: [k, own, c, h, w], own frames as stored.
        known: bool [k], whether the true frame is known at any length.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor
    made: Tensor
    known: Tensor

    @staticmethod
    def join(parts: list[_Clips]) -> _Clips:
        names = [field.name for field in fields(_Clips)]
        return _Clips(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class OwnHistoryLoader:
    """Half true windows, half windows whose beginning is the model's own, or true windows alone until there are such;
    endless.

    A batch is latents, mouse, buttons and `history` int64 [b]: the frames of a window that are history because they are
    the model's own or stand before those, or `DRAWN` where the trainer may draw how many.

    Args:
        data: episodes, which may change between batches.
        space: of the model's latents.
        window: frames of a window, the sinks included.
        batch_size: windows of a batch.
        seed: of all draws.
        sinks: frames at the beginning of each window that play would never forget; `sink_frames` of the model.
        drift: of histories, or None for none.
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
        sinks: int = 0,
        drift: Drift | None = None,
    ) -> None:
        self._data, self._space, self._window, self._sinks, self._drift = data, space, window, sinks, drift
        self._recent = window - sinks
        self._batch_size, self._seed, self._seen = batch_size, seed, 0
        self._rounds: list[_Clips] = []
        self._clips: _Clips | None = None
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
        order: int = 1,
    ) -> None:
        """Let the model continue `clips` episodes from true frames on, under the episodes' own controls.

        Args:
            core: the averaged model, in the precision of play.
            clips: continued at once.
            keep: calls of this function whose clips stay in the buffer.
            frames: own frames of each.
            step: of the trainer; fixes what is drawn.
            steps: per frame, as in play.
            noise: lowest and highest level at which a clip's history is remembered.
            order: of the steps, as in play.
        """
        data, device, real = self._data, self._data.mouse.device, self._recent
        generator = torch.Generator(device=device).manual_seed(self._seed * 1_000_003 + step)
        length = data.mouse.shape[1]
        frames = min(frames, length - real)
        episode = torch.randint(len(data), (clips, 1), generator=generator, device=device)
        start = torch.randint(length - real - frames + 1, (clips, 1), generator=generator, device=device)
        at = episode, start + torch.arange(real + frames, device=device)
        latents, mouse, btn = data.latents[at], data.mouse[at], data.buttons[at]

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(clips, generator=generator, device=device)

        # A clip is at rest when its controls are zero from the last real frame on; its true frame stays known.
        moves = (mouse[:, real:].any(dim=-1) | btn[:, real:].any(dim=-1)).any(dim=1)
        near = moves & (uniform(0, 1) < NEAR_SHARE)
        # A model in bfloat16, not autocast: only then are its passes captured as CUDA graphs.
        dtype = next(core.parameters()).dtype
        maker = OwnFrames(
            core,
            steps=steps,
            order=order,
            window=self._window,
            noise=uniform(*noise),
            start=torch.where(near, uniform(*NEAR), 1.0),
        )
        own = []
        for k in [*range(real - self._sinks, real), *range(real + frames)]:  # the sinks first, as in play
            x = self._space.to_model(latents[:, k : k + 1].float()).to(dtype)
            controls = mouse[:, k : k + 1], btn[:, k : k + 1]
            if k >= real:
                x = maker.make(x, *controls, generator)
                own.append(self._space.to_stored(x.float()).half())
            maker.keep(x, *controls, generator)
        made = torch.cat(own, dim=1)
        self._rounds.append(_Clips(latents=latents, mouse=mouse, buttons=btn, made=made, known=near | ~moves))
        self._rounds = self._rounds[-keep:]
        if device.type == "cuda":
            torch.cuda.synchronize()  # the graphs that made them go with this call
        self._clips = _Clips.join(self._rounds)

    @property
    def own(self) -> int:
        """Windows with own frames in a batch, its last ones."""
        return 0 if self._clips is None else self._batch_size // 2

    def __iter__(self) -> Iterator[Batch]:
        while True:
            device = self._data.mouse.device
            generator = torch.Generator(device=device).manual_seed(self._seed * 1_000_003 + self._seen)
            self._seen += 1
            batch = self._true_windows(self._batch_size - self.own, generator)
            if self._clips is not None:
                parts = zip(batch, self._own_windows(self._clips, self.own, generator), strict=True)
                batch = tuple(torch.cat(pair) for pair in parts)
            yield batch if self._drift is None else self._drifted(batch, self._drift, generator)

    def _drifted(self, batch: Batch, drift: Drift, generator: torch.Generator) -> Batch:
        """Let histories drift; where the trainer may draw a length, it is drawn here."""
        latents, mouse, btn, history = batch
        chosen = torch.rand(len(latents), generator=generator, device=latents.device) < DRIFTING
        drawn = _whole(
            torch.full_like(history, self._sinks + 1), self._window - 1, generator=generator, device=latents.device
        )
        history = torch.where(chosen & (history == DRAWN), drawn, history)
        return drift(latents, self._sinks, history, chosen, generator), mouse, btn, history

    def _true_windows(self, count: int, generator: torch.Generator) -> Batch:
        data, sinks, recent = self._data, self._sinks, self._recent
        device = data.mouse.device
        draw = partial(_whole, generator=generator, device=device)
        none = torch.zeros(count, dtype=torch.long, device=device)
        episode = draw(none, len(data) - 1)
        start = draw(none + sinks, data.mouse.shape[1] - recent)
        at = start[:, None] + torch.arange(recent, device=device)
        history = torch.full_like(none, DRAWN)
        if sinks:
            told = torch.rand(count, generator=generator, device=device) < RECENT_SINKS
            length = draw(none + min(sinks, recent - 1), recent - 1)
            first = torch.where(told, (start + length - sinks).clamp(min=0), draw(none, start - sinks))
            history = torch.where(told, sinks + length, history)
            at = torch.cat([first[:, None] + torch.arange(sinks, device=device), at], dim=1)
        place = episode[:, None], at
        return data.latents[place], data.mouse[place], data.buttons[place], history

    def _own_windows(self, clips: _Clips, count: int, generator: torch.Generator) -> Batch:
        window, sinks, real = self._window, self._sinks, self._recent
        device, own = clips.known.device, clips.made.shape[1]
        draw = partial(_whole, generator=generator, device=device)
        none = torch.zeros(count, dtype=torch.long, device=device)
        chosen = draw(none, len(clips.known) - 1)
        limit = torch.where(clips.known[chosen], own, self.horizon.moving).clamp(min=2, max=own)
        end = draw(none + 2, limit)  # own frames up to the window's end
        targets = draw(none + 1, end.clamp(max=real) - 1)  # so that one own frame at least is history
        history = window - targets
        at = end[:, None] + torch.arange(real, device=device)
        index = at - real  # of own frames; below 0 the frame is real
        mine = (index >= 0) & (torch.arange(real, device=device) < (history - sinks)[:, None])
        if sinks:
            last = torch.arange(real - sinks, real, device=device).expand(count, -1)
            at = torch.cat([last, at], dim=1)
            index, mine = (torch.cat([torch.zeros_like(last).to(x.dtype), x], dim=1) for x in (index, mine))
        place = chosen[:, None], at
        # Chosen by `where`: a mask as index would wait for the GPU.
        made = clips.made[chosen[:, None], index.clamp(min=0)]
        latents = torch.where(mine[..., None, None, None], made, clips.latents[place])
        return latents, clips.mouse[place], clips.buttons[place], history

    def state_dict(self) -> dict[str, int]:
        """Batches given so far."""
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after those."""
        self._seen = state["seen"]


def _whole(low: Tensor, high: Tensor | int, *, generator: torch.Generator, device: torch.device) -> Tensor:
    """Whole numbers [b] from `low` [b] to `high`, both included."""
    # fp64: in fp32 a number close to 1 times a large one would round up to it.
    unit = torch.rand(len(low), generator=generator, device=device, dtype=torch.float64)
    return low + (unit * (high - low + 1)).long()


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
