"""Reads energy, power and clock of a GPU while it works, from NVML, the library behind nvidia-smi.

Why not nvidia-smi: beside a busy GPU it takes a second to start, and its watts are an average over the last second. The
driver counts the joules that a card has used, which makes the joules of a decode a subtraction.

Usage:
    under_load(lambda: decode(z), device)["joules"]        # of one call, when the clock has settled
    with Meter(device) as meter:
        work()
    meter.watts, meter.clock_mhz        # NaN where there is no NVML, or no such GPU
"""

from __future__ import annotations

import ctypes
import itertools
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from owl_wms import env
from owl_wms.timing import Marks

_CLOCK_SM = 1
INTERVAL_SECONDS = 0.01
QUEUED = 4
"""Calls that wait for the GPU while `under_load` measures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One reading of the card: joules since its driver was loaded, watts, and the clock in MHz."""

    seconds: float
    joules: float
    watts: float
    clock_mhz: float


class Card:
    """One GPU as NVML sees it. Raises OSError where it cannot be asked."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise OSError(f"NVML knows no {device}")
        self._nvml = ctypes.CDLL(env.NVML)
        if status := self._nvml.nvmlInit_v2():
            raise OSError(f"nvmlInit_v2: status {status}")
        self._handle = self._find(device)

    def _find(self, device: torch.device) -> ctypes.c_void_p:
        """NVML sees every GPU of the host, this process those of CUDA_VISIBLE_DEVICES; a UUID is the same for both."""
        handle = ctypes.c_void_p()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if not self._nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
            return handle
        visible = (env.read("CUDA_VISIBLE_DEVICES") or "").split(",")
        number = device.index or 0
        number = int(visible[number]) if len(visible) > number and visible[number].strip().isdigit() else number
        if status := self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(handle)):
            raise OSError(f"nvmlDeviceGetHandleByIndex_v2({number}): status {status}")
        return handle

    def sample(self) -> Sample:
        """The card now; what it does not tell is NaN."""
        energy, power, clock = ctypes.c_ulonglong(), ctypes.c_uint(), ctypes.c_uint()
        told = (
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(energy)),
            self._nvml.nvmlDeviceGetPowerUsage(self._handle, ctypes.byref(power)),
            self._nvml.nvmlDeviceGetClockInfo(self._handle, ctypes.c_int(_CLOCK_SM), ctypes.byref(clock)),
        )
        joules, watts, mhz = (
            math.nan if status else value.value * unit
            for status, value, unit in zip(told, (energy, power, clock), (1e-3, 1e-3, 1.0), strict=True)
        )
        return Sample(seconds=time.perf_counter(), joules=joules, watts=watts, clock_mhz=mhz)


def watts_of(samples: list[Sample]) -> float:
    """Mean watts: joules between the first and the last change of the counter, or the mean of the card's own averages.

    The counter changes every 20 to 100 ms, so that a window from one change to another has no edge of unknown energy.
    """
    steps = [after for before, after in itertools.pairwise(samples) if after.joules > before.joules]
    if len(steps) > 1:
        return (steps[-1].joules - steps[0].joules) / (steps[-1].seconds - steps[0].seconds)
    return _mean([sample.watts for sample in samples])


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


class Meter:
    """Samples a GPU in a thread of its own for as long as a block lasts.

    Attributes:
        watts: mean over the block; NaN where the card cannot be asked.
        clock_mhz: mean clock of the multiprocessors; NaN likewise.
    """

    def __init__(self, device: torch.device) -> None:
        self.watts = self.clock_mhz = math.nan
        self._samples: list[Sample] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            card = Card(device)
        except (OSError, AttributeError):  # no library, an old one, or no such GPU
            return
        self._thread = threading.Thread(target=self._run, args=(card,), daemon=True)

    def _run(self, card: Card) -> None:
        while True:
            self._samples.append(card.sample())
            if self._done.wait(INTERVAL_SECONDS):
                return

    def __enter__(self) -> Meter:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self.watts = watts_of(self._samples)
            self.clock_mhz = _mean([sample.clock_mhz for sample in self._samples])


def under_load(run: Callable[[], object], device: torch.device, seconds: float = 1.0) -> dict[str, float]:
    """Runs `run` without a pause for `seconds`, until the clock has settled, and measures as long again.

    Args:
        run: queues work on `device`, as a decode does.
        device: a GPU, or a CPU, which has a time and no watts.
        seconds: of each part, > 0; power readings need about one.

    Returns:
        `watts` and `clock_mhz` of the GPU (NaN where they cannot be read), `sustained_ms`, milliseconds of a call, and
        `joules` of a call.
    """
    queued: deque[Marks] = deque()

    def calls_for(seconds: float) -> int:
        end, calls = time.perf_counter() + seconds, 0
        while calls == 0 or time.perf_counter() < end:
            run()
            calls += 1
            queued.append(Marks(device))
            queued[-1].mark()
            if len(queued) > QUEUED:  # the GPU always has calls to go on with, and is never far behind
                queued.popleft().wait()
        return calls

    calls_for(seconds)
    ends = Marks(device)
    ends.mark()
    with Meter(device) as meter:  # it ends while calls are still queued: an idle card has another power and clock
        calls = calls_for(seconds)
    ends.mark()
    ends.wait()
    ms = ends.between(0, 1) / calls
    return {
        "watts": meter.watts,
        "clock_mhz": meter.clock_mhz,
        "sustained_ms": ms,
        "joules": meter.watts * ms / 1e3,
    }
