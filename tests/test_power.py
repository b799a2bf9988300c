"""What a GPU is said to draw: the card that runs, its own counter of energy, and nothing where nothing can be read."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from owl_wms import power


class FakeNvml:
    """NVML of a card that draws 500 W at 1605 MHz; `unknown` are functions that the card refuses."""

    def __init__(self, *unknown: str) -> None:
        self.unknown, self.asked, self.now = unknown, [], 0.0

    def perf_counter(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name.startswith("nvmlDeviceGetHandle"):
                self.asked.append(getattr(arguments[0], "value", arguments[0]))
            if name in self.unknown:
                return 3
            self.now += 0.01
            told = {
                "nvmlDeviceGetTotalEnergyConsumption": 500e3 * self.now + 1e9,
                "nvmlDeviceGetPowerUsage": 512_500,
                "nvmlDeviceGetClockInfo": 1605,
            }
            if name in told:
                arguments[-1]._obj.value = int(told[name])
            return 0

        return call


@pytest.mark.parametrize(
    ("seen", "asked"), [(None, 0), ("", 0), ("1", 1), ("3,1", 3), ("GPU-8b1e", 0)], ids=lambda value: repr(value)
)
@pytest.mark.parametrize("by_uuid", [True, False])
def test_power_is_read_from_the_gpu_that_runs(
    seen: str | None, asked: int, by_uuid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(*([] if by_uuid else ["nvmlDeviceGetHandleByUUID"]))
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8b1e-77"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    power.Card(torch.device("cuda", 0))
    assert nvml.asked == [b"GPU-8b1e-77", *([] if by_uuid else [asked])]


@pytest.mark.parametrize(
    ("unknown", "watts", "clock"),
    [
        ((), pytest.approx(500), 1605.0),
        (("nvmlDeviceGetTotalEnergyConsumption",), 512.5, 1605.0),
        (("nvmlDeviceGetClockInfo",), pytest.approx(500), pytest.approx(math.nan, nan_ok=True)),
        (("nvmlInit_v2",), pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True)),
    ],
)
def test_joules_are_counted_while_the_card_is_busy(
    unknown: tuple[str, ...], watts: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml, sampled = FakeNvml(*unknown), threading.Event()
    monkeypatch.setattr(power, "time", nvml)
    monkeypatch.setattr(power.ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8b1e-77"))
    sample = power.Card.sample

    def counted(card: power.Card) -> power.Sample:
        found = sample(card)
        if nvml.now > 0.3:
            sampled.set()
        return found

    monkeypatch.setattr(power.Card, "sample", counted)
    with power.Meter(torch.device("cuda", 0)) as meter:
        assert "nvmlInit_v2" in unknown or sampled.wait(20)
    assert meter.watts == watts
    assert meter.clock_mhz == clock


def test_without_nvml_a_load_has_a_time_and_no_watts(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(power.ctypes, "CDLL", absent)
    calls: list[int] = []
    found = power.under_load(lambda: calls.append(1), torch.device("cpu"), seconds=1e-3)
    assert math.isnan(found["watts"])
    assert math.isnan(found["joules"])
    assert found["sustained_ms"] > 0
    assert len(calls) > 1
    with pytest.raises(OSError, match="libnvidia-ml"):
        power.Card(torch.device("cuda", 0))


def test_energy_counts_from_one_change_of_the_counter_to_another() -> None:
    def at(seconds: float, joules: float) -> power.Sample:
        return power.Sample(seconds=seconds, joules=joules, watts=1.0, clock_mhz=1.0)

    said = [at(0.0, 70.0), at(0.5, 100.0), at(0.6, 100.0), at(1.0, 200.0), at(1.5, 300.0), at(1.9, 300.0)]
    assert power.watts_of(said) == pytest.approx(200.0)
    assert power.watts_of(said[:2]) == 1.0, "one change says nothing"
    assert math.isnan(power.watts_of([]))
