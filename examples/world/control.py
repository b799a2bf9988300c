"""Does the world model obey? Commands in, motion seen in the decoded frames out.

Nothing that judges is learnt: turns are seen by block matching of consecutive frames, steps by how much nearer the
depth channel says that the world came. The same measures on the real game under the same commands are the ceiling.

Usage:
    bench = Bench(decode, encode, device, settings)
    seen, clips = bench.roll(core, {"n_steps": 8, "cfg_scale": 1.0})
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from episodes import SKIP, enter, play
from torch import Tensor, nn

from owl_wms.game.buttons import BUTTONS
from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import YAW_PER_MOUSE
from owl_wms.media.metrics import psnr
from owl_wms.models.latents import LatentSpace
from owl_wms.sampling import AVCachingSampler

_SKY_ROWS = 0.45  # above crosshair and hand
_REACH = 24  # pixels of 160 that the picture may move between frames
_HELD_OUT_SEED = 5_000  # training seeds are far above
_PIECE = 8  # frames for which a command stays
_PSNR_AT = (1, 5, 10, 20, 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        players: held-out worlds; half turn, half walk.
        context: real latent frames before generation.
        frames: latent frames generated.
        space: of the model's latents.
        size: height and width of rendered frames.
    """

    players: int
    context: int
    frames: int
    space: LatentSpace
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Small frames [players, 1 + frames, 4, 180, 320] of the real game and of the model under the same commands."""

    real: Tensor
    generated: Tensor


def commands(players: int, frames: int, device: torch.device, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Pieces of 8 frames. The first half of the players turns on the spot, mouse x in [-0.6, 0.6]; the second walks
    straight, W and S in turns, which keeps it from ending at a wall: [players, frames, 2] and [players, frames, 11]."""
    generator = torch.Generator().manual_seed(seed)
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


def approach(frames: Tensor) -> Tensor:
    """How much nearer the world came between frames, in units of the depth channel: [e, n, 4, H, W] -> [e, n - 1].

    The median over pixels, which a passing edge or creature does not move.
    """
    depth = frames[:, :, 3].float().flatten(2)
    return (depth[:, :-1] - depth[:, 1:]).median(dim=-1).values


def obedience(frames: Tensor, mouse: Tensor, buttons: Tensor) -> dict[str, float]:
    """How motion in frames [e, n + 1, 4, H, W] follows the last n commands: turns in half of them, steps in half."""
    half = len(frames) // 2
    turn, step = shifts(frames[:half, :, :3]), approach(frames[half:])
    commanded = mouse[:half, :, 0] * YAW_PER_MOUSE * SKIP
    forward = buttons[half:, :, BUTTONS.index("W")] > 0.5
    moving = commanded.abs() > 0.02
    return {
        "yaw_correlation": round(correlation(commanded, turn), 4),
        "yaw_pixels_per_radian": round(((turn * commanded).mean() / commanded.square().mean()).item(), 2),
        "yaw_same_sign": round((turn.sign() == commanded.sign())[moving].float().mean().item(), 4),
        "step_correlation": round(correlation(2.0 * forward - 1, step), 4),
        "step_same_sign": round(((step > 0) == forward).float().mean().item(), 4),
        "approach_with_w": round(step[forward].mean().item(), 5),
        "approach_with_s": round(step[~forward].mean().item(), 5),
    }


def picture(frames: Tensor) -> Tensor:
    """[b, 4, H, W] -> [b, 4, 180, 320] in [-1, 1], so that full-size frames are never all in memory."""
    return F.interpolate(frames.float().clamp(-1, 1), size=(180, 320), mode="area")


class Bench:
    """Held-out worlds, and what really happens in them under the commands."""

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        settings: Settings,
    ) -> None:
        """Play the reference.

        Args:
            decode: latents [b, c, h, w] to frames [b, 4, H, W].
            encode: as in `episodes.record`.
            device: where to work.
            settings: what is measured.
        """
        self._decode, self._settings = decode, settings
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
        last = picture(render(world, height=settings.size[0], width=settings.size[1]))[:, None]
        mouse, buttons = self._asked = commands(settings.players, settings.frames, device)
        after = play(world, lambda k: (mouse[:, k], buttons[:, k]), settings.frames, picture, settings.size)
        self._context = settings.space.to_model(before.latents.float())
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
        run = AVCachingSampler(num_frames=settings.frames, **sampler)
        generator = torch.Generator(device=device).manual_seed(11)
        with torch.autocast(device.type, torch.bfloat16):
            latents = run(core, self._context, self._mouse, self._buttons, generator=generator).latents
        latents = latents[:, settings.context - 1 :].float()
        made = self._pictures(settings.space.to_stored(latents))
        seen = {
            "sampler": sampler,
            **self._obedience(made),
            "psnr_db_to_truth": {k: self._psnr(made[:, k], k) for k in self._ahead},
            "latent_std": {k: round(latents[:, k].std().item(), 3) for k in (0, *self._ahead)},
        }
        return seen, Clips(real=self.true_frames, generated=made)

    def _obedience(self, frames: Tensor) -> dict[str, float]:
        return obedience(frames, *self._asked)

    def _psnr(self, frames: Tensor, k: int) -> float:
        return round(psnr(frames[:, :3], self.true_frames[:, k, :3]).mean().item(), 2)

    @torch.no_grad()
    def _pictures(self, latents: Tensor) -> Tensor:
        return torch.stack([torch.cat([picture(self._decode(p)) for p in clip.split(32)]) for clip in latents]).half()
