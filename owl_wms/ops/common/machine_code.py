"""Machine code of kernels: made once, by several threads where several are wanted, and carried with a program.

Why it exists: NVRTC takes 0.1 to 0.5 s a variant and a decoder uses up to a dozen, one after the other as the first run
meets them. While a program is built they are compiled beside each other; a program that is stored takes along the code
that it was checked with, inside the file whose hash the cache verifies, so that the next start compiles nothing and
runs exactly what passed.

Usage:
    with watched() as used:                      # which kernels does this program launch?
        program(z)
    text = pack(used, "sm_90")                   # into the file
    adopt(text)                                  # next process, before the program runs
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

_LOG = logging.getLogger(__name__)
_guard = threading.Lock()
_images: dict[str, Future[bytes]] = {}
_local = threading.local()
MAX_THREADS = 8


class KernelSource(Protocol):
    """The facts that identify machine code; `owl_wms.ops.common.nvrtc.Kernel` has them."""

    @property
    def entry(self) -> str: ...

    @property
    def defines(self) -> tuple[str, ...]: ...

    def source(self) -> str: ...


def identity(kernel: KernelSource, architecture: str) -> str:
    """SHA-256 over all that decides the machine code, the full source text included."""
    parts = [architecture, kernel.entry, *kernel.defines, kernel.source()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def once(kernel: KernelSource, architecture: str, make: Callable[[], bytes]) -> bytes:
    """The machine code, by `make` unless it is known; who asks while another thread makes it waits for that one.

    Raises:
        Exception: what `make` raises; it is not remembered.
    """
    key = identity(kernel, architecture)
    with _guard:
        found = _images.get(key)
        mine = found is None
        future = _images[key] = found or Future()
    if not mine:
        return future.result()
    try:
        future.set_result(make())
    except BaseException as error:
        with _guard:
            _images.pop(key, None)
        future.set_exception(error)
        raise
    return future.result()


def ahead(jobs: Collection[Callable[[], object]]) -> None:
    """Run `jobs` (compilations) in threads and return at once; what fails there fails again where it is needed."""

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            _LOG.debug("compiling ahead: %s", error)

    pool = ThreadPoolExecutor(MAX_THREADS, "owl-wms-nvrtc")
    for job in jobs:
        pool.submit(run, job)
    pool.shutdown(wait=False)


@contextlib.contextmanager
def watched(launch: bool = True) -> Iterator[set[KernelSource]]:
    """The kernels that this thread launches inside the block.

    Args:
        launch: False only notes them: outputs keep whatever the memory held, so nobody may look at them.
    """
    before = getattr(_local, "watch", None)
    seen: set[KernelSource] = set()
    _local.watch = (seen, launch)
    try:
        yield seen
    finally:
        _local.watch = before


def noted(kernel: KernelSource) -> bool:
    """Tell a `watched` block of this thread of a launch; whether that launch is to be left out."""
    watch = getattr(_local, "watch", None)
    if watch is None:
        return False
    watch[0].add(kernel)
    return not watch[1]


def pack(kernels: Collection[KernelSource], architectures: Callable[[KernelSource], str]) -> str:
    """The machine code of `kernels` that this process has made, as JSON text; `architectures` names each one's."""
    known: dict[str, str] = {}
    for kernel in kernels:
        key = identity(kernel, architectures(kernel))
        future = _images.get(key)
        if future is not None and future.done() and future.exception() is None:
            known[key] = base64.b64encode(future.result()).decode()
    return json.dumps(known, sort_keys=True)


def adopt(text: str) -> int:
    """Take over what `pack` wrote; code of another source, variant or architecture is never asked for.

    The caller has verified the text: machine code runs with the process's rights on the GPU.

    Returns:
        How many images there were; 0 for text that `pack` did not write.
    """
    try:
        known = {str(key): base64.b64decode(image, validate=True) for key, image in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        return 0
    with _guard:
        for key, image in known.items():
            if key not in _images:
                _images[key] = Future()
                _images[key].set_result(image)
    return len(known)


def forget() -> None:
    """Drop everything that was made (for tests)."""
    with _guard:
        _images.clear()
