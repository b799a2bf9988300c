"""`VideoDecode`: latents in, frames out, by a compiled program where that works and by PyTorch where it does not.

Why a class: programs are per latent shape and live as long as the decode function; threads, forks and weight updates
happen meanwhile.

Usage:
    decode = VideoDecode(decoder, batch_size=8)
    frames = decode(latents)        # [b, n, c, h, w] -> [b, n, C, H, W] bf16, on the latents' device
    VideoDecode(decoder, batch_size=8, output="uint8")(latents)     # -> [b, n, H, W, C] uint8
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms import env
from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError, FastPathError
from owl_wms.ops.frame_bytes import compile_soon
from owl_wms.request import Request
from owl_wms.runtime import capture
from owl_wms.runtime.canary import Canary, parts
from owl_wms.runtime.decoding import Decoding
from owl_wms.runtime.eager import EagerDecoder, decode_with_gradients
from owl_wms.runtime.generation import Generation
from owl_wms.runtime.latents import check_video, check_video_shape
from owl_wms.runtime.obtain import obtain
from owl_wms.runtime.output import DTYPES, Output
from owl_wms.runtime.programs import Loaded, Progress, Toolchain, renew_locks
from owl_wms.runtime.slot import Slot
from owl_wms.runtime.stats import SWITCHED_OFF, DecodeStats, Ledger, summarise
from owl_wms.runtime.stopwatch import Stopwatch
from owl_wms.runtime.toolchain import TensorRT
from owl_wms.settings import TensorRTConfig
from owl_wms.vae.landscape import other_latent_size


class VideoDecode:
    """Decode video latents in static batches.

    Thread-safe. A last batch that is not full is padded for the program, and its frames are sliced. Each latent shape
    has its own program. If weights change in place, the programs made from the old ones are dropped. If a run of a
    program fails, PyTorch decodes that batch; after three failed runs the program is switched off. While a caller
    captures a CUDA graph, PyTorch decodes.

    Args:
        decoder: `[B, c, h, w] -> [B, C, H, W]`; never changed; computes on its own device.
        batch_size: frames at a time, >= 1; `settings.max_batch_size` caps it.
        settings: None reads the environment over the defaults.
        strict: True raises FastPathError instead of falling back; None follows `settings.fallback_on_error`.
        timing: record the milliseconds of every batch (CUDA events).
        output: `bf16`, or `uint8` for bytes as `owl_wms.ops.frame_bytes` makes them: channels last, [-1, 1] clamped and
            rounded to [0, 255].
        check: when to look for non-finite frames: `always`, `sampled` (first 8 calls, then every 64th), `off`, or
            `auto`: always in fp16 (which can overflow), sampled otherwise. Those of a program are compared with
            PyTorch's, which replace them; if PyTorch's are not finite either, one warning says so. `error` looks always
            and raises instead of warning. `canary`, or one of these with `+canary` (`error+canary`), also compares one
            frame of every 16,384 with PyTorch's; `canary` alone is `auto+canary`. If a frame misses the limits of the
            parity check, its program is switched off; on a GPU a later call, or `stats`, finds that out.
        toolchain: what builds programs; None means TensorRT.
        progress: receives build events.

    Raises:
        ConfigError: batch_size below 1, or an unknown check or output.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        batch_size: int,
        settings: TensorRTConfig | None = None,
        strict: bool | None = None,
        timing: bool = False,
        output: str = "bf16",
        check: str = "auto",
        toolchain: Toolchain | None = None,
        progress: Progress | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1; got {batch_size}", key="batch_size")
        self._search, compares = parts(check)
        if output not in DTYPES:
            raise ConfigError(f"output must be one of {', '.join(DTYPES)}; got {output!r}", key="output")
        self.decoder = decoder
        self.settings = TensorRTConfig.resolve() if settings is None else settings
        self.batch_size = min(batch_size, self.settings.max_batch_size)
        self.strict = not self.settings.fallback_on_error if strict is None else strict
        self.check = check
        self.output = output
        self.toolchain: Toolchain = TensorRT() if toolchain is None else toolchain
        self._progress = progress
        self._timing = timing
        self._stopwatch = Stopwatch() if timing else None
        self._ledger = Ledger()
        self._canary = Canary(output, self._ledger, self._rebuild) if compares else None
        self._guard = threading.Lock()
        self._generation: Generation | None = None
        self._forked = False
        _LIVE.add(self)

    @uncompiled
    def __call__(self, x: Tensor) -> Tensor:
        """Decode latents `x` `[b, n, c, h, w]`, any real dtype, strides or device; zero frames allowed.

        If `x` asks for a gradient and gradients are on, PyTorch decodes and the bf16 frames have one; otherwise no
        graph is recorded. Bytes have no gradient.

        Returns:
            `[b, n, C, H, W]` bf16, or `[b, n, H, W, C]` uint8 if `output` says so, on the latents' device (computed on
            the decoder's).

        Raises:
            LatentShapeError: wrong rank or channel count.
            DataError: no tensor, or not a dense one of real numbers.
            DecodeMemoryError: the output or a single frame does not fit into memory.
            NonFiniteError: PyTorch's frames have NaN or infinity in them, and `check` is `error`.
            FastPathError: in strict mode, or in a process forked from one that used the GPU.
        """
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() and self.output == "bf16":
            eager = self._current().eager
            check_video(x, eager.channels)
            frames = decode_with_gradients(eager, self.decoder, x.reshape(-1, *x.shape[2:]), self.batch_size)
            self._ledger.add("chunks_pytorch", -(-len(frames) // self.batch_size))
            self._ledger.add("decodes")
            self._ledger.add("frames", len(frames))
            return frames.to(x.device, torch.bfloat16).reshape(*x.shape[:2], *frames.shape[1:])
        with torch.no_grad():
            return self._frames(x)

    def _frames(self, latents: Tensor) -> Tensor:
        generation = self._current()
        eager = generation.eager
        check_video(latents, eager.channels)
        device = latents.device if eager.device is None else eager.device
        leading, one = latents.shape[:2], tuple(latents.shape[2:])
        frames = latents.reshape(-1, *one)
        slot = self._slot(generation, one, device)
        out = Output(self.output, len(frames), latents.device, one)
        if len(frames) == 0:
            shape = generation.frame_shapes.get(one) or tuple(eager(latents.new_zeros((1, *one))).shape[1:])
            generation.frame_shapes[one] = shape
            out.allocate(shape)
        else:
            self._decode(eager, slot, frames, out, device)
            generation.frame_shapes[one] = out.frame_shape
        self._ledger.add("decodes")
        self._ledger.add("frames", len(frames))
        return out.tensor.reshape(*leading, *out.tensor.shape[1:])

    @uncompiled
    def prepare(self, latent_shape: tuple[int, int, int]) -> DecodeStats:
        """Finds or builds the program for latents `(c, h, w)` now, at start-up for example, and waits for it, also if
        `settings.build` is `background`. Returns the state after it.

        Raises:
            LatentShapeError: a shape that the decoder cannot take, before anything is built for it.
            FastPathError: in strict mode.
        """
        generation = self._current()
        check_video_shape((1, 1, *latent_shape), generation.eager.channels)
        device = torch.device("cpu") if generation.eager.device is None else generation.eager.device
        self._ready(generation.eager, self._slot(generation, latent_shape, device), wait=True)
        return self.stats()

    @property
    def device(self) -> torch.device | None:
        """The device that it computes on; None for a decoder without weights, which computes where the latents are."""
        return self._current().eager.device

    def stats(self) -> DecodeStats:
        """Returns the counters so far. Waits for timed batches and comparisons that still run; otherwise free."""
        self._read_canary(wait=True)
        generation = self._generation
        return summarise(
            self._ledger,
            [] if generation is None else generation.slots(),
            toolchain=self.toolchain.name,
            enabled=self.settings.enabled,
            latency_ms=None if self._stopwatch is None else self._stopwatch.percentiles(),
        )

    # ---- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> VideoDecode:
        """Returns a decode function of the copied decoder, which obtains its programs anew (from the cache)."""
        return self._made_anew()(copy.deepcopy(self.decoder, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made_anew(), (self.decoder,)

    def _made_anew(self) -> Callable[[nn.Module], VideoDecode]:
        return functools.partial(
            VideoDecode,
            batch_size=self.batch_size,
            settings=self.settings,
            strict=self.strict,
            timing=self._timing,
            output=self.output,
            check=self.check,
            toolchain=self.toolchain,
            progress=self._progress,
        )

    # ---- one decode

    def _decode(self, eager: EagerDecoder, slot: Slot, frames: Tensor, out: Output, device: torch.device) -> None:
        self._read_canary(wait=False)
        ready = self._ready(eager, slot)
        # While a caller captures a CUDA graph nothing can be waited for, and looking at values waits.
        looked = slot.wants_check(self._search, eager.dtype) and not capture.underway()
        decoding = Decoding(
            eager, slot, out, ledger=self._ledger, strict=self.strict, looked=looked, rebuild=self._rebuild
        )
        starts = range(0, len(frames), self.batch_size)

        def batch_at(start: int) -> Tensor:
            return frames[start : start + self.batch_size].to(device)

        for start in starts:
            batch = batch_at(start)
            with contextlib.nullcontext() if self._stopwatch is None else self._stopwatch.measure(device):
                decoding.decode(batch, start, by_program=ready)
        for start in decoding.not_finite(batch_at):
            count = min(self.batch_size, len(frames) - start)
            self._ledger.add("non_finite", count)
            subject, error = f"frames {start} to {start + count - 1} have", self._search == "error"
            self._ledger.non_finite(subject, "non-finite frames", eager.dtype, first=start, raised=error)
        if ready and self._compare_one(eager, slot, frames, out):
            if self.strict and slot.failure is not None:
                raise slot.failure.again()
            for start in starts:
                decoding.decode(batch_at(start), start, by_program=False)

    def _compare_one(self, eager: EagerDecoder, slot: Slot, frames: Tensor, out: Output) -> bool:
        """Begins to compare one of these frames with PyTorch's if it is time; returns whether one is known as wrong."""
        if self._canary is None or capture.underway():
            return False
        place = self._canary.due(len(frames))
        if place is not None:
            self._canary.begin(eager, slot, frames[place : place + 1], out.tensor[place])
        return place is not None and self._read_canary(wait=False)

    def _read_canary(self, *, wait: bool) -> bool:
        if self._canary is None or capture.underway():
            return False
        return self._canary.read(lambda eager: eager.stamp.matches(self.decoder), wait=wait)

    def _rebuild(self, slot: Slot) -> str:
        """Returns what a user does about a program that fails when it runs."""
        if slot.loaded is None or slot.loaded.not_kept:
            return "start again, which builds the program anew, or choose another TENSORRT_PRECISION"
        # `trt build` alone would find the entry in the cache and load the same program.
        folder = self.settings.cache_directory() / slot.loaded.name
        return f"delete {folder}, then run owl-wms trt build, or choose another TENSORRT_PRECISION"

    # ---- state

    def _current(self) -> Generation:
        """Returns the Generation for the decoder's current weights, and makes a new one if they changed. A decode calls
        this once and uses that Generation to its end.
        """
        if self._forked:
            run_in_child(None if self._generation is None else self._generation.eager.device, "decode function")
        if capture.underway():
            return self._while_capturing()
        generation = self._generation
        if generation is not None and generation.eager.stamp.matches(self.decoder):
            return generation
        with self._guard:
            generation = self._generation
            if generation is not None and generation.eager.stamp.matches(self.decoder):
                return generation
            holds = generation is not None and generation.has_programs()
            if generation is not None:
                self._ledger.note("weights", "the decoder's weights changed; programs of the old ones are dropped")
            generation = self._generation = Generation(self.decoder)
        if holds:
            free_programs()
        return generation

    def _slot(self, generation: Generation, one: tuple[int, ...], device: torch.device) -> Slot:
        shape = (self.batch_size, *one)
        slot = generation.slot(one, device, lambda: Request.of(self.settings, shape, str(device)))
        if slot.state == "new":
            remark = other_latent_size(getattr(self.decoder, "config", None), *one[1:])
            if remark is not None:
                self._ledger.note(f"size {one}", remark)
        if slot.state == "new" and not self.settings.enabled:
            slot.switch_off(SWITCHED_OFF)
        elif slot.state == "new" and self._forked:
            reason = "this process was forked after the decode function was made"
            slot.switch_off(reason, FastPathError("run", reason, "make the decode function inside the worker"))
        elif slot.state == "new" and capture.underway():
            slot.switch_off("a CUDA graph is being recorded")
        return slot

    def _ready(self, eager: EagerDecoder, slot: Slot, wait: bool = False) -> bool:
        """Returns whether the slot has a program; obtains it on the first call, in the background if the settings say
        so, and then returns False while it is built, unless told to wait. Otherwise other threads wait here meanwhile.
        """
        return obtain(
            slot,
            lambda progress: self._find(eager, slot, progress),
            self._ledger,
            strict=self.strict,
            progress=self._progress,
            background=self.settings.build == "background" and self.toolchain.background,
            wait=wait,
        )

    def _find(self, eager: EagerDecoder, slot: Slot, progress: Progress | None) -> Loaded:
        if self.output == "uint8" and eager.device is not None:  # while the program is read or built
            compile_soon(eager.dtype, getattr(eager.module, "out_channels", 3), eager.device)
        eager.raise_hindrance()
        return self.toolchain.obtain(eager.module, slot.request, self.settings, progress)

    def _while_capturing(self) -> Generation:
        """Returns a Generation without programs, for this call only. It must not be reused: weights folded during a
        capture get their values when the graph is replayed, not before.
        """
        if self.strict and self.settings.enabled:
            raise FastPathError("run", "a CUDA graph is being recorded around it", "decode outside of the graph")
        self._ledger.note("recording", "PyTorch decodes inside a CUDA graph that the caller records")
        return Generation(self.decoder)

    def _reset_in_child(self) -> None:
        _ABANDONED.append(self._stopwatch)  # its events belong to the parent's GPU too
        self._guard = threading.Lock()
        self._ledger = Ledger()
        self._stopwatch = None if self._stopwatch is None else Stopwatch()
        _ABANDONED.append(self._canary)
        self._canary = None if self._canary is None else Canary(self.output, self._ledger, self._rebuild)
        if self._generation is not None:
            _ABANDONED.extend(self._generation.forget_programs())
        self._forked = True


def free_programs() -> None:
    """Gives the memory of programs back that nothing refers to any more.

    The graph of a program and its module refer to each other, so its weights would stay on the GPU, beside those of the
    next program, until Python looks for such circles by itself.
    """
    gc.collect()


def run_in_child(device: torch.device | None, name: str) -> None:
    """Prepare a forked child to decode: without the parent's thread pool, which does not exist here.

    Args:
        device: of the decoder.
        name: of the object that decodes, for the message.

    Raises:
        FastPathError: the device is a GPU, which a process that was forked from its user cannot use.
    """
    if device is not None and device.type == "cuda":
        raise FastPathError(
            "run",
            "this process was forked from one that used the GPU, where CUDA does not work",
            f"start workers with the spawn method, or make the {name} inside the worker",
        )
    torch.set_num_threads(1)  # OpenMP's worker threads were not forked; waiting for them would never end


_LIVE: weakref.WeakSet[VideoDecode] = weakref.WeakSet()
# Objects that a forked child may neither use nor destroy: an engine's destructor aborts a process that has no GPU. That
# ended the data loading of a training run.
_ABANDONED: list[Any] = []


def _forget_in_child() -> None:
    gc.freeze()  # the parent's garbage may hold engines as well; the child must not collect it
    renew_locks()
    for decode in list(_LIVE):
        decode._reset_in_child()


env.after_fork(_forget_in_child)
