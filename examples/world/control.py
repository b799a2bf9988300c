"""Does the world model obey? Commands in, motion seen in the decoded frames out.

Motion is measured in two ways. A small network reads turn and forward step from two consecutive decoded frames; it is
trained on real episodes and tested on real held-out ones, whose correlation is the ceiling of what can be read off
generated ones. And block matching gives the horizontal shift between frames, with nothing learnt.

Usage:
    bench = Bench(decode, encode, data, settings, reader_steps=600)
    seen, clips = bench.roll(core, {"n_steps": 8, "cfg_scale": 1.0})
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from episodes import SKIP, Episodes, enter, play
from torch import Tensor, nn

from owl_wms.data.game_controls import ScriptedPlayer
from owl_wms.data.game_world import BUTTONS, YAW_PER_MOUSE
from owl_wms.media.metrics import psnr
from owl_wms.sampling import get_sampler_cls

_READ_SIZE = (48, 80)
_SKY_ROWS = 0.45  # above crosshair and hand
_REACH = 24  # pixels of 160 that the picture may move between frames
_HELD_OUT_SEED = 5_000  # training seeds are far above
_PSNR_AT = (1, 5, 10, 20, 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        players: held-out worlds.
        context: real latent frames before generation.
        frames: latent frames generated.
        vae_scale: what latents are divided by for the model.
        size: height and width of rendered frames.
    """

    players: int
    context: int
    frames: int
    vae_scale: float
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Small frames [players, 1 + frames, 3, 180, 320] of the real game and of the model under the same commands."""

    real: Tensor
    generated: Tensor


def commands(players: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random pieces of 10 frames, mouse x in [-0.6, 0.6], W or not: [players, frames, 2] and [players, frames, 11]."""
    generator = torch.Generator().manual_seed(7)
    pieces = -(-frames // 10)
    turn = (torch.rand(players, pieces, generator=generator) * 2 - 1) * 0.6
    walk = (torch.rand(players, pieces, generator=generator) < 0.5).float()
    mouse = torch.zeros(players, frames, 2)
    mouse[..., 0] = turn.repeat_interleave(10, dim=1)[:, :frames]
    buttons = torch.zeros(players, frames, len(BUTTONS))
    buttons[..., BUTTONS.index("W")] = walk.repeat_interleave(10, dim=1)[:, :frames]
    return mouse.to(device), buttons.to(device)


class MotionReader(nn.Module):
    """Two consecutive small frames to (turn in radians, forward step in cells)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 32, 64, 96, 96)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 5, stride=2, padding=2), nn.GroupNorm(8, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """[b, 3, 48, 80] twice -> [b, 2]."""
        return self.net(torch.cat([before, after], dim=1)) * 0.1


def small(frames: Tensor) -> Tensor:
    """[..., C, H, W] -> [..., 3, 48, 80] by area averaging."""
    flat = F.interpolate(frames.flatten(0, -4)[:, :3].float(), size=_READ_SIZE, mode="area")
    return flat.unflatten(0, frames.shape[:-3])


def train_reader(frames: Tensor, motion: Tensor, steps: int) -> MotionReader:
    """Fit a reader on small frames [e, n, 3, 48, 80] and motion [e, n - 1, 2]."""
    reader = MotionReader().to(frames.device)
    before, after, target = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1), motion.flatten(0, 1)
    reader(before[:2], after[:2])
    optimiser = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    spread = target.std(dim=0).clamp(min=1e-3)
    for _ in range(steps):
        pick = torch.randint(len(before), (256,), device=frames.device)
        loss = ((reader(before[pick], after[pick]) - target[pick]) / spread).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return reader.eval()


@torch.no_grad()
def read(reader: MotionReader, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Turn and forward step [e, n - 1] of small frames [e, n, 3, 48, 80]."""
    seen = reader(frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)).unflatten(0, (len(frames), -1))
    return seen[..., 0], seen[..., 1]


def shifts(frames: Tensor) -> Tensor:
    """Horizontal shift in pixels of 160, positive when the view turns right: [e, n, 3, H, W] -> [e, n - 1].

    The displacement with the least mean squared difference over the columns that both frames share, above the
    crosshair and the hand, which stay where they are whatever the view does.
    """
    small_frames = F.interpolate(frames.flatten(0, 1).float(), size=(90, 160), mode="area")[:, :, : int(90 * _SKY_ROWS)]
    small_frames = small_frames.unflatten(0, frames.shape[:2])
    before, after = small_frames[:, :-1], small_frames[:, 1:]
    reach = range(-_REACH, _REACH + 1)
    errors = [
        (before[..., max(0, d) : 160 + min(0, d)] - after[..., max(0, -d) : 160 - max(0, d)])
        .square()
        .mean(dim=(2, 3, 4))
        for d in reach
    ]
    return torch.stack(errors, dim=-1).argmin(dim=-1).float() - _REACH


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all elements."""
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


def obedience(reader: MotionReader, frames: Tensor, mouse: Tensor, buttons: Tensor) -> dict[str, float]:
    """How motion seen in frames [e, n + 1, ...] follows the commands of the last n."""
    turn, step = read(reader, small(frames))
    commanded = mouse[..., 0] * YAW_PER_MOUSE * SKIP
    walk = buttons[..., BUTTONS.index("W")] > 0.5
    slope = ((turn * commanded).mean() / commanded.square().mean()).item()
    moving = commanded.abs() > 0.02
    return {
        "yaw_correlation": round(correlation(commanded, turn), 4),
        "yaw_gain": round(slope, 4),
        "yaw_same_sign": round((turn.sign() == commanded.sign())[moving].float().mean().item(), 4),
        "yaw_correlation_matching": round(correlation(commanded, shifts(frames)), 4),
        "forward_cells_with_w": round(step[walk].mean().item(), 4),
        "forward_cells_without_w": round(step[~walk].mean().item(), 4),
        "forward_correlation": round(correlation(walk.float(), step), 4),
    }


@torch.no_grad()
def reference(encode: Callable[[Tensor], Tensor], settings: Settings, device: torch.device) -> Episodes:
    """Real play of held-out worlds: scripted context, then the commands."""
    world = enter(settings.players, _HELD_OUT_SEED, device)
    script = ScriptedPlayer(world)
    mouse, buttons = commands(settings.players, settings.frames, device)

    def controls(frame: int) -> tuple[Tensor, Tensor]:
        if frame < settings.context:
            return script.controls()
        return mouse[:, frame - settings.context], buttons[:, frame - settings.context]

    return play(world, controls, settings.context + settings.frames, encode, settings.size)


def decode_many(decode: Callable[[Tensor], Tensor], latents: Tensor, size: tuple[int, int]) -> Tensor:
    """[e, n, c, h, w] -> bfloat16 [e, n, 3, *size], clip by clip so that full-size frames are never all in memory."""
    clips = []
    for clip in latents:
        frames = torch.cat([decode(part)[:, :3].float().clamp(-1, 1) for part in clip.split(32)])
        clips.append(F.interpolate(frames, size=size, mode="area").bfloat16())
    return torch.stack(clips)


class Bench:
    """Held-out worlds, what really happens in them under the commands, and the reader that judges motion."""

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
        data: Episodes,
        settings: Settings,
        *,
        reader_steps: int,
    ) -> None:
        """Train the reader on `data` and play the reference.

        Args:
            decode: latents [b, c, h, w] to frames [b, C, H, W].
            encode: as in `episodes.record`.
            data: training episodes, for the motion reader.
            settings: what is measured.
            reader_steps: training steps of the reader.
        """
        self._decode, self._settings = decode, settings
        device = data.mouse.device
        some = slice(0, min(len(data.latents), 160))
        with torch.no_grad():
            frames = decode_many(decode, data.latents[some], _READ_SIZE).float()
            self._real = reference(encode, settings, device)
        self.reader = train_reader(frames, torch.stack([part[some] for part in data.motion()], dim=-1), reader_steps)
        self.true_frames = self._pictures(self._real.latents[:, settings.context - 1 :])
        self._asked = self._real.mouse[:, settings.context :], self._real.buttons[:, settings.context :]
        self._ahead = [k for k in _PSNR_AT if k <= settings.frames]
        still = self.true_frames[:, 0]
        self.report = {
            "players": settings.players,
            "context_frames": settings.context,
            "generated_frames": settings.frames,
            "real": self._obedience(self.true_frames),
            "psnr_db_of_last_context_frame": {k: self._psnr(still, k) for k in self._ahead},
        }

    @torch.no_grad()
    def roll(self, core: nn.Module, sampler: dict[str, Any]) -> tuple[dict[str, Any], Clips]:
        """Let a model (core, eval mode) continue the contexts under the commands.

        Args:
            core: the averaged model.
            sampler: arguments of `av_caching` without num_frames.

        Returns:
            What was seen, to be read beside `report["real"]`, and the clips.
        """
        settings, real = self._settings, self._real
        device = real.mouse.device
        run = get_sampler_cls("av_caching")(num_frames=settings.frames, **sampler)
        context = real.latents[:, : settings.context].float() / settings.vae_scale
        generator = torch.Generator(device=device).manual_seed(11)
        with torch.autocast(device.type, torch.bfloat16):
            latents = run(core, context, real.mouse, real.buttons, generator=generator).latents
        latents = latents[:, settings.context - 1 :].float()
        made = self._pictures(latents * settings.vae_scale)
        seen = {
            "sampler": sampler,
            **self._obedience(made),
            "psnr_db_to_truth": {k: self._psnr(made[:, k], k) for k in self._ahead},
            "latent_std": {k: round(latents[:, k].std().item(), 3) for k in (0, *self._ahead)},
        }
        return seen, Clips(real=self.true_frames, generated=made)

    def _obedience(self, frames: Tensor) -> dict[str, float]:
        return obedience(self.reader, frames, *self._asked)

    def _psnr(self, frames: Tensor, k: int) -> float:
        return round(psnr(frames, self.true_frames[:, k]).mean().item(), 2)

    @torch.no_grad()
    def _pictures(self, latents: Tensor) -> Tensor:
        return decode_many(self._decode, latents, (180, 320))
