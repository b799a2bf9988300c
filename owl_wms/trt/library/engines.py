"""Loads what runs an engine, without what makes one.

Why it exists: `import torch_tensorrt` takes three seconds, nearly all of it for converters, lowering passes and
Inductor, and a start that finds its program in the cache makes nothing. The class that holds an engine and the operator
that runs it are C++ and register themselves when their library is loaded. So a cached program is read with that library
alone; if it cannot be loaded, or a program turns out to need more, the whole package is imported.

Usage:
    status = engines.status()        # can this process run programs? As importer.status(), usually without the import
    program = engines.reading(lambda: torch.export.load(io.BytesIO(data)))
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from owl_wms.errors import FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.trt.library import importer, versions

LIBRARIES = {"rtx": "tensorrt_rtx_libs", "standard": "tensorrt_libs"}
"""Flavour -> the package that holds TensorRT's own libraries; importing it loads them and nothing else."""

# In the order in which torch_tensorrt looks for them: the first one found holds what the second one does.
_FILES = ("libtorchtrt.so", "libtorchtrt_runtime.so")
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


def status() -> importer.TensorRTStatus:
    """Returns whether this process can run engines: by the library alone where that works, else as `importer.status()`
    says.

    Never raises.
    """
    if attached():
        flavour, version = importer.installed_flavour()
        return importer.TensorRTStatus(available=True, flavour=flavour, version=version)
    return importer.status()


def reading(load: Callable[[], _T]) -> _T:
    """Run `load`, which deserializes a program; once more with all of Torch-TensorRT if the library was not enough.

    A program without engines needs no Torch-TensorRT, and which program that is shows when it is read.

    Raises:
        FastPathError: stage "import" when Torch-TensorRT cannot be had at all and the program does not load without it;
            else what `load` raises.
        Exception: whatever `load` raises.
    """
    if not attached():
        missing = importer.missing()
        try:
            return load()
        except (FastPathError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            if missing is None:
                raise
            raise missing from error
    try:
        return load()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise_interrupt(error)
        if "torch_tensorrt" in sys.modules or not importer.status().available:
            raise
        _LOG.info("reading once more with all of Torch-TensorRT: %s: %s", type(error).__name__, error)
    return load()


def attached() -> bool:
    """Returns whether torch knows engines; loads the library when asked for the first time. Never raises."""
    with importer.LOCK:
        return _attach()


def forget() -> None:
    """Try again at the next question (after an installation, or in a test)."""
    with importer.LOCK:
        _attach.cache_clear()


@functools.cache
def _attach() -> bool:
    flavour = importer.installed_flavour()[0]
    release = versions.of_torch()
    if flavour not in LIBRARIES or release is None or versions.refusal() is not None:
        return False
    try:
        if "torch_tensorrt" not in sys.modules:
            for name in release.torch_libraries:
                ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
            _load_library(flavour)
        # The class and the operators raise or are absent when nothing registered them.
        known = bool(torch.classes.tensorrt.Engine) and hasattr(torch.ops.tensorrt, "execute_engine")
        return known and str(torch.ops.tensorrt.ABI_VERSION()) == release.abi
    except Exception as error:  # a library that is missing, does not fit this torch, or registers something else
        raise_interrupt(error)
        _LOG.debug("Torch-TensorRT's library alone does not do: %s: %s", type(error).__name__, error)
        return False


def _load_library(flavour: str) -> None:
    if importlib.util.find_spec(LIBRARIES[flavour]) is not None:  # else they are where the loader looks by itself
        importlib.import_module(LIBRARIES[flavour])
    spec = importlib.util.find_spec("torch_tensorrt")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or []]
    files = [root / "lib" / name for root in roots for name in _FILES]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"none of {[str(file) for file in files]}")
    torch.ops.load_library(str(found))
