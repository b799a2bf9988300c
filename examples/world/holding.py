"""Measures how long a world model holds over 30 seconds of play, each value beside the game's own.

`Truth.ceiling` has the survival (`survival.py`) of the game itself under other commands in the same worlds, which is
the most that a model can reach.

Usage:
    truth = Truth.play(worlds=12, frames=600, encode=encode, decode=decode, device=device, size=(360, 640))
    found = measure(Player(core, space, {"n_steps": 2}), truth, decode)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from control import commands, obedience, picture
from episodes import advance, chunks, enter
from safetensors import safe_open
from safetensors.torch import save_file
from survival import EVERY, FPS, Looks, both_forms, decibels, kinds_of, rounded, steps_of
from torch import Tensor, nn
from views import Views, look_around, with_others_out_of_view

from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld
from owl_wms.models.latents import LatentSpace
from owl_wms.sampling import AVCachingSampler
from owl_wms.sampling.frames import FrameLoop
from owl_wms.sampling.guidance import Guidance
from owl_wms.sampling.schedule import get_sd3_euler

SEED = 5_000  # training seeds are far above
CONTEXT = 12
TAUGHT = 24  # true frames after the context whose latents are kept
WINDOW = 60  # frames in which obedience is measured, at the beginning, in the middle and at the end
GROUPS = ((0, 8), (8, 16), (16, 32), (32, 64), (64, 128))  # principal directions, the strongest first


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What really happens in held-out worlds: a third stands still, a third turns, a third walks to and fro.

    Attributes:
        latents: float32 [w, CONTEXT + TAUGHT, c, h, w'] as stored.
        mouse, buttons: [w, CONTEXT + frames, 2] and [w, CONTEXT + frames, 11].
        shown: frames that are looked at, [s]; 0 is the last of the context.
        drawn: float16 [w, s, 4, 180, 320], the game.
        looks: of the game's frames, coded and decoded by the autoencoder, which is all that a perfect model could show.
        still_db: [w / 3, s] of those frames at rest to the first of them.
        views: of the worlds in motion, [2 w / 3, ...].
        windows: first frames of the three windows.
        ceiling: survival of the game under other commands in the same worlds; at rest with other creatures out of view.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor
    shown: list[int]
    drawn: Tensor
    looks: Looks
    still_db: Tensor
    views: Views
    windows: list[int]
    ceiling: dict[str, Any]

    @staticmethod
    @torch.no_grad()
    def play(
        *,
        worlds: int,
        frames: int,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        device: torch.device,
        size: tuple[int, int],
    ) -> Truth:
        """Play `worlds` of each kind for `frames` frames."""
        count, window = 3 * worlds, min(WINDOW, frames // 3)
        windows = [0, (frames - window) // 2, frames - window]
        wanted = {k for first in windows for k in range(first, first + window + 1)} | set(range(0, frames + 1, EVERY))
        wanted |= {1, frames}
        camera = _Camera(encode, decode, size)
        world = enter(count, SEED, device)
        latents, mice, held = _play_context(world, worlds, camera)
        begun = world.part(0, count)
        mouse, buttons = _asked(worlds, frames, device, 7)
        seen = [camera.seen(world)]
        for step in range(1, frames + 1):
            advance(world, mouse[:, step - 1], buttons[:, step - 1])
            if step in wanted:
                seen.append(camera.seen(world))
            if step <= TAUGHT:
                latents.append(seen[-1][3] if step in wanted else camera.coded(world))
        drawn, decoded, spread = (torch.stack(part, dim=1) for part in list(zip(*seen, strict=True))[:3])
        shown, first = sorted(wanted), sorted(wanted).index(1)
        truth = Truth(
            latents=torch.stack(latents, dim=1),
            mouse=torch.cat([torch.stack(mice, dim=1), mouse], dim=1),
            buttons=torch.cat([torch.stack(held, dim=1), buttons], dim=1),
            shown=shown,
            drawn=drawn,
            looks=Looks.of(decoded, spread),
            still_db=_still_db(decoded[:worlds], first),
            views=look_around(begun.part(worlds, count), frames, encode, decode, size),
            windows=windows,
            ceiling={},
        )
        truth.ceiling["the game"] = looks_of(decoded, spread, truth)
        truth.ceiling["other commands"] = truth.of_game_under_others(begun, camera)
        return truth

    def of_game_under_others(self, begun: GameWorld, camera: _Camera) -> dict[str, Any]:
        """Survival of the game from `begun` on: at rest with other creatures out of view, else other commands."""
        n, frames = self.worlds, self.shown[-1]
        resting, moving = with_others_out_of_view(begun.part(0, n)), begun.part(n, 3 * n)
        mouse, buttons = _asked(n, frames, begun.device, 8)
        steps = steps_of(self)
        seen = []
        for step in range(1, frames + 1):
            advance(resting, mouse[:n, step - 1], buttons[:n, step - 1])
            advance(moving, mouse[n:, step - 1], buttons[n:, step - 1])
            if step == 1 or step in steps:
                parts = zip(camera.seen(resting)[1:3], camera.seen(moving)[1:3], strict=True)
                seen.append([torch.cat(pair) for pair in parts])
        decoded, spread = (torch.stack(part, dim=1) for part in zip(*seen, strict=True))
        looks = Looks.of(decoded, spread)
        place = list(range(int(1 not in steps), decoded.shape[1]))
        found = both_forms(looks, _still_db(decoded[:n], 0), self, place, 0)
        return {name: part for name, part in found.items() if name != "values"}

    def write(self, path: Path) -> None:
        """Write a file for `read`."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {f"looks.{f.name}": getattr(self.looks, f.name) for f in fields(Looks)}
        tensors |= {f"views.{f.name}": getattr(self.views, f.name) for f in fields(Views)}
        plain = {name: json.dumps(getattr(self, name)) for name in ("shown", "windows", "ceiling")}
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path, plain)

    @staticmethod
    def read(path: Path, device: torch.device) -> Truth:
        """Return what `write` wrote."""
        with safe_open(path, "pt", device=str(device)) as file:
            plain = {name: json.loads(text) for name, text in file.metadata().items()}
            looks = Looks(**{f.name: file.get_tensor(f"looks.{f.name}") for f in fields(Looks)})
            views = Views(**{f.name: file.get_tensor(f"views.{f.name}") for f in fields(Views)})
            return Truth(**{name: file.get_tensor(name) for name in _TENSORS}, looks=looks, views=views, **plain)

    @property
    def worlds(self) -> int:
        """Of each kind."""
        return len(self.mouse) // 3

    def at(self, frames: list[int]) -> list[int]:
        """Places of frames in `shown`."""
        return [self.shown.index(k) for k in frames]


_TENSORS = ("latents", "mouse", "buttons", "drawn", "still_db")


@dataclass(frozen=True, slots=True)
class _Camera:
    """Looks at worlds through the autoencoder, some frames at once (`episodes.chunks`)."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    size: tuple[int, int]

    def coded(self, world: GameWorld) -> Tensor:
        """Latents float32 [w, c, h, w']."""
        return torch.cat([self.encode(part).float() for part in self._parts(world)])

    def seen(self, world: GameWorld) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures drawn and decoded float16 [w, 4, 180, 320], standard deviation of the latents [w], latents."""
        parts = list(self._parts(world))
        coded = [self.encode(part) for part in parts]
        drawn = torch.cat([picture(part) for part in parts]).half()
        decoded = torch.cat([picture(self.decode(part)) for part in coded]).half()
        latents = torch.cat(coded).float()
        return drawn, decoded, latents.flatten(1).std(dim=1), latents

    def _parts(self, world: GameWorld) -> Iterator[Tensor]:
        for part in chunks(world):
            yield render(part, height=self.size[0], width=self.size[1])


def _still_db(frames: Tensor, first: int) -> Tensor:
    """Likeness of each picture [w, s, 4, H, W] to number `first` of its clip, in dB: [w, s]."""
    return torch.stack([decibels(clip, clip[first, None]) for clip in frames])


def _play_context(world: GameWorld, rest: int, camera: _Camera) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Play the context by script; the first `rest` players come to rest in it. Latents and controls of each frame."""
    script, resting = ScriptedPlayer(world), torch.arange(world.batch, device=world.device)[:, None] < rest
    latents, mice, held = [], [], []
    for frame in range(CONTEXT):
        mouse, keys = script.controls()
        calm = resting & (frame > 3)
        mouse, keys = mouse * ~calm, (keys & ~calm).float()
        advance(world, mouse, keys)
        mice.append(mouse)
        held.append(keys)
        latents.append(camera.coded(world))
    return latents, mice, held


def _asked(worlds: int, frames: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Commands [3 * worlds, frames, 2] and [.., 11]: nothing for the first third, then turns, then W and S."""
    mouse, buttons = commands(2 * worlds, frames, device, seed)
    still = torch.zeros_like(mouse[:worlds]), torch.zeros_like(buttons[:worlds])
    return torch.cat([still[0], mouse]), torch.cat([still[1], buttons])


@dataclass(frozen=True, slots=True)
class Player:
    """A model and how it is played.

    Attributes:
        core: in the precision of play, eval mode.
        space: of its latents.
        sampler: arguments of `av_caching` without num_frames.
        seed: of the noise.
    """

    core: nn.Module
    space: LatentSpace
    sampler: dict[str, Any]
    seed: int = 11

    def roll(self, truth: Truth) -> Tensor:
        """Continue the contexts: stored latents float16 [w, 1 + frames, c, h, w'], the last real one first."""
        x = self.to_model(truth.latents[:, :CONTEXT])
        run = AVCachingSampler(num_frames=truth.mouse.shape[1] - CONTEXT, **self.sampler)
        generator = _seeded(x.device, self.seed)
        made = run(self.core, x, truth.mouse, truth.buttons, generator=generator).latents[:, CONTEXT - 1 :]
        return torch.cat([self.space.to_stored(part.float()).half() for part in made.split(60, dim=1)], dim=1)

    def to_model(self, latents: Tensor) -> Tensor:
        """Stored latents as the core takes them."""
        return self.space.to_model(latents).to(next(self.core.parameters()).dtype)

    def after(self, history: Tensor, truth: Truth) -> FrameLoop:
        """A loop that has seen true frames [w, n, c, h, w'] in the model's scale."""
        settings = self.sampler
        guidance = Guidance(
            model=self.core, scale=settings.get("cfg_scale", 1.0), max_level=settings.get("max_level", 1.0)
        )
        loop = FrameLoop(
            guidance,
            deltas=get_sd3_euler(settings["n_steps"]),
            noise_prev=settings["noise_prev"],
            max_window=settings["max_window"],
            order=settings.get("order", 1),
        )
        loop.begin(history, truth.mouse, truth.buttons, _seeded(history.device))
        return loop


def _seeded(device: torch.device, seed: int = 11) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


@torch.no_grad()
def fresh(player: Player, truth: Truth) -> dict[str, Any]:
    """Squared error of one frame behind true frames, in latents divided by `vae_scale`: of all, of those at rest, and
    by principal direction as a share of its variance."""
    x = player.to_model(truth.latents)
    loop, generator = player.after(x[:, :CONTEXT], truth), _seeded(x.device, 12)
    errors = []
    for k in range(CONTEXT, x.shape[1]):
        controls = truth.mouse[:, k : k + 1], truth.buttons[:, k : k + 1]
        made = loop.denoise(*controls, generator)
        errors.append(player.space.to_stored(made[:, 0].float()) - truth.latents[:, k])
        loop.remember(x[:, k : k + 1], *controls, generator)
    error = torch.stack(errors, dim=1) / player.space.scale
    latents = truth.latents / player.space.scale
    repeated = (latents[:, CONTEXT:] - latents[:, CONTEXT - 1 : -1]).square()
    rows = latents.movedim(2, -1).flatten(0, -2)
    variances, directions = torch.linalg.eigh(torch.cov(rows.T.double()))
    variances, directions = variances.flip(0), directions.flip(1)
    along = (error.movedim(2, -1).flatten(0, -2).double() @ directions).square().mean(dim=0)
    still = slice(0, truth.worlds)
    return {
        "all": rounded(error.square().mean()),
        "still": rounded(error[still].square().mean()),
        "repeating_the_frame_before": [rounded(repeated.mean()), rounded(repeated[still].mean())],
        "by_direction": {f"{a}-{b}": rounded(along[a:b].sum() / variances[a:b].sum()) for a, b in GROUPS},
    }


@torch.no_grad()
def kept(player: Player, truth: Truth, made: Tensor) -> float:
    """Share of the model's own error in frame 12 that it keeps in the next frame: projection of the change."""
    frame = CONTEXT + 11
    true = player.to_model(truth.latents[:, : frame + 1])
    own = torch.cat([true[:, :-1], player.to_model(made[:, 12:13].float())], dim=1)
    controls = truth.mouse[:, frame + 1 : frame + 2], truth.buttons[:, frame + 1 : frame + 2]
    nexts = [player.after(x, truth).denoise(*controls, _seeded(x.device, 13)).float() for x in (true, own)]
    change = player.space.difference_to_stored(nexts[1] - nexts[0])
    error = player.space.difference_to_stored(own[:, -1:].float() - true[:, -1:].float())
    return rounded((change * error).sum() / error.square().sum())


@torch.no_grad()
def looks_of(frames: Tensor, spread: Tensor, truth: Truth) -> dict[str, Any]:
    """Measure pictures [w, s, 4, H, W] of the shown frames, and the spread [w, s] of their latents."""
    looks = Looks.of(frames, spread)
    n = truth.worlds
    steps = steps_of(truth)
    first = truth.shown.index(1)
    survival = both_forms(looks, _still_db(frames[:n], first), truth, truth.at(steps), first)
    values = survival.pop("values")
    ends = [k for k in (20, 100, 300, 600) if k in steps]
    found: dict[str, Any] = {**survival, "still_db_to_own_first": {}, "still_db_to_game": {}}
    for k in ends:
        found["still_db_to_own_first"][k] = rounded(values["still_db"][:, steps.index(k)].mean())
        at = truth.shown.index(k)
        found["still_db_to_game"][k] = rounded(decibels(frames[:n, at], truth.drawn[:n, at]).mean())
    length = truth.shown[-1] - truth.windows[-1]
    begin = truth.at(list(range(1, length + 1)))
    found["still_change_between_frames"] = rounded(frames[:n, begin, :3].float().diff(dim=1).abs().mean())
    for name in ("colour", "sharpness", "spread"):
        found[name] = {
            kind: {f"{k / FPS:g}s": rounded(values[name][part, steps.index(k)].mean()) for k in ends}
            for kind, part in kinds_of(n).items()
        }
    # Whatever the view: the mean over all moving worlds, of the model over the game's.
    sharp = truth.looks.sharp[n:].mean()
    found["mean_sharpness_moving"] = {
        f"{k / FPS:g}s": rounded(looks.sharp[n:, truth.shown.index(k)].mean() / sharp) for k in ends
    }
    found["first_frame_db_to_game"] = rounded(decibels(frames[:, first], truth.drawn[:, first]).mean())
    found["obedience"] = {}
    for begun in truth.windows:
        seen = truth.at(list(range(begun, begun + length + 1)))
        asked = slice(CONTEXT + begun, CONTEXT + begun + length)
        seconds = f"{begun / FPS:g}-{(begun + length) / FPS:g}s"
        found["obedience"][seconds] = obedience(frames[n:, seen], truth.mouse[n:, asked], truth.buttons[n:, asked])
    return found


@torch.no_grad()
def measure(player: Player, truth: Truth, decode: Callable[[Tensor], Tensor]) -> tuple[dict[str, Any], Tensor]:
    """All measures of a model; also the pictures [w, s, 4, 180, 320] of the shown frames."""
    made = player.roll(truth)
    seen = made[:, truth.shown]
    frames = torch.stack([torch.cat([picture(decode(p.float())) for p in clip.split(32)]).half() for clip in seen])
    found = {"sampler": player.sampler, "seed": player.seed, "fresh": fresh(player, truth)}
    found["kept"] = kept(player, truth, made)
    return found | looks_of(frames, seen.float().flatten(2).std(dim=2), truth), frames
