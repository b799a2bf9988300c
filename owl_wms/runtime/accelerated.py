"""`AcceleratedDecoder`: a decoder in the place of the one it wraps, which decodes by programs where that is right.

Why a module: people put it where the decoder was (`pipe.vae.decoder`), and everything around goes on using it as one:
moves and casts it, copies and saves it, hangs hooks onto it, tiles and slices its input, differentiates through it. It
holds no weight of its own: parameters, buffers, submodules and hooks are those of the wrapped decoder, in the very same
containers, so that none of these operations can see a difference.

Where PyTorch decodes, it is the wrapped decoder's own forward, under the caller's autocast, modes and gradients.
`stats().pytorch` counts the reasons.

Usage:
    pipe.vae.decoder = AcceleratedDecoder(pipe.vae.decoder, Options(settings=settings))
    pipe.vae.decoder.original, pipe.vae.decoder.stats()
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from owl_wms.dynamo import uncompiled
from owl_wms.memory import is_out_of_memory
from owl_wms.runtime import capture
from owl_wms.runtime.batches import Way, covers, measured
from owl_wms.runtime.eager import release_memory
from owl_wms.runtime.images import ImageDecode
from owl_wms.runtime.programs import Toolchain
from owl_wms.runtime.stats import DecodeStats
from owl_wms.settings import TensorRTConfig
from owl_wms.vae.autoencoder_dc import is_sana_decoder
from owl_wms.vae.tiles import SMALLEST, decode_in_tiles

MAX_PROGRAMS = 8
"""Programs in memory at once; each holds a copy of the weights, and latents of ever new sizes would fill a GPU."""
LARGEST_TILE = 128
"""Side of a tile in pixels of the last stage with attention: 1,024 of the picture's for f32c32."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LOG = logging.getLogger("owl_wms.runtime")
# What this module keeps for itself; everything else that is set on it belongs to the wrapped decoder.
_OWN = ("_original", "_options", "_state")
_SHARED = frozenset(vars(nn.Module())) - {"training"}
"""Attributes in which nn.Module keeps members and hooks: the very same objects as the wrapped decoder's."""
_COMPILED = "_compiled_call_impl"
"""Set by `nn.Module.compile`. It calls this very module, so a copy does not get it; nor does torch copy it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `owl_wms.accelerate`, see there."""

    settings: TensorRTConfig
    batch_sizes: tuple[int, ...] = ()
    strict: bool = False
    toolchain: Toolchain | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratedStats:
    """Counts the calls of an accelerated decoder.

    Attributes:
        calls: how often it was called.
        program_calls: calls that programs decoded.
        pytorch: calls that PyTorch decoded, by reason.
        ways: how batches are decoded: `(batch, c, h, w)` -> sizes of the programs that run, empty for PyTorch.
        programs: the state of the programs, by their batch size; of a decoder of streams all together, under 0.
    """

    calls: int
    program_calls: int
    pytorch: dict[str, int]
    ways: dict[tuple[int, ...], Way]
    programs: dict[int, DecodeStats]


class _State:
    """State that exists only in this process, and is made anew for a copy."""

    def __init__(self, original: nn.Module, options: Options) -> None:
        self.twin = without_hooks(original)
        self.options = options
        self.decodes: dict[int, ImageDecode] = {}
        self.ways: dict[tuple[int, ...], Way] = {}
        self.pytorch: Counter[str] = Counter()
        self.program_calls = 0
        self.autocast_dtypes: dict[tuple[torch.dtype, torch.dtype], torch.dtype] = {}

    def decode(self, size: int) -> ImageDecode:
        """The programs for batches of `size`."""
        decode = self.decodes.get(size)
        if decode is None:
            decode = self.decodes[size] = ImageDecode(
                self.twin,
                batch_size=size,
                settings=self.options.settings,
                strict=self.options.strict,
                toolchain=self.options.toolchain,
            )
        return decode

    def by_programs(self, way: Way, z: Tensor, dtype: torch.dtype, cast: bool) -> Tensor | None:
        """Decodes `z` in pieces of the sizes in `way`, the last one padded; None if any of them has no program."""
        if len(way) == 1:
            return self.decode(way[0]).images(z, dtype, cast)
        done: list[Tensor] = []
        start = 0
        for size in way:
            frames = self.decode(size).images(z[start : start + size], dtype, cast)
            if frames is None:
                return None
            done.append(frames)
            start += size
        return torch.cat(done)

    def programs(self) -> int:
        """Returns how many programs are in memory."""
        return sum(p["state"] == "ready" for decode in self.decodes.values() for p in decode.stats().programs)


class AcceleratedDecoder(nn.Module):
    """Decodes `[B, C, H, W] -> [B, C, H, W]` like `original`, faster where a program is right; made by
    `owl_wms.accelerate`.

    A program decodes if the latents are a plain dense tensor on the decoder's device and in its dtype (or autocast is
    on), the decoder is in eval mode and no gradient is wanted. Everything else is the wrapped decoder's own forward.
    """

    _original: nn.Module
    _options: Options
    _state: _State

    def __init__(self, original: nn.Module, options: Options) -> None:
        super().__init__()
        own = vars(self)
        own.update({name: value for name, value in vars(original).items() if name in _SHARED})
        own.update(_original=original, _options=options, _state=self._begin(original, options))

    @staticmethod
    def _begin(original: nn.Module, options: Options) -> _State:
        return _State(original, options)

    @property
    def original(self) -> nn.Module:
        """The decoder that this one stands for; both have the same weights."""
        return self._original

    def stats(self) -> AcceleratedStats:
        """Returns counts of what happened so far."""
        state = self._state
        return AcceleratedStats(
            calls=state.program_calls + sum(state.pytorch.values()),
            program_calls=state.program_calls,
            pytorch=dict(state.pytorch),
            ways=dict(state.ways),
            programs={size: decode.stats() for size, decode in sorted(state.decodes.items())},
        )

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Decode latents, the only argument; whatever else the wrapped decoder takes is handed to it."""
        if not args and len(kwargs) == 1:
            args, kwargs = self._positional(kwargs)
        z: Any = args[0] if len(args) == 1 and not kwargs else None
        reason = "further arguments" if z is None else why_pytorch(self._original, z)
        if not reason:
            cast = torch.is_autocast_enabled("cuda" if z.is_cuda else "cpu")
            dtypes = (torch.get_autocast_dtype(z.device.type), z.dtype) if cast else None
            dtype = z.dtype if dtypes is None else self._state.autocast_dtypes.get(dtypes)
            if dtype is not None:
                frames = self._by_program(z, dtype, cast)
                if frames is not None:
                    self._state.program_calls += 1
                    return frames
                reason = "no program"
            else:
                # What a forward returns under autocast is known once it has run there.
                self._state.pytorch["first call under autocast"] += 1
                result = self._original.forward(z)
                if dtypes is not None and isinstance(result, Tensor):
                    self._state.autocast_dtypes[dtypes] = result.dtype
                return result
        self._state.pytorch[reason] += 1
        try:
            return self._original.forward(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            tiled = reason == "no program" and is_sana_decoder(self._original) and not altered(self._state.twin)
            if not tiled or not is_out_of_memory(error):
                raise
        # Outside of the except block: the error's traceback holds the activations that did not fit.
        release_memory(z.device)
        self._state.pytorch["in tiles: the whole picture did not fit into memory"] += 1
        return self._in_tiles(z)

    def _positional(self, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns latents that were given by the wrapped decoder's name for them as a positional argument."""
        name = next(iter(inspect.signature(self._original.forward).parameters), None)
        return ((kwargs[name],), {}) if name in kwargs else ((), kwargs)

    # ---- which way

    def _in_tiles(self, z: Tensor) -> Tensor:
        """Decodes by PyTorch in the largest tiles that fit into memory. Exact; see `owl_wms.vae.tiles`."""
        side = LARGEST_TILE
        while True:
            try:
                return decode_in_tiles(self._original, z, side)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or side // 2 < SMALLEST:
                    raise
            release_memory(z.device)
            side //= 2

    def _by_program(self, z: Tensor, dtype: torch.dtype, cast: bool) -> Tensor | None:
        state = self._state
        way = state.ways.get(z.shape)
        if way is None:
            way = self._choose(z, dtype, cast)
            if way is None:
                return None
            state.ways[tuple(z.shape)] = way
        return state.by_programs(way, z, dtype, cast) if way else None

    def _choose(self, z: Tensor, dtype: torch.dtype, cast: bool) -> Way | None:
        """Chooses how batches like `z` are decoded from now on; None for PyTorch this time only."""
        state, batch, one = self._state, len(z), tuple(z.shape[1:])
        sizes = state.options.batch_sizes or tuple(
            sorted(size for size, decode in state.decodes.items() if decode.has_program(one))
        )
        largest = state.options.settings.max_batch_size
        if not sizes or batch in sizes:
            if state.programs() >= MAX_PROGRAMS and not state.decode(min(batch, largest)).has_program(one):
                _LOG.info("PyTorch decodes %s: %d programs are in memory already", list(z.shape), MAX_PROGRAMS)
                return ()
            way = covers(batch, (min(batch, largest),))[0]
            return way if state.by_programs(way, z, dtype, cast) is not None else None
        ways = [way for way in covers(batch, sizes) if state.by_programs(way, z, dtype, cast) is not None]
        if not ways:
            return None
        candidates: dict[Way, Callable[[Tensor], Any]] = {
            way: functools.partial(state.by_programs, way, dtype=dtype, cast=cast) for way in ways
        }
        candidates[()] = self._original.forward
        return measured(candidates, z)

    # ---- standing in for the wrapped decoder

    @property
    def training(self) -> bool:
        """The wrapped decoder's mode."""
        return bool(self._original.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_original" in vars(self):  # not yet while nn.Module sets itself up
            self._original.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in vars(self):  # a copy that is being made
                raise
            return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Attributes that a library sets to wrap this module's forward stay here; those that the wrapped forward reads
        # belong to the wrapped decoder.
        if name in _SHARED and "_original" in vars(self):  # a new container in the place of the one that both have
            setattr(self._original, name, value)
        stays = name.startswith("_") or name in ("forward", "training") or isinstance(value, (nn.Module, nn.Parameter))
        if stays or "_original" not in vars(self):
            super().__setattr__(name, value)
        else:
            setattr(self._original, name, value)
            vars(self)["_state"] = self._begin(self._original, self._options)  # programs were made with the old value

    def _replicate_for_data_parallel(self) -> Any:
        """Returns a plain decoder, which DataParallel gives weights on another GPU; the programs are of this one's."""
        return self._original._replicate_for_data_parallel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = [(decode, before) for decode in self._state.decodes.values() if (before := decode.weights())]
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for decode, before in moved:
            decode.carry(before)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> AcceleratedDecoder:
        twin = type(self)(copy.deepcopy(self._original, memo), self._options)
        memo[id(self)] = twin
        for name, value in self._hung_on():
            vars(twin)[name] = copy.deepcopy(value, memo)
        return twin

    def __reduce__(self) -> Any:
        return type(self), (self._original, self._options), dict(self._hung_on())

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def take(self, options: Options) -> None:
        """Decodes by other options from now on, with programs of their own."""
        vars(self).update(_options=options, _state=self._begin(self._original, options))

    def is_hung_on(self) -> bool:
        """Returns whether others set attributes on this module that the wrapped one does not have."""
        return any(True for _ in self._hung_on()) or vars(self).get(_COMPILED) is not None

    def _hung_on(self) -> Iterator[tuple[str, Any]]:
        """Lists attributes that others set on this module and not on the wrapped one; a copy gets them too."""
        for name, value in vars(self).items():
            if name not in (*_OWN, _COMPILED) and name not in _SHARED:
                yield name, value

    def _get_name(self) -> str:
        return f"Accelerated{type(self._original).__name__}"


def why_pytorch(original: nn.Module, z: Any, dims: int = 4) -> str:
    """Returns why a decoder has to compute latents of `dims` dimensions itself; empty where a program may."""
    if type(z) is not Tensor:  # a fake, functional or distributed tensor, a subclass: its own rules hold
        return "no plain tensor"
    shape = z.shape
    if len(shape) != dims or not shape[0] or z.dtype not in FLOATS or z.layout is not torch.strided:
        return "no batch of float latents"
    if not (z.is_cuda or z.is_cpu):  # meta tensors have shapes only
        return "neither on a GPU nor on the CPU"
    if original.training:
        return "train mode"
    if "forward" in vars(original):  # the wrapper would not see what was put there later
        return "the decoder's forward was replaced"
    if torch.is_grad_enabled() and (z.requires_grad or any(p.requires_grad for p in original.parameters())):
        return "gradients are wanted (decode under torch.no_grad() otherwise)"
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "a dispatch mode or function transform"
    if torch._C._len_torch_function_stack() and not all(  # `with torch.device(...)` only places new tensors
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a function mode"
    if forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return "differentiated forwards or traced"
    return "a CUDA graph is recorded" if capture.underway() else ""


def altered(module: nn.Module) -> bool:
    """Returns whether a module in it has a hook or a forward of its own, which would see each tile for itself."""
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules())


def without_hooks(original: nn.Module) -> nn.Module:
    """A module of the same class, members and attributes, with no hooks of its own and in eval mode.

    Hooks on the decoder itself run around whatever decodes; those within it would be lost in a program, and keep it
    from being compiled.
    """
    twin = object.__new__(type(original))
    fresh = {name: value for name, value in vars(nn.Module()).items() if "hooks" in name}
    vars(twin).update({**vars(original), **fresh, "training": False})
    return twin
