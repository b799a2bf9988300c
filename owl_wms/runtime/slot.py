"""The program of one latent shape and its state: new, building, ready or off.

Why: one state per shape keeps one shape's failure from slowing the others. One lock per program keeps threads and
streams apart, because two runs at once would share the scratch memory of one TensorRT execution context.

Usage:
    slot = Slot(request)
    slot.accept(loaded)                          # of Toolchain.obtain
    finite = slot.run(z, write, check=True)      # write([k, C, H, W]) is called before another thread may run it
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms.device_order import DeviceOrder
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.runtime.programs import Loaded
from owl_wms.state import KeptState, State

STRIKES = 3
"""Failed runs after which a program is switched off."""
REST_SECONDS = 10.0
"""If a caller's time limit ended a build, PyTorch decodes for this long: the limit would end the next build too."""
CHECKED_CALLS, CHECK_EVERY = 8, 64
"""Sampled output check: the first calls, then every so many."""


class Slot:
    """Program state for one `Request`.

    Attributes:
        state: `new`, `building` (in the background), `ready` or `off`.
        reason: why it is off, or where the program came from.
        search: the thread that finds or builds the program in the background.
        failure: raised to a strict caller at every call while it is off; None if it was switched off by choice.
        failures: run failures so far.
        eager_step: chunk size of the PyTorch path, smaller after memory ran out.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._order = DeviceOrder()
        self.lock = self._order.lock
        self.state = "new"
        self.reason = ""
        self.failure: FastPathError | None = None
        self.loaded: Loaded | None = None
        self.search: threading.Thread | None = None
        self.failures = 0
        self.eager_step = request.input_shape[0]
        self._calls = 0
        self._rest_until = self._began = 0.0

    def begin(self, start: Callable[[], threading.Thread]) -> None:
        """Start a search for the program in a thread."""
        self.state, self._began = "building", time.monotonic()
        self.search = start()

    def describe(self) -> str:
        """Returns the reason, or how long the program has been in the making."""
        if self.state == "building":
            return f"building (PyTorch meanwhile) for {time.monotonic() - self._began:.1f} s"
        return self.reason

    def accept(self, loaded: Loaded) -> None:
        """Put a program in place."""
        self.loaded, self.state = loaded, "ready"
        self.reason = f"{'built' if loaded.built else 'cached'} program {loaded.name}"

    def switch_off(self, reason: str, failure: FastPathError | None = None) -> None:
        """Drop the program for good."""
        self.failure = None if failure is None else failure.again()
        self.loaded, self.state, self.reason = None, "off", reason

    def rest(self) -> None:
        """Begins no other search for `REST_SECONDS`, after an exception of the caller's ended one."""
        self._rest_until = time.monotonic() + REST_SECONDS
        self.reason = "an exception of the caller's ended the search for a program, which begins again in a while"

    def rested(self) -> bool:
        """Returns whether `REST_SECONDS` have passed since `rest`."""
        return time.monotonic() >= self._rest_until

    def strike(self, failure: FastPathError) -> None:
        """Count a failed run; the third switches the program off."""
        with self.lock:
            self.failures += 1
            if self.failures >= STRIKES:
                reason = f"it was switched off after {STRIKES} failed runs, the last with {failure.reason}"
                self.switch_off(reason, FastPathError(failure.stage, reason, failure.remedy))

    def wants_check(self, mode: str, dtype: torch.dtype | None) -> bool:
        """Returns whether to look at this call's output; counts the call. `dtype`: PyTorch's where no program is."""
        with self.lock:
            self._calls += 1
            calls = self._calls
        fp16 = dtype == torch.float16 if self.loaded is None else self.loaded.report.get("precision") == "fp16"
        return looks(mode, calls, fp16=fp16)

    def step(self, z: Tensor, state: State, check: bool) -> tuple[Tensor, State, Tensor | None]:
        """Run one step of a streaming decoder's program.

        Returns:
            Frames and the next state in the program's dtype, and whether all values of both are finite, as `run` does.
        """
        with self._order.turn(z.device):
            if self.loaded is None:
                raise RuntimeError("the program was switched off by another thread")
            in_place = getattr(self.loaded.program, "step_in_place", None)
            if in_place is None:
                frames, *rest = self.loaded.program(z, *state)
                following: State = tuple(rest)
            else:
                frames, following = in_place(z, state)
            if not check:
                return frames, following, None
            seen = following.in_place() if isinstance(following, KeptState) else following
            return frames, following, torch.stack([all_finite(tensor) for tensor in (frames, *seen)]).all()

    def run(self, z: Tensor, write: Callable[[Tensor], None], check: bool) -> Tensor | None:
        """Run the program on `[k <= B, c, h, w]` and hand `[k, C, H, W]` to `write` before anyone else may run it.

        Returns:
            A scalar bool tensor on the device (are all values finite), or None when not asked to check.
        """
        with self._order.turn(z.device):
            if self.loaded is None:
                raise RuntimeError("the program was switched off by another thread")
            missing = self.request.input_shape[0] - len(z)
            frames = self.loaded.program(F.pad(z, (0,) * 7 + (missing,)) if missing else z)
            if missing:
                frames = frames[: len(z)]
            if len(frames) != len(z):
                raise RuntimeError(f"the program answered {len(frames)} frames to {len(z)} latents")
            write(frames)
            return all_finite(frames) if check else None


def looks(mode: str, call: int, *, fp16: bool) -> bool:
    """Returns whether a search of this mode (one of `canary.CHECKS`) looks at the output of call 1, 2, ..."""
    if mode == "auto":
        # fp16 overflows depending on the latents, so only looking at every output can rule it out.
        mode = "always" if fp16 else "sampled"
    if mode == "sampled":
        return call <= CHECKED_CALLS or call % CHECK_EVERY == 0
    return mode in ("always", "error")


def all_finite(frames: Tensor) -> Tensor:
    """Scalar bool tensor; one reduction without a mask of the frames' size (min and max propagate NaN)."""
    low, high = torch.aminmax(frames)
    return torch.isfinite(low) & torch.isfinite(high)
