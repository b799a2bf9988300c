"""Times the frame loop of a model of upstream's published size (configs/dit_v4.yml) with random weights.

Latents alone, without a decoder. `eager` is a cache that grows and moves, as before the ring, and `torch.compile, its
own loop` is the same with the model compiled; it needs about seven graphs before lengths are symbols, which may take
more time than it has. The other rivals are given our ring, whose addresses and shapes stay, and so one graph, in the
default mode and in `reduce-overhead`, which records CUDA graphs of single passes. Ours is the ring with a graph of the
whole frame, of the plain and of the compiled model.

Every way has a time limit, and its row is kept as soon as it is known. Once ours and `torch.compile` with our ring are
ready, all that ran take turns in a drawn order, and their rows get the times of the turns; so they do again with
`reduce-overhead`. The loop that may not be ready in time comes last: a time limit that ends a compilation leaves every
compiled form of the model running as PyTorch, and turns after it would flatter ours.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import time_limit
from owl_wms.configs import load_world_config
from owl_wms.models import get_model_cls
from owl_wms.nn.kv_cache import KVCache
from owl_wms.nn.setting import latent_grid
from owl_wms.sampling import Guidance, get_sd3_euler, zlerp
from owl_wms.sampling.frames import FrameLoop

WINDOW = 64
LARGEST_RELATIVE = 0.1
# Of what is left, for one way: the first compilation must not take the time of those behind it.
SHARE = 0.75
TIMED_SECONDS = 4.0
TURNS, TURN_SECONDS = 5, 0.5
Keep = Callable[[dict[str, Any]], None]


class GrowingLoop:
    """Makes frames with `KVCache`: new shapes for every frame while it fills, moved to the front when it is full."""

    def __init__(self, guidance: Guidance, prefill: Guidance, config: Any, deltas: Tensor, noise: float) -> None:
        self._guidance, self._prefill, self._deltas, self._noise = guidance, prefill, deltas, noise
        self._cache = KVCache(config, max_window=WINDOW)

    def begin(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> None:
        """Stores a context."""
        self._like = x[:, :1]
        noisy = zlerp(x, self._noise, generator)
        for frame in range(x.shape[1]):
            span = slice(frame, frame + 1)
            self._pass(self._prefill, noisy[:, span], mouse[:, span], btn[:, span])

    def _pass(self, guidance: Guidance, x: Tensor, mouse: Tensor, btn: Tensor) -> None:
        self._cache.enable_cache_updates()
        t = torch.full(x.shape[:2], self._noise, dtype=torch.float32, device=x.device)
        guidance.velocity((x,), t, mouse, btn, self._cache)
        self._cache.disable_cache_updates()

    def denoise(self, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the next frame."""
        like = self._like
        frame = torch.randn(like.shape, device=like.device, dtype=like.dtype, generator=generator)
        t = torch.ones(frame.shape[:2], dtype=torch.float32, device=frame.device)
        for delta in self._deltas.tolist():
            (velocity,) = self._guidance.velocity((frame,), t, mouse, btn, self._cache)
            frame, t = frame - delta * velocity, t - delta
        return frame

    def remember(self, x: Tensor, mouse: Tensor, btn: Tensor, generator: torch.Generator) -> None:
        """Stores a frame."""
        self._pass(self._guidance, zlerp(x, self._noise, generator), mouse, btn)


class Graphed:
    """A model compiled in `reduce-overhead` mode, told before each pass that the results of the last are done with."""

    def __init__(self, core: Any) -> None:
        self._compiled, self.config = torch.compile(core, mode="reduce-overhead"), core.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a pass."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(*args, **kwargs)


@dataclass(kw_only=True)
class Way:
    """One way to run the model: how its loop is made, and what came of it."""

    name: str
    make: Callable[[], Any]
    ours: bool
    told_addresses: bool = False
    then_turns: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    one: Callable[[], object] | None = None
    turns: list[float] = field(default_factory=list)


class Clip:
    """A context of noise, and the controls of every frame, on the device."""

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        self.x = torch.randn(1, WINDOW, config.channels, *latent_grid(config), **given)
        self.mouse, self.btn = torch.zeros(1, WINDOW, 2, **given), torch.zeros(1, WINDOW, config.n_buttons, **given)

    def start(self, loop: Any) -> Callable[[], Tensor]:
        """Stores the context in a loop; returns what makes one frame more."""
        generator = torch.Generator(self.x.device).manual_seed(1)
        loop.begin(self.x, self.mouse, self.btn, generator)
        controls = self.mouse[:, :1], self.btn[:, :1]

        def one() -> Tensor:
            latent: Tensor = loop.denoise(*controls, generator)
            loop.remember(latent, *controls, generator)
            return latent

        return one


def ways_of(core: Any, given: dict[str, Any], steps: int) -> list[Way]:
    """Returns the ways, the most wanted first."""
    deltas, noise, scale = get_sd3_euler(steps), given.get("noise_prev", 0.2), given.get("cfg_scale", 1.0)
    plain, compiled = Guidance(model=core, scale=scale), Guidance(model=torch.compile(core), scale=scale)
    graphed = Guidance(model=Graphed(core), scale=scale)

    def ring(guidance: Guidance, capture: bool) -> FrameLoop:
        options: dict[str, Any] = {"deltas": deltas, "noise_prev": noise, "max_window": WINDOW, "fixed": True}
        return FrameLoop(guidance, **options, capture=capture, prefill=plain)

    return [
        Way(name="eager", ours=False, make=lambda: GrowingLoop(plain, plain, core.config, deltas, noise)),
        Way(name="ring, captured", ours=True, make=lambda: ring(plain, True)),
        Way(name="torch.compile, our ring", ours=False, make=lambda: ring(compiled, False)),
        Way(name="ring, compiled and captured", ours=True, then_turns=TURNS // 2, make=lambda: ring(compiled, True)),
        Way(
            name="torch.compile reduce-overhead, our ring",
            ours=False,
            told_addresses=True,
            then_turns=TURNS,
            make=lambda: ring(graphed, False),
        ),
        Way(
            name="torch.compile, its own loop",
            ours=False,
            make=lambda: GrowingLoop(compiled, plain, core.config, deltas, noise),
        ),
    ]


@torch.no_grad()
def measure_upstream(args: argparse.Namespace, keep: Keep) -> list[str]:
    """Keeps a row for each way to run a model of upstream's published size; returns the failures."""
    began = time.perf_counter()
    world, device = load_world_config(args.upstream), torch.device(args.device)
    config, given = world.model, dict(world.train.sampler_kwargs or {})
    steps = given.get("n_steps", 4) if args.steps is None else args.steps
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64  # all compiled rivals share one function, and 8 graphs
    torch.manual_seed(0)
    with device:  # 700 million random numbers take seconds on a CPU
        core = get_model_cls(config.model_id)(config).core
    core = core.eval().requires_grad_(False).to(device=device, dtype=dtype)
    clip, ways = Clip(config, device, dtype), ways_of(core, given, steps)
    failures: list[str] = []
    wanted: Tensor | None = None

    def left() -> float:
        return float(args.upstream_seconds) - (time.perf_counter() - began)

    for way in ways:
        way.row |= {"model": args.upstream.name, "way": way.name, "steps": steps}
        try:
            with time_limit(max(1, int(SHARE * left()))):
                first = _prepare(way, clip, args.frames)
        except Exception as error:  # a rival that does not run on this machine is a row without numbers
            text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            way.row["failed"], way.one = text, None
            if way.ours or way.name == "eager":
                failures.append(f"{way.name}: {text}")
            keep(way.row)
            continue
        wanted = first if wanted is None else wanted
        way.row["difference_relative"] = difference = float((first - wanted).norm() / wanted.norm())
        if not difference <= LARGEST_RELATIVE:
            failures.append(f"{way.name}: its first frame differs from eager's by {difference:.3f}")
        keep(way.row)
        _take_turns([way for way in ways if way.one is not None], way.then_turns, device, keep, left)
    return failures


def _prepare(way: Way, clip: Clip, frames: int) -> Tensor:
    """Makes a way's loop, compiles, captures and times it; returns its first frame."""
    began = time.perf_counter()
    loop, device = way.make(), clip.x.device
    way.one = one = clip.start(loop)
    if way.told_addresses:
        _tell_addresses(loop)
    first = one().float()
    for _ in range(WINDOW // 4):  # compiling, capturing, and every shape that moving to the front needs
        one()
    _wait(device)
    way.row["prepare_seconds"] = time.perf_counter() - began
    walls = _timed(one, device, TIMED_SECONDS, frames)
    way.row |= {"loop_fps": len(walls) / sum(walls), "frame_ms": statistics.median(walls) * 1e3}
    way.row["replayed"] = getattr(loop, "replayed", 0)
    counters = torch._dynamo.utils.counters
    way.row["graph_skips"] = int(counters["inductor"]["cudagraph_skips"])
    way.row["graphs"] = int(counters["stats"]["unique_graphs"])
    return first


def _tell_addresses(loop: FrameLoop) -> None:
    """Makes the ring's storage known as memory that stays: without that, Inductor records no graph of a pass that
    writes there."""
    for stored in (*loop.ring._keys, *loop.ring._values, loop.ring._position):
        torch._dynamo.mark_static_address(stored)


def _timed(one: Callable[[], object], device: torch.device, seconds: float, frames: int) -> list[float]:
    walls: list[float] = []
    while len(walls) < frames and sum(walls) < seconds:
        began = time.perf_counter()
        one()
        _wait(device)
        walls.append(time.perf_counter() - began)
    return walls


def _take_turns(ways: list[Way], turns: int, device: torch.device, keep: Keep, left: Callable[[], float]) -> None:
    """Times the ways in turns: a clock that sinks while one row after the other is taken flatters the first."""
    drawn = random.Random(0)
    for way in ways if turns else []:
        way.turns = []
    for _ in range(turns):
        for way in drawn.sample(ways, len(ways)):
            if way.one is None or left() < 2 * TURN_SECONDS:
                return
            way.turns += _timed(way.one, device, TURN_SECONDS, 1000)
        for way in ways:
            way.row["turns_fps"] = len(way.turns) / sum(way.turns)
            way.row["turns_frame_ms"] = statistics.median(way.turns) * 1e3
        keep(ways[0].row)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
