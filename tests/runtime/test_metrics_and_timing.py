"""Prometheus counters registered once, percentiles by nearest rank, and the jit toolchain's way through the runtime."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch

from owl_wms import trt
from owl_wms.errors import ConfigError
from owl_wms.request import Request
from owl_wms.runtime import Jit, VideoDecode, metrics
from owl_wms.runtime.stopwatch import Stopwatch
from owl_wms.timing import measure_inference_time
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings


def exported(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0


def test_counters_reach_prometheus_once(tmp_path: Path) -> None:
    frames, failures = exported("owl_decode_frames_total"), exported("owl_decode_failures_total", stage="build")
    broken = ExportToolchain(fail={"build": RuntimeError("no")})
    VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=broken)(torch.zeros(1, 3, 4, 3, 3))
    assert exported("owl_decode_frames_total") == frames + 3
    assert exported("owl_decode_failures_total", stage="build") == failures + 1
    importlib.reload(metrics)  # a second import must find the collectors instead of registering them again
    metrics.count("frames", 2)
    assert exported("owl_decode_frames_total") == frames + 5


def test_percentiles_are_measured_values() -> None:
    stopwatch = Stopwatch()
    assert stopwatch.percentiles() is None
    stopwatch._done.extend(float(ms) for ms in range(1, 101))
    assert stopwatch.percentiles() == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "samples": 100}


def test_measure_inference_time_counts_calls() -> None:
    calls: list[int] = []
    ms = measure_inference_time(lambda z: calls.append(1) or z, torch.zeros(1), warmup=2, iterations=5)
    assert len(calls) == 7
    assert 0 <= ms < 1000
    with pytest.raises(ConfigError, match="iterations"):
        measure_inference_time(lambda z: z, torch.zeros(1), iterations=0)


def test_jit_toolchain_compiles_in_process_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def compile_for_training(decoder: Any, **arguments: Any) -> Any:
        asked.update(arguments)

        def program(z: torch.Tensor) -> torch.Tensor:
            return decoder(z.to(next(decoder.parameters()).dtype))

        vars(program).update(plan="ops", latency_ms={}, relative_error=0.0)
        return program

    class Anywhere(Jit):
        def ready(self, request: Request) -> None:
            return None

    monkeypatch.setattr(trt, "compile_for_training", compile_for_training)
    decode = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=Anywhere())
    decode(torch.zeros(1, 3, 4, 3, 3))
    assert asked == {"precision": "bf16", "plan": "", "workspace_size": 0, "strict": True}
    assert decode.stats().backend == "tensorrt-jit"
    assert decode.stats().chunks_program == 2
    assert not (tmp_path / "cache").exists()
