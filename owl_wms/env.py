"""Reads the process environment and describes the machine: the only module that reads `os.environ`.

Why it exists: three readers want the same description of the machine (the cache key, the benchmark header and `owl-wms
doctor`), and a setting read in two places is a setting read in two ways. Nothing here touches CUDA at import;
`describe_machine` asks the GPU when it is called, never imports TensorRT, and answers `"unknown: reason"` where a probe
fails, so that a missing fact is visible in a key or a report instead of absent from it.

Why not nvidia-ml-py: torch says everything about the GPU but the driver's version, which is one call. Why not
pydantic-settings: four variables override a call and a file in an order of our own (`settings`), each with a message
that names the variable, which its sources would have to be taught.

Usage:
    env.read("TENSORRT_PRECISION")        # stripped text, or None when unset or empty
    env.describe_machine(device_index=0)  # {"gpu": "NVIDIA H200", "driver": "580.82.07", ...}
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from owl_wms.errors import ConfigError

TENSORRT_VARIABLES = {
    "enabled": "TENSORRT_ENABLED",
    "precision": "TENSORRT_PRECISION",
    "cache_dir": "TENSORRT_CACHE_DIR",
    "fallback_on_error": "TENSORRT_FALLBACK",
    "build": "TENSORRT_BUILD",
}
"""Setting name -> environment variable that overrides it."""

# Both flavours install the same import names, so the distribution's name is what tells them apart.
_PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton",),
    "torch_tensorrt": ("torch-tensorrt", "torch-tensorrt-rtx"),
    # The bindings' wheels count too: an installation without the thin front package must not look like none.
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings"),
}
_NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_MEMORY_LIMIT_FILE = Path("/sys/fs/cgroup/memory.max")
NVML = "libnvidia-ml.so.1"  # the library behind nvidia-smi
_SPECIAL_STEPS = 0xFFFFFFF0
"""Slurm's step ids from here on (batch, interactive, extern) are of no srun; torchrun may start in them."""


def read(name: str) -> str | None:
    """Returns the stripped value of an environment variable; None, "no opinion", when it is unset or empty."""
    value = os.environ.get(name, "").strip()
    return value or None


MOST_PROCESSES = 64 + 4 * (os.cpu_count() or 1)
"""Processes that one call may start on this machine: many more would take it down before any of them has worked."""


def after_fork(renew: Callable[[], None]) -> None:
    """Have every forked child of this process call `renew` before anything else; nothing forks on Windows.

    Why: a lock that another thread held at the fork would stay locked in the child for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def tensorrt_overrides() -> dict[str, str]:
    """Raw text of the `TENSORRT_*` variables that are set, by setting name; `settings` parses and checks them."""
    found = {setting: read(variable) for setting, variable in TENSORRT_VARIABLES.items()}
    return {setting: text for setting, text in found.items() if text is not None}


def cache_hmac_key() -> bytes | None:
    """Returns the shared secret of a signed cache directory (`TENSORRT_CACHE_KEY`); None when none is set."""
    text = read("TENSORRT_CACHE_KEY")
    return None if text is None else os.fsencode(text)  # any bytes make a key


def local_rank() -> int | None:
    """This process's GPU number as a launcher such as torchrun states it (`LOCAL_RANK`); None when absent.

    Raises:
        ConfigError: not a whole number of at most nine digits.
    """
    text = read("LOCAL_RANK")
    if text is None:
        return None
    # Not str.isdigit: superscripts are digits too, and int() refuses them and very long numbers.
    if not re.fullmatch("[0-9]{1,9}", text):
        rule = "LOCAL_RANK must be a whole number >= 0, as torchrun sets it"
        raise ConfigError(f"{rule}; got {text!r}", key="LOCAL_RANK")
    return int(text)


def is_slurm_task() -> bool:
    """Returns whether srun started this process as one task of a step.

    The script that sbatch starts has a job's variables without being a task: no step, or a special one, and process 0.
    """
    if (read("SLURM_PROCID") or "0") != "0" or read("SLURM_STEP_NUM_TASKS") is not None:
        return True
    step = read("SLURM_STEP_ID") or ""
    return re.fullmatch("[0-9]{1,18}", step) is not None and int(step) < _SPECIAL_STEPS


def describe_machine(device_index: int | None = None) -> dict[str, str | int]:
    """Versions and hardware that a compiled program or a timing depends on.

    Args:
        device_index: CUDA device to describe; None means the current one.

    Returns:
        `python`, `os`, `torch`, `triton`, `cuda`, `nvrtc`, `cudnn`, `torch_tensorrt`, `tensorrt`, `driver`, `gpu`,
        `compute_capability`, `sm_count`, `gpu_memory_bytes`. Always every key; a value that could not be found out
        reads `"unknown: <reason>"`.
    """
    described: dict[str, str | int] = {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    described.update({name: _package_version(candidates) for name, candidates in _PACKAGES.items()})
    described["cuda"] = _probe(_cuda_version)
    described["nvrtc"] = _probe(_nvrtc_version)
    described["cudnn"] = _probe(_cudnn_version)
    described["driver"] = driver_version()
    described.update(_describe_gpu(device_index))
    return described


def memory_bytes() -> int | None:
    """Returns the machine's memory, or the container's where that is less; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
    with contextlib.suppress(OSError, ValueError):  # no such file without cgroups 2, or the word "max" in it
        total = min(total, int(_MEMORY_LIMIT_FILE.read_text(encoding="ascii")))
    return total if total > 0 else None


def driver_version() -> str:
    """NVIDIA kernel driver version such as `580.82.07`, from the driver's own file, NVML or `nvidia-smi`; else
    `"unknown: reason"`.
    """
    try:
        return _driver_version()
    except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


@functools.cache
def _driver_version() -> str:
    if _DRIVER_FILE.exists():
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  ..." (open modules say "Open Kernel Module for
        # x86_64")
        for word in _DRIVER_FILE.read_text(encoding="utf-8", errors="replace").split():
            if word.count(".") >= 1 and word.replace(".", "").isdigit():
                return word
    found = _nvml_driver_version()  # a container may lack the file, and starting nvidia-smi takes a second or more
    if found:
        return found
    if shutil.which("nvidia-smi") is None:
        raise LookupError(f"neither {_DRIVER_FILE} nor nvidia-smi gives a version")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    lines = answer.stdout.split()
    if not lines:
        raise LookupError("nvidia-smi printed no driver version")
    return lines[0]


def _nvml_driver_version() -> str:
    """Asks NVML, the library behind nvidia-smi; returns an empty text when it cannot be asked."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL(NVML)
        if nvml.nvmlInit_v2():
            return ""
        status = nvml.nvmlSystemGetDriverVersion(text, len(text))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return ""
    return "" if status else text.value.decode(errors="replace")


def _package_version(candidates: tuple[str, ...]) -> str:
    """`name version` of every installed candidate, read from package metadata so that nothing is imported."""
    found = []
    for name in candidates:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:  # a damaged metadata folder raises whatever its parser raises
            found.append(f"{name} unknown: {type(error).__name__}: {error}")
    return ", ".join(found) if found else f"unknown: not installed ({', '.join(candidates)})"


def _probe(question: Callable[[], str | int]) -> str | int:
    try:
        return question()
    except Exception as error:  # a broken driver answers with RuntimeError, AssertionError or OSError alike
        return f"unknown: {type(error).__name__}: {error}"


def _cuda_version() -> str:
    import torch

    return torch.version.cuda or "unknown: this torch was built without CUDA"


def _nvrtc_version() -> str:
    """The compiler of our CUDA kernels: torch's wheel, which is found first, else the system's library."""
    packaged = _package_version(_NVRTC)
    if not packaged.startswith("unknown"):
        return packaged
    major, minor = ctypes.c_int(), ctypes.c_int()
    library = ctypes.CDLL(f"libnvrtc.so.{_cuda_version().split('.')[0]}")
    status = library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"unknown: nvrtcVersion returned {status}" if status else f"libnvrtc {major.value}.{minor.value}"


def _cudnn_version() -> str | int:
    import torch

    version = torch.backends.cudnn.version()
    return "unknown: this torch has no cuDNN" if version is None else version


def _describe_gpu(device_index: int | None) -> dict[str, str | int]:
    keys = ("gpu", "compute_capability", "sm_count", "gpu_memory_bytes")
    try:
        import torch

        if not torch.cuda.is_available():
            return dict.fromkeys(keys, "unknown: no CUDA device")
        index = torch.cuda.current_device() if device_index is None else device_index
        properties = torch.cuda.get_device_properties(index)
        return {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "sm_count": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
        }
    except Exception as error:  # same reason as in _probe: the answer is the failure itself
        return dict.fromkeys(keys, f"unknown: {type(error).__name__}: {error}")


def python_executable() -> str:
    """Returns the interpreter that runs this process, for child processes."""
    return sys.executable
