"""env: every fact is there or says why not, nothing is imported or initialised for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from owl_wms import env
from owl_wms.errors import ConfigError

KEYS = {
    "python", "os", "torch", "triton", "torch_tensorrt", "tensorrt", "cuda", "nvrtc", "cudnn", "driver", "gpu",
    "compute_capability", "sm_count", "gpu_memory_bytes",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    env._driver_version.cache_clear()
    yield
    env._driver_version.cache_clear()


def test_every_key_is_there_and_plain_json() -> None:
    described = env.describe_machine()
    assert set(described) == KEYS
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == f"torch {torch.__version__.split('+')[0]}" or torch.__version__ in described["torch"]
    for key in KEYS - {"python", "os", "torch"}:
        assert described[key] not in ("", None)
    if not torch.cuda.is_available():
        assert described["gpu"] == described["sm_count"] == "unknown: no CUDA device"


def test_gpu_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    facts = SimpleNamespace(name="NVIDIA X", major=9, minor=0, multi_processor_count=132, total_memory=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or facts)
    described = env.describe_machine(3)
    assert asked == [3]
    chosen = [described[key] for key in ("gpu", "compute_capability", "sm_count", "gpu_memory_bytes")]
    assert chosen == ["NVIDIA X", "9.0", 132, 7]


def test_broken_probes_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("driver/library version mismatch")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(torch.backends.cudnn, "version", broken)
    monkeypatch.setattr(env.metadata, "version", broken)
    monkeypatch.setattr(env, "_DRIVER_FILE", tmp_path / "absent")
    monkeypatch.setattr(env, "NVML", "libabsent.so")
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    described = env.describe_machine()
    assert set(described) == KEYS
    for key in ("gpu", "sm_count", "cudnn", "torch", "tensorrt"):
        assert "version mismatch" in str(described[key]), key
        assert "unknown: " in str(described[key])
    assert str(described["driver"]).startswith("unknown: neither")


def test_the_compiler_of_kernels_is_known_without_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 13, 2
        return 0

    monkeypatch.setattr(env, "_package_version", lambda names: f"unknown: not installed ({', '.join(names)})")
    monkeypatch.setattr(env, "_cuda_version", lambda: "13.2")
    asked: list[str] = []
    library = SimpleNamespace(nvrtcVersion=told)
    monkeypatch.setattr(env.ctypes, "CDLL", lambda name: asked.append(name) or library)
    assert env._nvrtc_version() == "libnvrtc 13.2"
    assert asked == ["libnvrtc.so.13"]


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build",
    ],
)
def test_driver_from_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version: gcc version 12.3.0\n", encoding="utf-8")
    monkeypatch.setattr(env, "_DRIVER_FILE", tmp_path / "version")
    assert env.driver_version() == "580.82.07"


def test_driver_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(env, "_DRIVER_FILE", tmp_path / "absent")
    monkeypatch.setattr(env, "NVML", "libabsent.so")
    monkeypatch.setattr(env.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(env.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="575.1.2\n575.1.2\n"))
    assert env.driver_version() == "575.1.2"
    env._driver_version.cache_clear()
    monkeypatch.setattr(env.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=""))
    assert env.driver_version() == "unknown: nvidia-smi printed no driver version"


@pytest.mark.parametrize(("start", "status", "version"), [(0, 0, "580.82.07"), (9, 0, ""), (0, 3, "")])
def test_driver_from_nvml(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start: int, status: int, version: str
) -> None:
    def answer(text: Any, size: int) -> int:
        text.value = b"580.82.07"
        return status

    nvml = SimpleNamespace(nvmlInit_v2=lambda: start, nvmlSystemGetDriverVersion=answer, nvmlShutdown=lambda: 0)
    monkeypatch.setattr(env, "_DRIVER_FILE", tmp_path / "absent")
    monkeypatch.setattr(env.ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(env.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(env.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="575.1.2\n"))
    assert env.driver_version() == (version or "575.1.2"), "nvidia-smi is asked when NVML cannot be"


def test_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_KEY", " secret ")
    assert env.cache_hmac_key() == b"secret"
    monkeypatch.setenv("TENSORRT_CACHE_KEY", "")
    assert env.cache_hmac_key() is None
    for text, rank in (("2", 2), (" 3 ", 3), ("", None)):
        monkeypatch.setenv("LOCAL_RANK", text)
        assert env.local_rank() == rank
    for text in ("-1", "abc", "1.5", "²", "٣", "9" * 5000):
        monkeypatch.setenv("LOCAL_RANK", text)
        with pytest.raises(ConfigError, match=f"LOCAL_RANK must be a whole number >= 0.* got '{text[:1000]}"):
            env.local_rank()


def test_describing_imports_no_tensorrt_and_importing_touches_no_cuda() -> None:
    code = (
        "import sys; from owl_wms import env; print('torch' in sys.modules); env.describe_machine(); "
        "print([m for m in ('torch_tensorrt', 'tensorrt', 'tensorrt_rtx') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == ["False", "[]"]


def test_any_bytes_make_a_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = b"\xff\xfe\xfd" * 12
    monkeypatch.setenv("TENSORRT_CACHE_KEY", os.fsdecode(key))
    assert env.cache_hmac_key() == key
