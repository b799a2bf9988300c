"""Compares one frame of many with PyTorch's while a program is in use (`check="canary"`).

Why it exists: the parity check and the recorded output show that a program was right when it was built and when it was
loaded. A GPU whose memory loses a bit, or a driver that begins to fail, gives finite and wrong frames after that.
PyTorch computes from weights of its own, so one of its frames now and then shows it.

On a GPU the comparison runs on a stream of its own, and a later call reads the result. On a CPU it runs in the call.

`owl_wms.runtime.verdict` decides whether a frame is wrong.

Usage:
    canary = Canary("bf16", ledger, rebuild)
    place = canary.due(len(frames))             # None most of the time
    canary.begin(eager, slot, latents[place : place + 1], out.tensor[place])
    missed = canary.read(still_the_same, wait=False)
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from owl_wms.errors import ConfigError, FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.runtime.eager import EagerDecoder, release_memory
from owl_wms.runtime.output import Output
from owl_wms.runtime.programs import Loaded
from owl_wms.runtime.slot import Slot
from owl_wms.runtime.stats import Ledger
from owl_wms.runtime.verdict import OwnError, distance, judge, values, within

CHECKS = ("auto", "always", "sampled", "off", "error")
"""When to look for values that are not finite."""
UNATTENDED = "error+canary"
"""The `check` of a long job that nobody watches: stop at values that are not finite, and compare frames."""
EVERY = 16384
"""Frames per comparison. PyTorch takes about as long for one frame as a program takes for 32 (`dist`, H200: some 10 ms
and 0.33 ms per frame at batch 8), so one comparison in 500 x 32 frames costs 0.2 %. Measured there: 0.11 to 0.17 %,
with one comparison in `FP32_EVERY` that fp32 decides and that takes 107 ms. `python -m benchmarks.canary` measures it.
At 20 frames per second that is one in 14 minutes.
"""


def parts(check: str) -> tuple[str, bool]:
    """Returns the search for values that are not finite, and whether frames are compared.

    `check` is one of `CHECKS`, `canary`, or one of `CHECKS` and `+canary`; `canary` alone means `auto+canary`.

    Raises:
        ConfigError: anything else.
    """
    search = "auto" if check == "canary" else check.removesuffix("+canary")
    if search not in CHECKS:
        known = ", ".join(CHECKS)
        raise ConfigError(
            f"check must be one of {known}, canary, or one of them with +canary; got {check!r}", key="check"
        )
    return search, check.endswith("canary")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """One that was begun. `measured` is filled once `done` has happened; None for `done` means that it has."""

    eager: EagerDecoder
    slot: Slot
    report: Mapping[str, Any]
    latents: Tensor
    frame: Tensor
    truth: Tensor
    measured: Tensor
    done: torch.cuda.Event | None


class Canary:
    """Chooses frames and compares them; one comparison is under way at most. Thread-safe.

    Args:
        kind: of the frames, `bf16` or `uint8`.
        ledger: counts comparisons and misses, and warns once.
        rebuild: returns the remedy for a program that fails when it runs.
    """

    def __init__(self, kind: str, ledger: Ledger, rebuild: Callable[[Slot], str]) -> None:
        self._kind, self._ledger, self._rebuild = kind, ledger, rebuild
        self._guard = threading.Lock()
        self._seen, self._next = 0, EVERY
        self._begun: _Comparison | None = None
        self._at_once = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._own: weakref.WeakKeyDictionary[EagerDecoder, OwnError] = weakref.WeakKeyDictionary()

    def due(self, count: int) -> int | None:
        """Returns which of the next `count` frames is compared, another place each time; None for none of them."""
        with self._guard:
            self._seen += count
            if self._seen < self._next or self._begun is not None:
                return None
            self._next = self._seen + EVERY
            return self._seen % count

    def begin(self, eager: EagerDecoder, slot: Slot, latents: Tensor, frame: Tensor) -> None:
        """Begins to compare `frame`, as the decode function returns it, with PyTorch's of latents `[1, c, h, w]`.

        Both are copied, so the caller may change them afterwards. Waits for nothing on a GPU. Raises nothing: if the
        comparison fails, for want of memory say, one warning says so.
        """
        device, loaded = frame.device if eager.device is None else eager.device, slot.loaded
        if loaded is None:  # switched off meanwhile
            return
        try:
            begun = self._begun_on(device, eager, slot, loaded, latents, frame)
        except Exception as error:
            raise_interrupt(error)
            release_memory(device)
            self._ledger.warn("canary", f"no frame could be compared with PyTorch's: {type(error).__name__}: {error}")
            return
        with self._guard:
            self._begun = begun

    def read(self, still: Callable[[EagerDecoder], bool], *, wait: bool) -> bool:
        """Returns whether the comparison that was begun is done and shows a wrong frame, whose program is then off.

        Args:
            still: whether the decoder's weights are still those of this PyTorch decoder. If they have changed meanwhile
                the comparison is dropped, and the next call begins another, which it waits for.
            wait: for the GPU.
        """
        with self._guard:
            begun = self._begun
            if begun is None or not (wait or self._at_once or begun.done is None or begun.done.query()):
                return False
            self._begun = None
            if begun.done is not None:
                begun.done.synchronize()
            self._at_once = not still(begun.eager)
            if self._at_once:
                self._next = self._seen
                return False
        self._ledger.add("canaries")
        measured, own = begun.measured.tolist(), self._own.get(begun.eager, OwnError())
        if within(measured, begun.report, self._kind):
            return False
        if own.left > 0 and within(measured, begun.report, self._kind, own):
            own.left -= 1
            return False
        problem, own = judge(begun.eager, begun.report, begun.latents, begun.frame, self._kind, begun.truth)
        if not problem:
            self._own[begun.eager] = own
            return False
        self._ledger.add("canary_misses")
        reason = f"a frame of the program is wrong: {problem}"
        remedy = f"start the process again, which verifies the program; if it comes back, {self._rebuild(begun.slot)}"
        failure = FastPathError("run", reason, remedy)
        begun.slot.switch_off(f"switched off: {reason}", failure)
        self._ledger.failure(failure, "canary miss")
        return True

    def _begun_on(
        self, device: torch.device, eager: EagerDecoder, slot: Slot, loaded: Loaded, latents: Tensor, frame: Tensor
    ) -> _Comparison:
        latents, frame = latents.to(device, copy=True), frame.to(device, copy=True)
        with self._beside(device) as stream:
            truth = Output(self._kind, 1, device, tuple(latents.shape[1:]))
            truth.write(0, eager(latents))
            measured = distance(values(frame, self._kind), values(truth.tensor[0], self._kind))
            done = None
            if stream is not None:
                measured = measured.to("cpu", non_blocking=True)
                done = stream.record_event()
        return _Comparison(
            eager=eager,
            slot=slot,
            report=loaded.report,
            latents=latents,
            frame=frame,
            truth=truth.tensor[0],
            measured=measured,
            done=done,
        )

    @contextlib.contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """Runs the block on the canary's own stream of a GPU, after the work so far; as it is on a CPU."""
        with torch.no_grad():
            if device.type != "cuda":
                yield None
                return
            with torch.cuda.device(device):
                stream = self._streams.setdefault(device, torch.cuda.Stream(device))
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    yield stream
