"""The one place that imports `torch_tensorrt`, whichever flavour is installed, and says in words why it cannot.

Why it exists: the import fails in more ways than ImportError. Without an NVIDIA driver it raises RuntimeError, with
mismatched libraries a bare Exception; the RTX packages as the registry ships them carry a `tensorrt_rtx/plugin` folder
whose import fails; and both flavours share the import name, so the installed distribution is what tells them apart.
Nothing here runs when `owl_wms` is imported, and a failure is remembered, so that the second decode does not pay for
the first one's search.

Usage:
    status = importer.status()            # TensorRTStatus(available=False, reason="...", remedy="...")
    torch_tensorrt = importer.require()   # the module, or FastPathError(stage="import")
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from owl_wms.errors import FastPathError
from owl_wms.trt.library import versions

_LOGGERS = (
    "torch_tensorrt",
    "torch_tensorrt.dynamo",
    "torch_tensorrt [TensorRT Conversion Context]",
    "torchao",
    "py.warnings",
)
LOCK = threading.RLock()
_LOG = logging.getLogger(__name__)
_elsewhere: list[FastPathError] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRTStatus:
    """The state of Torch-TensorRT in this process.

    Attributes:
        available: whether `require()` returns the module.
        flavour: "rtx", "standard", or "none" when neither distribution is installed.
        version: `torch-tensorrt-rtx 2.11.0, tensorrt_rtx 1.4.0.76`; empty when not installed.
        reason: why it is not available, one sentence; empty when it is.
        remedy: what a user can do about it; empty when it is.
    """

    available: bool
    flavour: str
    version: str
    reason: str = ""
    remedy: str = ""


def installed_flavour() -> tuple[str, str]:
    """`(flavour, distribution with version)` from package metadata alone; `("none", "")` when neither is installed."""
    for distribution, flavour in versions.FLAVOURS.items():
        try:
            return flavour, f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:  # damaged metadata raises whatever its parser raises
            _LOG.debug("metadata of %s: %s", distribution, error)
    return "none", ""


def status() -> TensorRTStatus:
    """The answer to "can this process compile with TensorRT"; imports on the first call, remembered after it. Never
    raises.
    """
    with LOCK:
        return _attempt()[0]


def require() -> ModuleType:
    """`torch_tensorrt` itself. Raises FastPathError (stage "import") with reason and remedy when that fails."""
    with LOCK:
        state, module = _attempt()
    if module is None:
        raise FastPathError("import", state.reason, state.remedy)
    return module


def missing() -> FastPathError | None:
    """Returns why `require` would fail; None when it would not."""
    state = status()
    return None if state.available else FastPathError("import", state.reason, state.remedy)


def submodule(name: str) -> Any:
    """A module below `torch_tensorrt`, for example `dynamo.conversion`. Raises FastPathError as `require` does."""
    require()
    try:
        return importlib.import_module(f"torch_tensorrt.{name}")
    except Exception as error:  # an internal that moved in another release is a version mismatch like any other
        raise FastPathError(
            "import", f"torch_tensorrt.{name}: {type(error).__name__}: {error}", versions.remedy()
        ) from error


def forget() -> None:
    """Drop the remembered answers; the next `status()` tries again (after an installation, or in a test)."""
    with LOCK:
        _attempt.cache_clear()
        _elsewhere.clear()


def remember(failure: FastPathError) -> None:
    """Note that a build process could not import it, so that the next build need not find out again."""
    with LOCK:
        _elsewhere[:] = [failure]


def failed_elsewhere() -> FastPathError | None:
    """Returns the error that `remember` was given, as a new one; None without one."""
    with LOCK:
        return FastPathError(_elsewhere[0].stage, _elsewhere[0].reason, _elsewhere[0].remedy) if _elsewhere else None


@functools.cache
def _attempt() -> tuple[TensorRTStatus, ModuleType | None]:
    flavour, version = installed_flavour()
    if flavour == "none" and "torch_tensorrt" not in sys.modules and not _findable():
        reason = "Torch-TensorRT is not installed"
        return TensorRTStatus(
            available=False, flavour="none", version="", reason=reason, remedy=versions.remedy()
        ), None
    refused = versions.refusal()
    if refused is not None:
        reason, remedy = refused
        return TensorRTStatus(available=False, flavour=flavour, version=version, reason=reason, remedy=remedy), None
    noise = io.StringIO()
    try:
        with _quiet(noise):
            module = _import(flavour)
    except Exception as error:
        if noise.getvalue().strip():
            _LOG.debug("torch_tensorrt printed while failing: %s", noise.getvalue().strip())
        reason, remedy = explain(error)
        return TensorRTStatus(available=False, flavour=flavour, version=version, reason=reason, remedy=remedy), None
    engine = getattr(sys.modules.get("tensorrt"), "__version__", "unknown")
    full = f"{version or 'torch_tensorrt ' + str(getattr(module, '__version__', 'unknown'))}, tensorrt {engine}"
    return TensorRTStatus(available=True, flavour=flavour, version=full), module


def _findable() -> bool:
    try:
        return importlib.util.find_spec("torch_tensorrt") is not None
    except (ImportError, ValueError):
        return False


def _import(flavour: str) -> ModuleType:
    if "torch_tensorrt" in sys.modules:
        return importlib.import_module("torch_tensorrt")
    before = set(sys.modules)
    blocked = flavour == "rtx" and "tensorrt.plugin" not in sys.modules
    if blocked:
        # None makes `import tensorrt.plugin` an ImportError, which Torch-TensorRT handles as "no plugins"; the folder
        # that the registry ships imports a module that does not exist, which it does not handle.
        sys.modules["tensorrt.plugin"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("torch_tensorrt")
    except BaseException:
        # A half-imported package would make the next attempt succeed with pieces missing.
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("torch_tensorrt", "tensorrt"):
                del sys.modules[name]
        raise


def explain(error: BaseException) -> tuple[str, str]:
    """`(reason, remedy)` of a failed import, in one sentence each."""
    text = " ".join(str(error).split()) or type(error).__name__
    reason = f"import torch_tensorrt failed: {type(error).__name__}: {text}"
    lowered = text.lower()
    if "driver" in lowered or "no cuda" in lowered:
        return reason, "install an NVIDIA driver, or run on a machine with a GPU"
    if "plugin" in lowered:
        return reason, "the tensorrt_rtx package's plugin folder is broken; reinstall tensorrt-rtx"
    if isinstance(error, ModuleNotFoundError):
        return reason, versions.remedy()
    if isinstance(error, (AttributeError, ImportError)):
        return reason, f"the installed versions do not fit together: {versions.remedy()}"
    return reason, versions.remedy()


@contextlib.contextmanager
def _quiet(sink: io.StringIO) -> Iterator[None]:
    """Keep what the import prints and warns about (missing modelopt, no TensorRT-LLM) out of the user's terminal."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    root_level = logging.root.manager.disable
    try:
        logging.disable(max(root_level, logging.WARNING))
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(root_level)
        for name, level in levels.items():
            if name.startswith("torch_tensorrt") and level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.ERROR)
