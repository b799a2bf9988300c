"""Compares one frame of many with PyTorch's while a program is in use (`check="canary"`).

Why it exists: the parity check and the recorded output show that a program was right when it was built and when it was
loaded. A GPU whose memory loses a bit, or a driver that begins to fail, gives finite and wrong frames after that.
PyTorch computes from weights of its own, so one of its frames now and then shows it.

On a GPU the comparison runs on a stream of its own, and a later call reads the result. On a CPU it runs in the call.

The rule has two steps. A frame whose distance from PyTorch's is within the limits of the program's parity check is
right. For any other frame the parity check itself decides, on these latents: fp32 decodes them too, and PyTorch's own
error sets the limits. So latents that are harder than the build's do not look like a fault.

Usage:
    canary = Canary("bf16", ledger, rebuild)
    place = canary.due(len(frames))             # None most of the time
    canary.begin(eager, slot, latents[place : place + 1], out.tensor[place])
    missed = canary.read(still_the_same, wait=False)
"""

from __future__ import annotations

import contextlib
import copy
import threading
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
from owl_wms.trt.check.parity import PSNR_GATE_DB, Reference, errors

CHECKS = ("auto", "always", "sampled", "off", "error")
"""When to look for values that are not finite."""
UNATTENDED = "error+canary"
"""The `check` of a long job that nobody watches: stop at values that are not finite, and compare frames."""
EVERY = 16384
"""Frames per comparison. PyTorch takes about as long for one frame as a program takes for 32 (`dist`, H200: some 10 ms
and 0.33 ms per frame at batch 8), so one comparison in 500 x 32 frames costs 0.2 %. Where fp32 has to decide each time
(an fp16 program of a bf16 decoder) a comparison takes 106 ms, and the cost is 1.9 %. `python -m benchmarks.canary`
measures it. At 20 frames per second that is one in 14 minutes.
"""
EIGHT_BIT_MARGIN_DB = 6.0
"""fp8 and int8 are calibrated for latents of scale 1. A caller's may be others: twice the rms error is allowed."""
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        if within(begun.measured.tolist(), begun.report, self._kind):
            return False
        problem = judge(begun.eager, begun.report, begun.latents, begun.frame, self._kind)
        if not problem:
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
            measured = _distance(_values(frame, self._kind), _values(truth.tensor[0], self._kind))
            done = None
            if stream is not None:
                measured = measured.to("cpu", non_blocking=True)
                done = stream.record_event()
        return _Comparison(
            eager=eager, slot=slot, report=loaded.report, latents=latents, frame=frame, measured=measured, done=done
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


def within(measured: list[float], report: Mapping[str, Any], kind: str) -> bool:
    """Returns whether a frame is so near to PyTorch's that it is right.

    Args:
        measured: as `_distance` gives it.
        report: of the program's build. Without a parity check of latents of scale 1 in it, no frame is near enough.
        kind: `bf16` or `uint8`.
    """
    rms, largest, size = measured
    row: Mapping[str, Any] = next((row for row in report.get("parity", {}).get("scales", ()) if row["scale"] == 1), {})
    precision = report.get("precision")
    if precision in PSNR_GATE_DB:
        return rms <= 2 * 10 ** (-PSNR_GATE_DB[precision] / 20)  # PSNR is against a range of 2
    relative, absolute = row.get("relative_limit"), row.get("absolute_limit")
    if relative is None or absolute is None:  # a limit that was not finite, too
        return False
    # Both frames were rounded when they were stored.
    of_size, fixed = _half_step(kind, None)
    most_rms = (relative + 2 * of_size) * size + 2 * fixed
    return bool(rms <= most_rms and largest <= absolute + 2 * (of_size + fixed))


@torch.no_grad()
def judge(eager: EagerDecoder, report: Mapping[str, Any], latents: Tensor, frame: Tensor, kind: str) -> str:
    """Holds a program's frame to the parity check's rule, on the latents that it was decoded from.

    Args:
        eager: PyTorch's decoder.
        report: of the program's build.
        latents: `[1, c, h, w]` on the decoder's device.
        frame: as the decode function returns it: `[C, H, W]` bf16, or `[H, W, C]` uint8.
        kind: `bf16` or `uint8`.

    Returns:
        How the frame is wrong; empty for a right one. If fp32 cannot decode the latents (memory), that is the answer:
        a frame that is not near PyTorch's and that nothing speaks for is not trusted.
    """
    precision = str(report.get("precision"))
    dtype = _DTYPES.get(precision, eager.dtype or torch.float32)
    try:
        exact, usual = _in(eager, torch.float32, kind), _in(eager, dtype, kind)
        reference = Reference.of(exact, usual, [latents.to(dtype)], dtype)
    except Exception as error:  # whatever a decoder raises in another dtype
        raise_interrupt(error)
        release_memory(latents.device)
        return f"it is not near PyTorch's, and fp32 cannot decode it: {type(error).__name__}: {str(error)[:200]}"
    wanted = reference.wanted[0]
    got = errors(_values(frame, kind)[None], wanted)
    if not got.finite:
        return "it has values that are not finite"
    if precision in PSNR_GATE_DB:
        least = PSNR_GATE_DB[precision] - EIGHT_BIT_MARGIN_DB
        return "" if got.psnr_db >= least else f"PSNR {got.psnr_db:.1f} dB against fp32, at least {least:g} dB"
    relative, absolute = reference.limits(reference.eager[0])
    of_size, fixed = _half_step(kind, dtype)
    size = torch.where(wanted.isfinite(), wanted, 0).square().mean().sqrt().item()
    relative += of_size + fixed / max(size, torch.finfo(torch.float32).tiny)
    absolute += of_size + fixed
    if not got.relative <= relative:
        return f"relative error {got.relative:.2e} against fp32, at most {relative:.2e}"
    if not got.absolute <= absolute:
        return f"absolute error {got.absolute:.2e} against fp32, at most {absolute:.2e}"
    return ""


def _in(eager: EagerDecoder, dtype: torch.dtype, kind: str) -> Callable[[Tensor], Tensor]:
    """Returns the decoder in `dtype`, whose weights are copied if they have another; its values as `kind` can hold."""
    module = eager.module if eager.dtype in (dtype, None) else copy.deepcopy(eager.module).to(dtype)

    def decode(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            frames: Tensor = module(z.to(dtype))
        return frames.clamp(-1, 1) if kind == "uint8" else frames

    return decode


def _distance(frame: Tensor, truth: Tensor) -> Tensor:
    """Returns, on the device, float32: rms difference, largest one where |truth| <= 1, and rms of the truth.

    Values that are not finite make the first two NaN or infinite, which no limit allows.
    """
    difference = frame - truth
    inside = torch.where(truth.abs() <= 1, difference.abs(), 0).max()
    return torch.stack((difference.square().mean().sqrt(), inside, truth.square().mean().sqrt()))


def _values(frame: Tensor, kind: str) -> Tensor:
    """`[C, H, W]` in float32 from a frame as the decode function returns it."""
    return frame.float() if kind == "bf16" else frame.movedim(-1, 0).float() / 127.5 - 1


def _half_step(kind: str, dtype: torch.dtype | None) -> tuple[float, float]:
    """The rounding of stored values: the most as a share of a value, and the most of all. `dtype`: the program's."""
    if kind == "uint8":
        return 0.0, 1 / 255
    return (0.0 if dtype == torch.bfloat16 else torch.finfo(torch.bfloat16).eps / 2), 0.0
