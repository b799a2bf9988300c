"""How long a world model holds: measures over 30 seconds of play, each beside the game's own value.

Usage:
    truth = Truth.play(worlds=12, frames=600, encode=encode, decode=decode, device=device, size=(360, 640))
    found = measure(Player(core, space, {"n_steps": 2}), truth)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from control import commands, obedience, picture
from episodes import SKIP, enter
from torch import Tensor, nn

from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.render import render
from owl_wms.media.metrics import psnr
from owl_wms.models.latents import LatentSpace
from owl_wms.sampling import get_sampler_cls
from owl_wms.sampling.frames import FrameLoop
from owl_wms.sampling.guidance import Guidance
from owl_wms.sampling.schedule import get_sd3_euler

SEED = 5_000  # training seeds are far above
FPS = 20
CONTEXT = 12
TAUGHT = 24  # true frames after the context whose latents are kept
WINDOW = 60  # frames in which obedience is measured, at the beginning, in the middle and at the end
EVERY = 10  # frames between those that are looked at outside of these
QUANTILES = 64
STILL_DB, COLOUR, SHARPNESS, SPREAD = 28.0, 0.03, (0.85, 1.15), (0.95, 1.05)  # bounds of survival
GROUPS = ((0, 8), (8, 16), (16, 32), (32, 64), (64, 128))  # principal directions, the strongest first


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What really happens in held-out worlds: a third stands still, a third turns, a third walks to and fro.

    Attributes:
        latents: float32 [w, CONTEXT + TAUGHT, c, h, w'] as stored.
        mouse, buttons: [w, CONTEXT + frames, 2] and [w, CONTEXT + frames, 11].
        shown: frames that are looked at, [s]; 0 is the last of the context.
        drawn: float16 [w, s, 4, 180, 320], the game.
        decoded: the same, coded and decoded by the autoencoder, which is all that a perfect model could show.
        spread: [w, s] standard deviation of each frame's latents.
        windows: first frames of the three windows.
    """

    latents: Tensor
    mouse: Tensor
    buttons: Tensor
    shown: list[int]
    drawn: Tensor
    decoded: Tensor
    spread: Tensor
    windows: list[int]

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
        world = enter(count, SEED, device)
        script = ScriptedPlayer(world)
        mouse, buttons = commands(2 * worlds, frames, device)
        mouse = torch.cat([torch.zeros_like(mouse[:worlds]), mouse])
        buttons = torch.cat([torch.zeros_like(buttons[:worlds]), buttons])
        rests = torch.arange(count, device=device)[:, None] < worlds
        mice, held, drawn, decoded, spread, latents = [], [], [], [], [], []
        for step in range(1 - CONTEXT, frames + 1):
            if step <= 0:
                moved, keys = script.controls()
                calm = rests & (step > 4 - CONTEXT)  # comes to rest within the context
                moved, keys = moved * ~calm, (keys & ~calm).float()
            else:
                moved, keys = mouse[:, step - 1], buttons[:, step - 1]
            for _ in range(SKIP):
                world.step(moved, keys)
            mice.append(moved)
            held.append(keys)
            if step > TAUGHT and step not in wanted:
                continue
            seen = [
                render(world.part(i, min(i + 64, count)), height=size[0], width=size[1]) for i in range(0, count, 64)
            ]
            coded = [encode(part) for part in seen]
            if step <= TAUGHT:
                latents.append(torch.cat(coded).float())
            if step in wanted:
                drawn.append(torch.cat([picture(part) for part in seen]).half())
                decoded.append(torch.cat([picture(decode(part)) for part in coded]).half())
                spread.append(torch.cat(coded).float().flatten(1).std(dim=1))
        stacked = (torch.stack(part, dim=1) for part in (latents, mice, held, drawn, decoded, spread))
        names = ("latents", "mouse", "buttons", "drawn", "decoded", "spread")
        return Truth(**dict(zip(names, stacked, strict=True)), shown=sorted(wanted), windows=windows)

    @property
    def worlds(self) -> int:
        """Of each kind."""
        return len(self.mouse) // 3

    def at(self, frames: list[int]) -> list[int]:
        """Places of frames in `shown`."""
        return [self.shown.index(k) for k in frames]


@dataclass(frozen=True, slots=True)
class Player:
    """A model and how it is played.

    Attributes:
        core: in the precision of play, eval mode.
        space: of its latents.
        sampler: arguments of `av_caching` without num_frames.
    """

    core: nn.Module
    space: LatentSpace
    sampler: dict[str, Any]

    def roll(self, truth: Truth) -> Tensor:
        """Continue the contexts: stored latents float16 [w, 1 + frames, c, h, w'], the last real one first."""
        x = self.to_model(truth.latents[:, :CONTEXT])
        run = get_sampler_cls("av_caching")(num_frames=truth.mouse.shape[1] - CONTEXT, **self.sampler)
        made = run(self.core, x, truth.mouse, truth.buttons, generator=_seeded(x.device)).latents[:, CONTEXT - 1 :]
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
        "all": _rounded(error.square().mean()),
        "still": _rounded(error[still].square().mean()),
        "repeating_the_frame_before": [_rounded(repeated.mean()), _rounded(repeated[still].mean())],
        "by_direction": {f"{a}-{b}": _rounded(along[a:b].sum() / variances[a:b].sum()) for a, b in GROUPS},
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
    return _rounded((change * error).sum() / error.square().sum())


def sharpness(frames: Tensor) -> Tensor:
    """Mean squared Laplacian of grey: [..., 4, H, W] -> [...]."""
    grey = frames[..., :3, :, :].float().mean(dim=-3)
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return (around - 4 * inner).square().mean(dim=(-2, -1))


def colours(frames: Tensor) -> Tensor:
    """Sorted pixels of each channel of a quarter-size picture, thinned: [n, 4, H, W] -> [n, 3 * QUANTILES]."""
    small = F.avg_pool2d(frames[:, :3].float(), 4).flatten(2).sort(dim=-1).values
    place = torch.linspace(0, small.shape[-1] - 1, QUANTILES, device=frames.device).round().long()
    return small[..., place].flatten(1)


def _decibels(a: Tensor, b: Tensor) -> Tensor:
    """Of colour pictures [n, 4, H, W], at most 60: frames at rest may be equal."""
    return psnr(a[:, :3], b[:, :3]).clamp(max=60)


@dataclass(frozen=True, slots=True)
class _Looks:
    """What is compared between frames, of every shown frame of every world."""

    frames: Tensor  # [w, s, 4, H, W]
    sharp: Tensor  # [w, s]
    colour: Tensor  # [w, s, q]
    spread: Tensor  # [w, s]

    @staticmethod
    def of(frames: Tensor, spread: Tensor) -> _Looks:
        sharp = torch.stack([sharpness(clip) for clip in frames])
        return _Looks(frames, sharp, torch.stack([colours(clip) for clip in frames]), spread)


def _values(looks: _Looks, true: _Looks, truth: Truth, place: list[int]) -> dict[str, Tensor]:
    """The values that survival has bounds on, at the frames in `place`: name -> [w or worlds at rest, len(place)]."""
    n = truth.worlds
    first = truth.shown.index(1)
    own = (looks.colour[:n, place] - looks.colour[:n, first, None]).abs().mean(dim=-1)
    pairs = zip(looks.colour[n:, place], true.colour[n:], strict=True)
    colour = torch.cat([own, torch.stack([torch.cdist(a, b, p=1).amin(dim=1) / a.shape[1] for a, b in pairs])])

    def ratio(mine: Tensor, theirs: Tensor) -> Tensor:
        """To the game's same frame at rest; to the nearer end of the range that it has in that world in motion."""
        value = mine[:, place]
        low, high = theirs.amin(dim=1, keepdim=True), theirs.amax(dim=1, keepdim=True)
        moving = torch.where(value < low, value / low, torch.where(value > high, value / high, torch.ones_like(value)))
        return torch.cat([value[:n] / theirs[:n, place], moving[n:]])

    return {
        "still_db": torch.stack([_decibels(clip[place], clip[first, None]) for clip in looks.frames[:n]]),
        "colour": colour,
        "sharpness": ratio(looks.sharp, true.sharp),
        "spread": ratio(looks.spread, true.spread),
    }


def _survival(values: dict[str, Tensor], truth: Truth, frames: list[int]) -> dict[str, Any]:
    broken = {
        "colour": values["colour"] > COLOUR,
        "sharpness": (values["sharpness"] < SHARPNESS[0]) | (values["sharpness"] > SHARPNESS[1]),
        "spread": (values["spread"] < SPREAD[0]) | (values["spread"] > SPREAD[1]),
    }
    rest = torch.zeros_like(broken["colour"])
    rest[: truth.worlds] = values["still_db"] < STILL_DB
    broken["still_db"] = rest
    whole = torch.stack(list(broken.values())).any(dim=0)
    times = torch.tensor([*frames, frames[-1] + EVERY], device=whole.device) / FPS

    def first(marks: Tensor) -> Tensor:
        ended = torch.cat([marks, torch.ones_like(marks[:, :1])], dim=1)
        return times[ended.int().argmax(dim=1)]

    n = truth.worlds
    kinds = {"all": slice(0, 3 * n), "still": slice(0, n), "turn": slice(n, 2 * n), "walk": slice(2 * n, 3 * n)}
    return {
        "median_seconds": {kind: _rounded(first(whole)[part].median()) for kind, part in kinds.items()},
        "median_seconds_of_each_bound": {name: _rounded(first(marks).median()) for name, marks in broken.items()},
    }


@torch.no_grad()
def looks_of(frames: Tensor, spread: Tensor, truth: Truth) -> tuple[_Looks, dict[str, Any]]:
    """Measure pictures [w, s, 4, H, W] of the shown frames against the game."""
    true = _Looks.of(truth.decoded, truth.spread)
    looks = _Looks.of(frames, spread)
    n = truth.worlds
    steps = list(range(EVERY, truth.shown[-1] + 1, EVERY))
    place = truth.at(steps)
    values = _values(looks, true, truth, place)
    ends = [k for k in (20, 100, 300, 600) if k in steps]
    first = truth.shown.index(1)
    found: dict[str, Any] = {"still_db_to_own_first": {}, "still_db_to_game": {}}
    for k in ends:
        found["still_db_to_own_first"][k] = _rounded(values["still_db"][:, steps.index(k)].mean())
        at = truth.shown.index(k)
        found["still_db_to_game"][k] = _rounded(_decibels(frames[:n, at], truth.drawn[:n, at]).mean())
    begin = truth.at(list(range(1, truth.windows[0] + min(WINDOW, truth.shown[-1] // 3) + 1)))
    found["still_change_between_frames"] = _rounded(frames[:n, begin, :3].float().diff(dim=1).abs().mean())
    kinds = {"still": slice(0, n), "turn": slice(n, 2 * n), "walk": slice(2 * n, 3 * n)}
    for name in ("colour", "sharpness", "spread"):
        found[name] = {
            kind: {f"{k / FPS:g}s": _rounded(values[name][part, steps.index(k)].mean()) for k in ends}
            for kind, part in kinds.items()
        }
    # Whatever the view: the mean over all moving worlds, of the model over the game's.
    found["mean_sharpness_moving"] = {
        f"{k / FPS:g}s": _rounded(looks.sharp[n:, truth.shown.index(k)].mean() / true.sharp[n:].mean()) for k in ends
    }
    found["first_frame_db_to_game"] = _rounded(_decibels(frames[:, first], truth.drawn[:, first]).mean())
    found["survival"] = _survival(values, truth, steps)
    found["obedience"] = {}
    window = truth.windows[-1]
    for begun in truth.windows:
        length = truth.shown[-1] - window
        at = truth.at(list(range(begun, begun + length + 1)))
        asked = slice(CONTEXT + begun, CONTEXT + begun + length)
        seconds = f"{begun / FPS:g}-{(begun + length) / FPS:g}s"
        found["obedience"][seconds] = obedience(frames[n:, at], truth.mouse[n:, asked], truth.buttons[n:, asked])
    return looks, found


@torch.no_grad()
def measure(player: Player, truth: Truth, decode: Callable[[Tensor], Tensor]) -> tuple[dict[str, Any], Tensor]:
    """All measures of a model; also the pictures [w, s, 4, 180, 320] of the shown frames."""
    made = player.roll(truth)
    seen = made[:, truth.shown]
    frames = torch.stack([torch.cat([picture(decode(p.float())) for p in clip.split(32)]).half() for clip in seen])
    found = {"sampler": player.sampler, "fresh": fresh(player, truth), "kept": kept(player, truth, made)}
    _, looks = looks_of(frames, seen.float().flatten(2).std(dim=2), truth)
    return {**found, **looks}, frames


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)
