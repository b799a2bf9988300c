"""Quicker forms of what makes episodes on a GPU: steps of the game, pictures, latents.

Each form is compared with the plain one and timed, and used only if it gives the same values in less time. Whatever
fails, then or later, the plain form is used and one line says so. What each form avoids:

- Steps: 308 small kernels each. A CUDA graph launches those of three steps at once, with the same bits.
- Pictures: 994 kernels that read and write 48 GB for 64 frames. `torch.compile` joins them.
- Latents: PyTorch halves pictures by bicubic resizing in a kernel with one thread for each place of the picture, 64 of
  them at the end. Together with the projection behind it, halving is one convolution (`Halving`). Convolutions in
  groups of 16 channels may be quicker with zeros between the groups (`ungrouped`). `torch.compile` joins what is left.

A second process on the same machine compiles the same functions in a few seconds: inductor keeps what it made in a
folder of the user (TORCHINDUCTOR_CACHE_DIR), under a key of the graph, the versions, the GPU and torch's settings.

Usage:
    forms = quicker_forms(encode, players=128, seed=7, size=(360, 640), device=device, say=print)
    data = record(players=128, ..., encode=forms.encode, draw=forms.draw, advance=forms.advance)
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from clock_trainer import within
from episodes import CHUNK, advance, enter
from torch import Tensor, nn

from owl_wms.game.render import render
from owl_wms.game.world import GameState, GameWorld
from owl_wms.sampling.captured import Captured
from owl_wms.vae.blocks import Downsample

COMPILE_SECONDS = 150  # for all forms together
PICTURE_ERROR, LATENT_ERROR = 1e-3, 0.03  # mean absolute of pictures, relative L2 of latents: a form against the plain
GROUPED_GAIN = 0.8  # a clear gain, so that every process chooses the same and finds it compiled
_TURNS = 5
_TAPS = (-0.09375, 0.59375, 0.59375, -0.09375)  # bicubic with a = -0.75, half-way between two pixels
_STATE = [f.name for f in fields(GameState)]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Coder:
    """Half of an autoencoder in a working precision.

    Attributes:
        module: maps frames to latents, or latents to frames, in eval mode.
        dtype: of the module's parameters.
    """

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what the module makes of `x`, in the working precision."""
        out: Tensor = self.module(x.to(self.dtype))
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Forms:
    """How episodes are made: arguments of `record`."""

    encode: Callable[[Tensor], Tensor]
    draw: Callable[..., Tensor] = render
    advance: Callable[[GameWorld, Tensor, Tensor], None] = advance


def quicker_forms(
    encode: Coder, *, players: int, seed: int, size: tuple[int, int], device: torch.device, say: Say, **compiling: Any
) -> Forms:
    """Returns the quickest forms that are right here; never raises.

    Args:
        encode: of the autoencoder.
        players: in a round; forms are made for chunks of as many frames as `play` makes of them.
        seed: of worlds to try the forms in.
        size: height and width of frames.
        device: of the worlds.
        say: called with a line for each form.
        compiling: further arguments of `torch.compile`.
    """
    try:
        return _quicker_forms(encode, players, seed, size, device, say, compiling)
    except Exception as problem:  # a run goes on as it did before there were such forms
        say(f"all forms as before, as {type(problem).__name__}: {str(problem)[:300]}")
        return Forms(encode=encode)


def _quicker_forms(
    encode: Coder,
    players: int,
    seed: int,
    size: tuple[int, int],
    device: torch.device,
    say: Say,
    compiling: dict[str, Any],
) -> Forms:
    chunk, until = min(CHUNK, players), time.monotonic() + COMPILE_SECONDS
    # Worlds in play: at the start tensors are shared between fields, and a compiled form would serve these only.
    crowd = enter(players, seed, device)
    world = crowd.part(0, chunk)
    compiled = torch.compile(_drawn, dynamic=False, fullgraph=True, **compiling)

    def draw_compiled(world: GameWorld, height: int, width: int) -> Tensor:
        return compiled(world, height, width)  # by place: other ways to give arguments would be compiled anew

    forms: dict[str, Callable[[], Callable[..., Tensor]]] = {"compiled": lambda: draw_compiled}
    with torch.no_grad():
        frames = _drawn(world, *size)
        draw = quicker("pictures", _drawn, forms, (world, *size), _picture_error, say, until)
        rewritten = Coder(encode.module, encode.dtype)

        def rewrite() -> Coder:
            nonlocal rewritten
            rewritten = Coder(without_slow_parts(encode.module, frames.to(encode.dtype)), encode.dtype)
            return rewritten

        def compile_rewritten() -> Coder:
            # Convolutions in groups make inductor leave channels last, which cuDNN pays for with copies.
            settings = compiling or {"options": {"force_layout_optimization": True}}
            module: Any = torch.compile(rewritten.module, dynamic=False, fullgraph=True, **settings)
            return Coder(module, encode.dtype)

        forms = {"rewritten": rewrite, "compiled": compile_rewritten}
        with _cudnn_searching():
            coded = quicker("latents", encode, forms, (frames,), _latent_error, say, until)
        return Forms(encode=coded, draw=draw, advance=_quicker_steps(crowd, say))


def quicker(
    name: str,
    plain: Callable[..., Tensor],
    forms: dict[str, Callable[[], Callable[..., Tensor]]],
    inputs: tuple[Any, ...],
    error: Callable[[Tensor, Tensor], float],
    say: Say,
    until: float,
) -> Callable[..., Tensor]:
    """Returns the quickest form of a function that gives the same values, or the function.

    Args:
        name: for the log.
        plain: the function.
        forms: functions that make a form, by name.
        inputs: to try them with; a form will be used for inputs of the same size only.
        error: of a form's result against the function's, as a share of what is allowed.
        say: called with a line for each form.
        until: moment of `time.monotonic` at which a form that is still being made is given up.
    """
    wanted, best = plain(*inputs), plain
    least = seconds_of(plain, inputs)
    for kind, make in forms.items():
        begun = time.monotonic()
        try:
            with within(max(1, int(until - begun))):
                form = make()
                wrong = error(form(*inputs), wanted)
            made = time.monotonic() - begun
            seconds = seconds_of(form, inputs)
        except Exception as problem:  # compilers fail in many ways
            say(f"{name}, {kind}: not used, {type(problem).__name__}: {str(problem)[:300]}")
            continue
        good = wrong <= 1 and seconds < least  # not-a-number is not good
        say(
            f"{name}, {kind}: {1000 * least:.2f} -> {1000 * seconds:.2f} ms for {_size(inputs[0])}, {wrong:.3f} of the "
            f"error allowed, made in {made:.0f} s, {'used' if good else 'not used'}"
        )
        if good:
            best, least = form, seconds
    return plain if best is plain else _Guarded(name, plain, best, _size(inputs[0]), say)


@contextlib.contextmanager
def _cudnn_searching() -> Iterator[None]:
    """Let cuDNN time its kernels for convolutions that are new to it; what it finds holds for the process."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Guarded:
    """A form of a function, for inputs of the size that it was tried with, until it fails."""

    def __init__(
        self, name: str, plain: Callable[..., Tensor], form: Callable[..., Tensor], size: int, say: Say
    ) -> None:
        self._name, self._plain, self._size, self._say = name, plain, size, say
        self._form: Callable[..., Tensor] | None = form

    def __call__(self, first: Any, **more: Any) -> Tensor:
        if self._form is not None and _size(first) == self._size:
            try:
                return self._form(first, **more)
            except Exception as problem:  # for want of memory, for instance
                self._say(f"{self._name}: as before from here on, as {type(problem).__name__}: {str(problem)[:300]}")
                self._form = None
        return self._plain(first, **more)


def _drawn(world: GameWorld, height: int, width: int) -> Tensor:
    return render(world, None, height, width)


def _size(x: GameWorld | Tensor) -> int:
    return x.batch if isinstance(x, GameWorld) else len(x)


def seconds_of(function: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
    """Returns the least seconds of some calls after a first one: others may use the GPU too."""
    taken = []
    function(*inputs)
    for _ in range(_TURNS):
        _wait()
        begun = time.monotonic()
        function(*inputs)
        _wait()
        taken.append(time.monotonic() - begun)
    return min(taken)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _picture_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean() / PICTURE_ERROR)


def _latent_error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm() / LATENT_ERROR)


class Steps:
    """The game frames of one latent frame, on a GPU as one CUDA graph.

    Args:
        allowed: False takes the steps one by one.
    """

    def __init__(self, allowed: bool) -> None:
        self._captured = Captured(_stepped, allowed=allowed)

    @property
    def reason(self) -> str:
        """Why the graph could not be captured, or an empty text."""
        return self._captured.reason

    def __call__(self, world: GameWorld, mouse: Tensor, buttons: Tensor) -> None:
        """As `episodes.advance`, with the same bits."""
        state = (getattr(world.state, name) for name in _STATE)
        made = self._captured("steps", world.seeds, world.grid, mouse, buttons, *state)
        world.state = GameState(**dict(zip(_STATE, made, strict=True)))


def _stepped(seeds: Tensor, grid: Tensor, mouse: Tensor, buttons: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    world = object.__new__(GameWorld)  # what steps read of one
    world.seeds, world.grid = seeds, grid
    world.state = GameState(**dict(zip(_STATE, state, strict=True)))
    advance(world, mouse, buttons)
    return tuple(getattr(world.state, name) for name in _STATE)


def _quicker_steps(world: GameWorld, say: Say) -> Callable[[GameWorld, Tensor, Tensor], None]:
    """Returns the quicker one of `Steps` and `advance`."""
    begun, steps = world.state, Steps(world.device.type == "cuda")
    controls = torch.zeros(world.batch, 2, device=world.device), torch.zeros_like(begun.held)

    def timed(form: Callable[[GameWorld, Tensor, Tensor], None]) -> float:
        world.state = begun
        return 1000 * seconds_of(form, (world, *controls))

    before, after = timed(advance), timed(steps)
    how = f"not captured, {steps.reason}" if steps.reason else "used" if after < before else "not used"
    say(f"steps, at once: {before:.2f} -> {after:.2f} ms for {world.batch}, {how}")
    return steps if after < before else advance


# Encoders.


class Halving(nn.Module):
    """Stands for a `Downsample` by two: `[B, c_in, H, W] -> [B, c_out, H / 2, W / 2]`, H and W even.

    Every value is a fixed sum over 4x4 neighbours, so resizing and projection are one convolution of stride two.
    """

    def __init__(self, original: Downsample) -> None:
        super().__init__()
        weight = original.proj.weight
        taps = torch.tensor(_TAPS, device=weight.device)
        kernel = weight.detach().float() * torch.outer(taps, taps)  # [c_out, c_in, 1, 1] by [4, 4]
        self.kernel = nn.Parameter(kernel.to(weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.kernel, stride=2)


def ungrouped(conv: nn.Conv2d) -> nn.Conv2d:
    """Returns a convolution of all channels with zeros between the groups of `conv`."""
    out, inner = conv.out_channels, conv.weight.shape[1]
    group = torch.arange(out, device=conv.weight.device) // (out // conv.groups)
    places = group[:, None] * inner + torch.arange(inner, device=group.device)  # [out, inner]
    wide = conv.weight.new_zeros(out, conv.in_channels, *conv.weight.shape[2:])
    index = places[..., None, None].expand_as(conv.weight)
    made = copy.copy(conv)
    made._parameters = dict(conv._parameters)
    made.groups = 1
    made.weight = nn.Parameter(wide.scatter(1, index, conv.weight.detach()), requires_grad=False)
    return made


@torch.no_grad()
def without_slow_parts(encoder: nn.Module, frames: Tensor) -> nn.Module:
    """Returns a copy of an encoder, channels last, with `Halving`, and without groups where that is quicker here.

    Args:
        encoder: folded, in eval mode.
        frames: to try it with.
    """
    made: nn.Module = copy.deepcopy(encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Downsample and child.stride == 2:
                setattr(parent, name, Halving(child))
    made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.groups > 1:
                setattr(parent, name, _Chosen(child))
    made(frames)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _Chosen):
                setattr(parent, name, child.best)
    return made


class _Chosen(nn.Module):
    """Times a convolution with and without groups at its first call, and keeps the quicker one as `best`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.best = conv

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        wide: nn.Conv2d = ungrouped(self.best).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        grouped, dense = (seconds_of(form, (x,)) for form in (self.best, wide))
        self.best = self.best if grouped < GROUPED_GAIN * dense else wide
        out: Tensor = self.best(x)
        return out
