"""The CUDA driver library, which torch has loaded anyway, called directly where torch has no function for it.

Usage:
    check_driver(driver().cuModuleUnload(module), "unloading a module")
"""

from __future__ import annotations

import ctypes
import functools


class KernelError(RuntimeError):
    """A kernel that did not compile, load or launch; the message carries the compiler's or driver's own words."""


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


def check_driver(status: int, doing: str) -> None:
    """Raises KernelError with the driver's words unless `status` is success."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{doing}: CUDA error {status}, {(text.value or b'unknown').decode()}")
