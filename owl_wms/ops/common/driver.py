"""The CUDA driver library, which torch has loaded anyway, called directly where torch has no function for it.

NVIDIA's own Python bindings (`cuda.bindings`, `cuda.core`) would do the same; importing their driver module took 0.52 s
on two slow cores, and a cached program has to decode its first frame within two seconds.

Usage:
    check_driver(driver().cuModuleUnload(module), "unloading a module")
"""

from __future__ import annotations

import ctypes
import functools


class KernelError(RuntimeError):
    """A kernel that did not compile, load or launch; the message carries the compiler's or driver's own words."""


class KernelRefused(KernelError):
    """A kernel that this compiler, driver or GPU cannot have: nothing was launched, and a simpler one may do."""


# Of cuda.h: invalid value (too much shared memory), invalid image, no binary for this GPU, invalid PTX, no translator,
# unsupported PTX version, translation disabled, invalid source, not found, out of resources (registers), not supported.
# All say that nothing began; those of a broken context or of memory that ran out are not among them.
_REFUSALS = frozenset({1, 200, 209, 218, 221, 222, 223, 300, 500, 701, 801})


@functools.lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """libcuda.

    Raises:
        KernelError: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no NVIDIA driver: {error}") from error


def ensure_context(index: int) -> None:
    """Make the primary context of CUDA device `index` current in this thread unless some context is.

    torch does so at a thread's first call of the CUDA runtime, which memory out of its cache does not need.

    Raises:
        KernelError: the driver refuses.
    """
    current, device = ctypes.c_void_p(), ctypes.c_int()
    check_driver(driver().cuCtxGetCurrent(ctypes.byref(current)), "asking for a context")
    if current.value is None:
        check_driver(driver().cuDeviceGet(ctypes.byref(device), index), f"asking for device {index}")
        check_driver(driver().cuDevicePrimaryCtxRetain(ctypes.byref(current), device), "taking a context")
        check_driver(driver().cuCtxSetCurrent(current), "setting a context")


def check_driver(status: int, doing: str) -> None:
    """Raises KernelError with the driver's words unless `status` is success; KernelRefused if nothing could begin."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        kind = KernelRefused if status in _REFUSALS else KernelError
        raise kind(f"{doing}: CUDA error {status}, {(text.value or b'unknown').decode()}")
