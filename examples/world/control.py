"""Does the world model obey? Commands in, motion seen in the decoded frames out.

Motion is measured in two ways. A small network reads turn and forward step from two consecutive decoded frames; it is
trained on real episodes and tested on real held-out ones, whose correlation is the ceiling of what can be read off
generated ones. And block matching gives the horizontal shift between frames, with nothing learnt.

Usage:
    bench = Bench(decode, encode, device, settings, reader_players=160, reader_steps=600)
    seen, clips = bench.roll(core, {"n_steps": 8, "cfg_scale": 1.0})
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from episodes import SKIP, enter, play, record
from torch import Tensor, nn

from owl_wms.data.game_controls import ScriptedPlayer
from owl_wms.data.game_world import BUTTONS, YAW_PER_MOUSE
from owl_wms.media.metrics import psnr
from owl_wms.sampling import get_sampler_cls

_READ_SIZE = (48, 80)
_SKY_ROWS = 0.45  # above crosshair and hand
_REACH = 24  # pixels of 160 that the picture may move between frames
_HELD_OUT_SEED = 5_000  # training seeds are far above
_READER_SEED = 20_000_000
_SHOW = (96, 160)  # size at which frames for the reader are rendered
_PIECE = 8  # frames for which a command stays
_PSNR_AT = (1, 5, 10, 20, 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        players: held-out worlds; half turn, half walk.
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
    """Pieces of 8 frames. The first half of the players turns on the spot, mouse x in [-0.6, 0.6]; the second walks
    straight, W and S in turns, which keeps it from ending at a wall: [players, frames, 2] and [players, frames, 11]."""
    generator = torch.Generator().manual_seed(7)
    pieces = -(-frames // _PIECE)
    turning = (torch.arange(players) < players // 2)[:, None]
    turn = (torch.rand(players, pieces, generator=generator) * 2 - 1) * 0.6 * turning
    back = (torch.arange(pieces)[None] + torch.randint(2, (players, 1), generator=generator)) % 2 == 1
    mouse = torch.zeros(players, frames, 2)
    mouse[..., 0] = turn.repeat_interleave(_PIECE, dim=1)[:, :frames]
    buttons = torch.zeros(players, frames, len(BUTTONS))
    for name, held in (("W", ~turning & ~back), ("S", ~turning & back)):
        buttons[..., BUTTONS.index(name)] = held.float().repeat_interleave(_PIECE, dim=1)[:, :frames]
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
    batch = 256 if frames.is_cuda else 64  # a step of 256 takes two seconds on two cores
    spread = target.std(dim=0).clamp(min=1e-3)
    for _ in range(steps):
        pick = torch.randint(len(before), (batch,), device=frames.device)
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
    """How motion seen in frames [e, n + 1, ...] follows the last n commands: turns in the first half, steps in the other."""
    half = len(frames) // 2
    turn, step = read(reader, small(frames))
    turn, step = turn[:half], step[half:]
    commanded = mouse[:half, :, 0] * YAW_PER_MOUSE * SKIP
    forward = buttons[half:, :, BUTTONS.index("W")] > 0.5
    moving = commanded.abs() > 0.02
    return {
        "yaw_correlation": round(correlation(commanded, turn), 4),
        "yaw_gain": round(((turn * commanded).mean() / commanded.square().mean()).item(), 4),
        "yaw_same_sign": round((turn.sign() == commanded.sign())[moving].float().mean().item(), 4),
        "yaw_correlation_matching": round(correlation(commanded, shifts(frames[:half])), 4),
        "step_correlation": round(correlation(2.0 * forward - 1, step), 4),
        "step_cells_with_w": round(step[forward].mean().item(), 4),
        "step_cells_with_s": round(step[~forward].mean().item(), 4),
    }


def picture(frames: Tensor) -> Tensor:
    """[b, C, H, W] -> [b, 3, 180, 320] in [-1, 1], so that full-size frames are never all in memory."""
    return F.interpolate(frames[:, :3].float().clamp(-1, 1), size=(180, 320), mode="area")


class Bench:
    """Held-out worlds, what really happens in them under the commands, and the reader that judges motion."""

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        settings: Settings,
        *,
        reader_players: int,
        reader_steps: int,
    ) -> None:
        """Train the reader on rendered play and play the reference.

        Args:
            decode: latents [b, c, h, w] to frames [b, C, H, W].
            encode: as in `episodes.record`.
            device: where to work.
            settings: what is measured.
            reader_players: episodes of 24 frames that the reader learns from.
            reader_steps: its training steps.
        """
        self._decode, self._settings = decode, settings
        shown = record(
            players=reader_players, frames=24, first_seed=_READER_SEED, encode=small, device=device, size=_SHOW
        )
        motion = torch.stack(shown.motion(), dim=-1)
        self.reader = train_reader(shown.latents.float(), motion, reader_steps)
        with torch.no_grad():
            self._play_reference(encode, device)
        self._ahead = [k for k in _PSNR_AT if k <= settings.frames]
        still = self.true_frames[:, 0]
        self.report = {
            "players": settings.players,
            "context_frames": settings.context,
            "generated_frames": settings.frames,
            "real": self._obedience(self.true_frames),
            "psnr_db_of_last_context_frame": {k: self._psnr(still, k) for k in self._ahead},
        }

    def _play_reference(self, encode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Scripted context, then the commands, in held-out worlds."""
        settings = self._settings
        world = enter(settings.players, _HELD_OUT_SEED, device)
        script = ScriptedPlayer(world)
        before = play(world, lambda frame: script.controls(), settings.context, encode, settings.size)
        last = picture(world.render(height=settings.size[0], width=settings.size[1]))[:, None]
        mouse, buttons = self._asked = commands(settings.players, settings.frames, device)
        after = play(world, lambda k: (mouse[:, k], buttons[:, k]), settings.frames, picture, settings.size)
        self._context = before.latents.float() / settings.vae_scale
        self._mouse, self._buttons = torch.cat([before.mouse, mouse], 1), torch.cat([before.buttons, buttons], 1)
        self.true_frames = torch.cat([last.half(), after.latents], dim=1)

    @torch.no_grad()
    def roll(self, core: nn.Module, sampler: dict[str, Any]) -> tuple[dict[str, Any], Clips]:
        """Let a model (core, eval mode) continue the contexts under the commands.

        Args:
            core: the averaged model.
            sampler: arguments of `av_caching` without num_frames.

        Returns:
            What was seen, to be read beside `report["real"]`, and the clips.
        """
        settings, device = self._settings, self._mouse.device
        run = get_sampler_cls("av_caching")(num_frames=settings.frames, **sampler)
        generator = torch.Generator(device=device).manual_seed(11)
        with torch.autocast(device.type, torch.bfloat16):
            latents = run(core, self._context, self._mouse, self._buttons, generator=generator).latents
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
        return torch.stack([torch.cat([picture(self._decode(p)) for p in clip.split(32)]) for clip in latents]).half()
