"""Training on the model's own frames as history, with the game's true frames as targets.

Why: a model that has only ever seen true frames keeps most of the error that it finds in its history. The game gives
the true frame for any controls, so the model can continue an episode by itself and be taught the true frame behind its
own frames.

Usage:
    loader = OwnHistoryLoader(data, space, window=24, batch_size=64, sampler={...})
    loader.renew(playing(ema.model.core, device), clips=256, keep=4, frames=72, step=0, noise=0.15)
    trainer = OwnHistoryTrainer(cfg.train, None, cfg.model, loader=loader, sample_loader=loader)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from episodes import Episodes, MemoryLoader
from torch import Tensor, nn

from owl_wms.data.loading import Batch
from owl_wms.models.latents import LatentSpace
from owl_wms.sampling import get_sampler_cls
from owl_wms.trainers.objectives.rft import RFTTrainer

DRAWN = -1  # in `history`: the trainer draws the length


@dataclass(frozen=True, kw_only=True, slots=True)
class Horizon:
    """How many frames behind the last real one a window may end.

    Later, the true frame is no longer determined by what the model saw, and a target that is not becomes a blur.

    Attributes:
        moving: for clips that move.
        still: for clips at rest, whose true frame stays known.
    """

    moving: int = 8
    still: int = 72


def playing(core: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a core in the precision of play: bfloat16 on a GPU."""
    return copy.deepcopy(core).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


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
        sampler: dict[str, Any],
        seed: int = 0,
    ) -> None:
        """Remember where frames come from; `sampler` are arguments of `av_caching`, those of play."""
        self._data, self._space, self._window = data, space, window
        self._own = batch_size // 2
        self._true = MemoryLoader(data, window, batch_size - self._own, seed)
        self._sampler, self._seed = sampler, seed
        self._rounds: list[tuple[Tensor, Tensor]] = []
        self._places = torch.empty(0, 2, dtype=torch.long)  # [k, 2], episode and first frame
        self._frames = torch.empty(0)  # [k, frames, c, h, w] as stored, own frames behind the first window
        self.horizon = Horizon()

    @torch.no_grad()
    def renew(self, core: nn.Module, *, clips: int, keep: int, frames: int, step: int, noise: float) -> None:
        """Let the model continue `clips` episodes from a window of true frames on, under the episodes' own controls.

        Args:
            core: the averaged model, in the precision of play.
            clips: continued at once.
            keep: calls of this function whose clips stay in the buffer.
            frames: own frames of each.
            step: of the trainer; fixes what is drawn.
            noise: level at which the history is remembered.
        """
        data, device = self._data, self._data.mouse.device
        generator = torch.Generator(device=device).manual_seed(self._seed * 1_000_003 + step)
        episodes, length = data.mouse.shape[:2]
        frames = min(frames, length - self._window)
        episode = torch.randint(episodes, (clips, 1), generator=generator, device=device)
        start = torch.randint(length - self._window - frames + 1, (clips, 1), generator=generator, device=device)
        at = episode, start + torch.arange(self._window + frames, device=device)
        # A model in bfloat16, not autocast: only then are its passes captured as CUDA graphs.
        dtype = next(core.parameters()).dtype
        x = self._space.to_model(data.latents[episode, at[1][:, : self._window]].float()).to(dtype)
        run = get_sampler_cls("av_caching")(
            **{**self._sampler, "noise_prev": noise, "num_frames": frames, "only_return_generated": True}
        )
        own = run(core, x, data.mouse[at], data.buttons[at], generator=generator).latents
        made = torch.cat([episode, start], dim=1), self._space.to_stored(own.float()).half()
        self._rounds = [*self._rounds, made][-keep:]
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
        episode, start = self._places[chosen, 0], self._places[chosen, 1]
        count = self._frames.shape[1]
        # A clip is at rest when its controls are zero from the last real frame on.
        later = start[:, None] + window + torch.arange(count, device=device)
        moves = data.mouse[episode[:, None], later].any(dim=-1) | data.buttons[episode[:, None], later].any(dim=-1)
        limit = torch.where(moves.any(dim=1), self.horizon.moving, self.horizon.still).clamp(min=2, max=count)
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
