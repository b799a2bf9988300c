"""Samples what a benchmark's processes and the GPUs do while it runs.

Usage:
    with Load() as load:
        subprocess.run(command)
    load.cores(start, end), load.gpu(start, end, gpus=2), load.memory
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time

import psutil
import torch


class Load:
    """What this process's descendants and the GPUs do, sampled twice a second.

    Attributes:
        memory: the most bytes that the processes hold at once.
    """

    def __init__(self) -> None:
        self.memory = 0
        self._cpu: list[tuple[float, float]] = []  # time, and processor seconds of all processes so far
        self._gpu: list[tuple[float, int]] = []  # time, and percent of one GPU
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=look) for look in (self._look, self._look_at_gpus)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def cores(self, start: float, end: float) -> float:
        """Returns how many cores were busy between two times."""
        within = [(at, seconds) for at, seconds in self._cpu if start <= at <= end]
        if len(within) < 2:
            return 0.0
        return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0])

    def gpu(self, start: float, end: float, gpus: int) -> float | None:
        """Returns the mean utilization of so many GPUs, 0 to 1, between two times; None without nvidia-smi."""
        within = [share for at, share in self._gpu if start <= at <= end]
        seen = max(torch.cuda.device_count(), 1)
        return sum(within) / len(within) / 100 * seen / gpus if within else None  # the other GPUs are at rest

    def _look(self) -> None:
        seconds: dict[int, float] = {}
        while not self._ended.wait(0.5):
            memory = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                    seconds[process.pid] = times.user + times.system
                    memory += process.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            self.memory = max(self.memory, memory)
            self._cpu.append((time.time(), sum(seconds.values())))

    def _look_at_gpus(self) -> None:
        if shutil.which("nvidia-smi") is None:
            return
        asked = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
        with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as process:
            threading.Thread(target=self._kill_at_the_end, args=(process,), daemon=True).start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip().isdecimal():
                    self._gpu.append((time.time(), int(line)))

    def _kill_at_the_end(self, process: subprocess.Popen[str]) -> None:
        self._ended.wait()
        process.kill()
