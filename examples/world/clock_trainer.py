"""Training by the clock: levels, rates and own history follow the share of the time that has passed.

The loop is the trainers' own loss, optimiser and average without what a run of hours needs and a run of minutes does
not (checkpoints, undoing a step, a look at every step's values): the GPU is never waited for but every few seconds.

Usage:
    trainer = ClockTrainer(cfg, data, out, print)
    trainer.compile_blocks()                     # on a GPU
    trainer.run(Plan(), time.monotonic() + 900)
    export(trainer.ema.model, out)
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from drift import Drift
from episodes import Episodes
from own_history import Horizon, OwnHistoryLoader, OwnHistoryTrainer, playing
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from owl_wms.configs.world import WorldConfig
from owl_wms.data.loading import Batch
from owl_wms.models.latents import LatentSpace
from owl_wms.nn.mask import FrameMask
from owl_wms.trainers.optim.optimisers import parts_of
from owl_wms.vae.eight_bits import packed

LOOK_EVERY = 100  # steps between looks at the loss, which wait for the GPU
EXPORT_SECONDS = 60.0
COMPILE_SECONDS = 150  # after which another way is tried
ATTEMPTS = 3  # at own frames that may fail before training goes on without new ones
LIMIT_FRAMES = 32_768  # from which limits of frames are taken, or up to twice as many
OWN_NOISE = (0.05, 0.3)  # levels at which own frames remember their history
SLOW = 0.055  # seconds per step from which on the other attention is tried too


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What holds at a share of the training time, from 0 to 1.

    Attributes:
        settle: from here on 80 % instead of 50 % of the clips have a history.
        fall, own: between them the rates fall to `low`; from `own` on half of the windows begin with own frames.
        end_fall: from here on the rates fall to 0.
        horizons: (share, frames) from which on clips that move may end so many frames behind the last real one.
        warm_up: steps in which the rates rise.
        renew_seconds: between renewals of own frames, `clips` of `own_frames` frames each; `rounds` are kept. Longer
            where a renewal takes more than a sixth of it.
    """

    settle: float = 0.4
    fall: float = 0.46
    own: float = 0.58
    low: float = 0.35
    end_fall: float = 0.8
    horizons: tuple[tuple[float, int], ...] = ((0.58, 8), (0.72, 16), (0.86, 24))
    warm_up: int = 300
    renew_seconds: float = 8.0
    clips: int = 256
    own_frames: int = 96
    rounds: int = 6

    def rate(self, share: float, step: int) -> float:
        """Factor of the learning rates."""
        warm = min(1.0, (step + 1) / self.warm_up)
        if share < self.own:
            fallen = max(0.0, (share - self.fall) / (self.own - self.fall))
            return warm * (1 - fallen * (1 - self.low))
        return warm * self.low * min(1.0, max(0.0, (1 - share) / (1 - self.end_fall)))

    def prefix(self, share: float) -> float:
        """Share of clips with a history."""
        return 0.8 if share >= self.settle else 0.5

    def horizon(self, share: float) -> int:
        """Frames behind the last real one at which clips that move end at the latest."""
        return max((frames for begun, frames in self.horizons if begun <= share), default=self.horizons[0][1])


CONTINUED = Plan(
    settle=0.0, fall=0.0, own=0.06, low=0.5, end_fall=0.55, horizons=((0.0, 8),), warm_up=150, own_frames=120
)
"""Of a run that begins with trained weights: their base is there, so own history comes at once, and the rates fall for
longer. The few clips that move and are the model's alone stay short, as further on the true frame is not determined and
teaches a mean."""


class BuiltMasks:
    """The masks of training windows for flex_attention, built once; stands in for `Masks` in compiled blocks."""

    def __init__(self, frames: int, tokens: int, window: int | None, device: torch.device) -> None:
        self.near, self.far = (self._built(frames, tokens, size, device) for size in (window, None))

    @staticmethod
    def _built(frames: int, tokens: int, window: int | None, device: torch.device) -> BlockMask:
        rule = FrameMask(queries=frames, keys=frames, tokens=tokens, window=window, causal=True).token_rule()
        length = frames * tokens
        return create_block_mask(rule, None, None, length, length, device=str(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> Tensor:
        """As `Masks.attend`, in bfloat16 on a GPU, which is what autocast gives the other attention."""
        seen = self.far if mask.window is None else self.near
        dtype = torch.bfloat16 if q.is_cuda else q.dtype
        out: Tensor = flex_attention(q.to(dtype), k.to(dtype), v.to(dtype), block_mask=seen)
        return out


def _through(dit: Any, masks: BuiltMasks, x: Tensor, cond: Tensor, doc_id: Any = None, cache: Any = None) -> Tensor:
    """`DiT.forward` for training windows, with masks that are there already."""
    cond = dit.marked(cond)
    for block in dit.blocks:
        x = block(x, cond, dit.rope, masks, None, None)
    return x


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the main thread if the block takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class ClockTrainer(OwnHistoryTrainer):
    """One model, its optimisers and its average, trained until a moment.

    Args:
        cfg: model, rates, levels, and the sampler that own frames are made with.
        data: episodes to learn from.
        out: folder for the log and the weights.
        say: called with lines for people.
        fresh: called before each step; may write new episodes into `data`.

    Attributes:
        window: frames of a training window, and of the history in play.
        recovered: how often a loss that is not finite sent the run back to its last good weights.
        failed: how often own frames could not be made.
        renewals: seconds that each renewal of own frames took.
    """

    def __init__(
        self,
        cfg: WorldConfig,
        data: Episodes,
        out: Path,
        say: Callable[[str], None],
        fresh: Callable[[], None] | None = None,
    ) -> None:
        self.window = min(24, cfg.model.n_frames // 4)
        self._out, self._say, self._cfg, self._fresh = out, say, cfg, fresh
        space = LatentSpace.of(cfg.train).to(data.mouse.device)
        self._windows = OwnHistoryLoader(
            data,
            space,
            window=self.window,
            batch_size=cfg.train.batch_size,
            sinks=cfg.model.sink_frames,
            drift=Drift.of(space, data.latents[: min(64, len(data))]) if cfg.model.sink_frames else None,
        )
        super().__init__(cfg.train, None, cfg.model, loader=self._windows, sample_loader=self._windows)
        self.resume()  # begins from `train.init_ckpt`, where that is given
        self._data = data
        self._limit()
        self._batches = iter(self._windows)
        self.recovered, self.failed, self._damp = 0, 0, 1.0
        self.renewals: list[float] = []
        self._levels = {p: cfg.train.levels.model_copy(update={"prefix": p}) for p in (0.5, 0.8)}
        self._optimiser = self.phases[0].optimiser
        self._rates = [float(group["lr"]) for group in self._optimiser.param_groups]

    def _limit(self) -> None:
        """Fit the limits of a model that has them to frames of the episodes that there are."""
        if self.model.core.limits is None:
            return
        frames = self._data.latents[: len(self._data)].flatten(0, 1)
        step = max(1, len(frames) // LIMIT_FRAMES)
        self.model.core.limits.fit(self.space.to_model(frames[::step].float()))
        self.ema.model.core.limits.load_state_dict(self.model.core.limits.state_dict())

    def run(self, plan: Plan, until: float) -> None:
        """Train until `time.monotonic()` says `until`; writes log.jsonl, and weights every few minutes."""
        begun = time.monotonic()
        total, exported, renew_at = until - begun, begun, begun + plan.own * (until - begun)
        waiting: list[tuple[int, float, float, Tensor]] = []
        good = self._copied()
        while (now := time.monotonic()) < until or not self.step:
            share = min(1.0, (now - begun) / total)
            if now >= renew_at and self.failed < ATTEMPTS:
                self._renew_or_not(plan, share)
                taken = time.monotonic() - now
                renew_at = now + max(plan.renew_seconds, 6 * taken)
                self.renewals.append(taken)
            rate = self._damp * plan.rate(share, self.step)
            for group, full in zip(self._optimiser.param_groups, self._rates, strict=True):
                group["lr"] = rate * full
            if self._fresh is not None:
                self._fresh()
            values = self._step(next(self._batches), plan.prefix(share))
            waiting.append((self.step, now - begun, rate, values))
            if self.step % LOOK_EVERY == 0:
                good = self._look(waiting, good)
                waiting = []
            if now - exported > EXPORT_SECONDS:
                export(self.ema.model, self._out)
                exported = now
        self._look(waiting, good)
        self._limit()  # more worlds have come

    def _step(self, batch: Batch, prefix: float) -> Tensor:
        """One update of weights and average; nothing is read back from the GPU."""
        video, mouse, btn, history = batch
        x = self.to_latents(video.float())
        with torch.autocast(self.device.type, torch.bfloat16):
            found = self.model(x, mouse, btn, return_dict=True, levels=self._levels[prefix], history=history)
        loss = found["diffusion_loss"]
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        if self.step % LOOK_EVERY:
            return loss.detach()[None]
        mine = torch.arange(len(x), device=x.device)[:, None] >= len(x) - self._windows.own
        own, other = found["counted"] & mine, found["counted"] & ~mine
        errors = [self.space.error(x, {**found, "counted": counted}) for counted in (other, own)]
        return torch.stack([loss.detach(), *errors])

    def _renew_or_not(self, plan: Plan, share: float) -> None:
        try:
            self._renew(plan, share)
        except Exception as error:  # the run goes on with the own frames that it has, or without
            self.failed += 1
            self._say(f"own frames: {type(error).__name__}: {str(error)[:300]}")

    def _renew(self, plan: Plan, share: float) -> None:
        """Let the averaged model continue episodes."""
        self._windows.horizon = Horizon(moving=plan.horizon(share))
        sampler = self.train_cfg.sampler_kwargs or {}
        self._windows.renew(
            playing(self.ema.model.core, self.device),
            clips=plan.clips,
            keep=plan.rounds,
            frames=plan.own_frames,
            step=self.step,
            steps=int(sampler["n_steps"]),
            noise=OWN_NOISE,
            order=int(sampler.get("order", 1)),
        )

    def _look(self, waiting: list[tuple[int, float, float, Tensor]], good: dict[str, Any]) -> dict[str, Any]:
        """Write what was measured; go back to the last good weights, at half the rate, if it is not finite."""
        losses = torch.stack([part[0] for *_, part in waiting]).tolist() if waiting else []
        if not all(math.isfinite(loss) for loss in losses):
            self.recovered += 1
            self._damp *= 0.5
            self._say(f"step {self.step}: the loss is not finite; back to step {good['step']} at half the rate")
            self.model.load_state_dict(good["model"])
            self.ema.model.load_state_dict(good["ema"])
            for part in parts_of(self._optimiser):
                part.state.clear()
            return good
        with (self._out / "log.jsonl").open("a", encoding="utf-8") as log:
            for step, seconds, rate, part in waiting:
                if len(part) > 1:
                    line = {"step": step, "seconds": round(seconds, 2), "rate": round(rate, 4)}
                    line["diffusion_loss"] = round(sum(losses) / len(losses), 5)  # of all steps since the last line
                    errors = zip(("latent_error", "own_error"), part.tolist()[1:], strict=True)  # of this batch
                    line |= {name: round(error, 5) for name, error in errors if math.isfinite(error)}
                    log.write(json.dumps(line) + "\n")
        if self.step % (10 * LOOK_EVERY) == 0:
            self._say(f"step {self.step}: {waiting[-1][1]:.0f} s of training, loss {losses[-1]:.4f}")
        return self._copied()

    def _copied(self) -> dict[str, Any]:
        """Weights and average as they are now."""
        models = {"model": self.model, "ema": self.ema.model}
        return {"step": self.step} | {k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in models.items()}

    # Compilation, on a GPU.

    def compile_blocks(self) -> dict[str, Any]:
        """Compile the blocks with the attention that is quickest here; whatever fails, training runs as it is."""
        dit = self.model.core.transformer
        batch = next(self._batches)
        wanted = self._trial(batch)
        tokens = self._cfg.model.tokens_per_frame
        seconds: dict[str, float] = {"eager": self._timed(batch, 2)}
        for name in ("flex", "dense"):
            begun = time.monotonic()
            try:
                with within(COMPILE_SECONDS):
                    self._install(name, tokens)
                    found = self._trial(batch)
                    taken = self._timed(batch, 10)
            except Exception as error:  # compilers fail in many ways
                self._say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                continue
            close = abs(found[0] / wanted[0] - 1) < 0.02 and abs(found[1] / wanted[1] - 1) < 0.1
            self._say(
                f"{name}: {1000 * taken:.1f} ms per pass there and back, made in {time.monotonic() - begun:.0f} s; "
                f"loss {found[0]:.4f} for {wanted[0]:.4f}, gradient {found[1]:.4f} for {wanted[1]:.4f}"
            )
            if close:
                seconds[name] = taken
            if close and taken < SLOW:
                break
        best = min(seconds, key=lambda name: seconds[name])
        if best != name:
            self._install(best, tokens)
            self._timed(batch, 1)
        self._say(f"attention: {best}")
        dit.zero_grad(set_to_none=True)
        return {name: round(1000 * value, 2) for name, value in seconds.items()} | {"chosen": best}

    def _install(self, name: str, tokens: int) -> None:
        dit = self.model.core.transformer
        torch._dynamo.reset()
        # A block of the dense attention that cannot be compiled runs as it is; flex would be slower so.
        torch._dynamo.config.suppress_errors = name == "dense"
        vars(dit).pop("forward", None)
        if name == "flex":
            window = self._cfg.model.local_window
            dit.forward = partial(_through, dit, BuiltMasks(self.window, tokens, window, self.device))
        for block in dit.blocks:
            block._compiled_call_impl = None
            if name != "eager":
                block.compile()

    def _trial(self, batch: Batch) -> tuple[float, float]:
        """Loss and norm of the gradient for a fixed draw."""
        torch.manual_seed(0)
        video, mouse, btn, _ = batch
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(self.to_latents(video.float()), mouse, btn, levels=self._levels[0.5])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    def _timed(self, batch: Batch, count: int) -> float:
        begun = time.monotonic()
        for _ in range(count):
            self._trial(batch)
        return (time.monotonic() - begun) / count


def export(model: nn.Module, out: Path) -> None:
    """Write the weights with 8 bits each to world.safetensors, whole or as it was."""
    draft = out / ".world.safetensors"
    save_file(packed(model.state_dict()), draft)
    draft.replace(out / "world.safetensors")
