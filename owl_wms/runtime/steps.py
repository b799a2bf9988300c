"""Steps of a streaming decoder by a compiled program where that works, and by PyTorch where it does not.

Why apart from `StreamDecode`: a stream and its forks differ in their states and share everything else.

Usage:
    steps = Steps(decoder, settings=TensorRTConfig.resolve())
    frames, state = steps.run(latent, state)        # () is the beginning of a video
"""

from __future__ import annotations

import os
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from owl_wms.errors import ConfigError, DecodeMemoryError, FastPathError
from owl_wms.memory import is_out_of_memory
from owl_wms.request import Request
from owl_wms.runtime import capture
from owl_wms.runtime.canary import CHECKS
from owl_wms.runtime.decode import free_programs, run_in_child
from owl_wms.runtime.decoding import count_failure, non_finite_failure, run_failure
from owl_wms.runtime.eager import EagerDecoder, release_memory, unwrap
from owl_wms.runtime.obtain import obtain
from owl_wms.runtime.programs import Loaded, Progress, Toolchain
from owl_wms.runtime.slot import Slot, all_finite, looks
from owl_wms.runtime.stats import SWITCHED_OFF, DecodeStats, Ledger, summarise
from owl_wms.runtime.toolchain import TensorRT
from owl_wms.settings import TensorRTConfig
from owl_wms.state import State, zeros
from owl_wms.vae.stepping import Stepping

_ABANDONED: list[Any] = []  # programs in a forked child, where their destructors would end the process


def streams(decoder: nn.Module) -> bool:
    """Returns whether `decoder` has a state: whether it is one for StreamDecode."""
    return hasattr(unwrap(decoder), "state_specs")


def frames_per_latent(decoder: nn.Module) -> int:
    """Returns how many frames one latent becomes: 1 unless the decoder says another number."""
    return int(getattr(unwrap(decoder), "frames_per_latent", 1))


def frames_of(decoder: nn.Module, latents: int) -> int:
    """Returns how many frames a video of so many latents has: the first latent of a stream gives one."""
    return max(0, (latents - 1) * frames_per_latent(decoder) + 1)


class Steps:
    """Runs steps; arguments and errors are those of `StreamDecode`.

    Attributes:
        channels: of the latents, None when the decoder does not say.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        settings: TensorRTConfig,
        strict: bool | None = None,
        check: str = "auto",
        toolchain: Toolchain | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not streams(decoder):
            raise ConfigError(
                f"StreamDecode wants a decoder with a state, and {type(unwrap(decoder)).__name__} has none; decode it "
                "with owl_wms.runtime.VideoDecode"
            )
        if check not in CHECKS:  # nor canary: a frame alone cannot be decoded again, it needs the state before
            raise ConfigError(f"check must be one of {', '.join(CHECKS)}; got {check!r}", key="check")
        self.decoder = decoder
        self.settings = settings
        self.strict = not settings.fallback_on_error if strict is None else strict
        self.check = check
        self.toolchain: Toolchain = TensorRT() if toolchain is None else toolchain
        self._progress = progress
        self._ledger = Ledger()
        self._guard = threading.Lock()
        self._process = os.getpid()
        self._weights = 1
        self._calls = 0
        self._eager: EagerDecoder
        self._take_weights()
        self.channels = self._eager.channels

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that others of this kind are made with, without the decoder."""
        return {
            "settings": self.settings,
            "strict": self.strict,
            "check": self.check,
            "toolchain": self.toolchain,
            "progress": self._progress,
        }

    @property
    def device(self) -> torch.device | None:
        """The decoder's device; None without weights."""
        return self._eager.device

    def follow_weights(self) -> int:
        """Returns a number that is another one whenever the weights have changed; programs of old ones are dropped.

        Where changes do not show (`stamp.unseen`) the number stays, for streams have to go on; each step computes with
        the weights as they are then.
        """
        if os.getpid() != self._process:
            self._after_fork()
        with self._guard:
            if self._eager.stamp.matches(self.decoder):
                return self._weights
            if self._eager.stamp.blind:
                eager = EagerDecoder(self.decoder)
                if eager.stamp.blind:
                    self._eager, self._stepping = eager, Stepping(eager.module)
                    return self._weights
            holds = any(slot.loaded is not None for slot in self._slots.values())
            self._weights += 1
            self._take_weights()
            weights = self._weights
        if holds:
            free_programs()
        return weights

    def run(self, latent: Tensor, state: State) -> tuple[Tensor, State]:
        """Decodes one latent `[b, c, h, w]` of each stream: frames in the decoder's dtype on its device, next state."""
        eager = self._eager
        latent = latent.to(device=eager.device, dtype=latent.dtype if latent.is_floating_point() else torch.float32)
        specs = cast(Any, eager.module).state_specs(tuple(latent.shape))
        state = state or zeros(specs, latent.device)
        slot = self._slot(tuple(latent.shape), latent.device, tuple(spec.shape for spec in specs))
        done = self._by_program(eager, slot, latent, state) if self._ready(slot) else None
        frames, state = done or self._by_pytorch(eager, latent, state)
        if done is None and self._wants_check(eager.dtype) and not bool(all_finite(frames)):
            self._report_non_finite(frames, eager.dtype)
        self._ledger.add("decodes")
        self._ledger.add("frames", frames.shape[0] * frames.shape[1])
        return frames.to(eager.dtype or frames.dtype), state

    def _wants_check(self, dtype: torch.dtype | None) -> bool:
        """Returns whether to look at the values of a step that PyTorch made; counts it."""
        self._calls += 1
        return looks(self.check, self._calls, fp16=dtype == torch.float16) and not capture.underway()

    def _report_non_finite(self, frames: Tensor, dtype: torch.dtype | None) -> None:
        """Warns once, or raises, about frames `[b, k, ...]` of PyTorch that are not finite."""
        first, error = self._ledger.count("frames"), self.check == "error"
        self._ledger.add("non_finite", frames.shape[0] * frames.shape[1])
        self._ledger.non_finite(f"frames from {first} on have", "non-finite frames", dtype, first=first, raised=error)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Finds or builds the program for latents `(b, c, h, w)`, and waits for it."""
        self._ready(self._slot_for(shape), wait=True)

    def has_program(self, shape: tuple[int, ...]) -> bool:
        """Returns whether latents `(b, c, h, w)` have a program; finds or builds it as the settings say."""
        return self._ready(self._slot_for(shape))

    def state(self, shape: tuple[int, ...]) -> str:
        """Returns the state of the program for latents `(b, c, h, w)`, "new" if it was never asked for."""
        return self._slot_for(shape).state

    def _slot_for(self, shape: tuple[int, ...]) -> Slot:
        specs = cast(Any, self._eager.module).state_specs(shape)
        return self._slot(shape, self._eager.device or torch.device("cpu"), tuple(spec.shape for spec in specs))

    def stats(self) -> DecodeStats:
        """Returns counts of what happened so far."""
        return summarise(
            self._ledger,
            list(self._slots.values()),
            toolchain=self.toolchain.name,
            enabled=self.settings.enabled,
            latency_ms=None,
        )

    # ---- the two ways

    def _by_pytorch(self, eager: EagerDecoder, latent: Tensor, state: State) -> tuple[Tensor, State]:
        z = latent.to(eager.dtype or latent.dtype)
        try:
            with torch.autocast(z.device.type, enabled=False):
                frames, following = cast(Any, eager.module).step(z, tuple(tensor.to(z.dtype) for tensor in state))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            text = f"a step of {len(z)} streams of latents {list(z.shape[1:])} needs more memory than is free"
            raise DecodeMemoryError(
                f"{text}: {str(error).splitlines()[0]}. Free memory on the device or decode fewer streams at once",
                frames=len(z),
                latent_shape=tuple(z.shape[1:]),
            ) from None
        self._ledger.add("chunks_pytorch")
        return frames, following

    def _by_program(self, eager: EagerDecoder, slot: Slot, latent: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Runs the program; None if PyTorch has to make the step, for which `state` is unchanged."""
        try:
            frames, following, found = slot.step(latent, state, slot.wants_check(self.check, eager.dtype))
            finite = found is None or bool(found)
        except Exception as error:  # whatever TensorRT or CUDA raised, PyTorch makes this step
            failure, memory = run_failure(error, lambda: "build the program anew, or choose another TENSORRT_PRECISION")
        else:
            if finite:
                self._ledger.add("chunks_program")
                return frames, following
            truth = self._by_pytorch(eager, latent, state)
            places = sum(
                int((wanted.isfinite() & ~got.isfinite()).sum())
                for wanted, got in zip((truth[0], *truth[1]), (frames, *following), strict=True)
            )
            if not bool(all_finite(truth[0])):
                self._report_non_finite(truth[0], eager.dtype)
            if places:
                self._failed(slot, non_finite_failure(slot, places), "non-finite")
            return truth
        if memory:
            release_memory(latent.device)
        self._failed(slot, failure, "out of memory" if memory else "run")
        return None

    def _failed(self, slot: Slot, failure: FastPathError, kind: str) -> None:
        self._ledger.add("fallbacks")
        count_failure(slot, self._ledger, failure, kind, strict=self.strict)

    # ---- programs

    def _slot(self, shape: tuple[int, ...], device: torch.device, state: tuple[tuple[int, ...], ...]) -> Slot:
        with self._guard:
            slot = self._slots.get((shape, device))
            if slot is None:
                slot = self._slots[shape, device] = Slot(Request.of(self.settings, shape, str(device), state))
                if not self.settings.enabled:
                    slot.switch_off(SWITCHED_OFF)
        return slot

    def _ready(self, slot: Slot, wait: bool = False) -> bool:
        if capture.underway():  # a caller's CUDA graph captures PyTorch's step
            return False
        eager, stepping = self._eager, self._stepping  # new weights may come while it is built

        def find(progress: Progress | None) -> Loaded:
            eager.raise_hindrance()
            return self.toolchain.obtain(stepping, slot.request, self.settings, progress)

        return obtain(
            slot,
            find,
            self._ledger,
            strict=self.strict,
            progress=self._progress,
            background=self.settings.build == "background" and self.toolchain.background,
            wait=wait,
        )

    def _take_weights(self) -> None:
        self._eager = EagerDecoder(self.decoder)
        self._stepping = Stepping(self._eager.module)
        self._slots: dict[tuple[tuple[int, ...], torch.device], Slot] = {}

    def _after_fork(self) -> None:
        """In a forked child: locks may be held by threads that do not exist here, and CUDA does not work."""
        run_in_child(self._eager.device, "StreamDecode")
        _ABANDONED.append(self._slots)
        self._process, self._guard, self._ledger = os.getpid(), threading.Lock(), Ledger()
        self._take_weights()
