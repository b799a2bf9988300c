"""Kernels that TensorRT for RTX compiles when an engine first runs, kept inside the program's file.

Why: an engine of TensorRT for RTX holds no machine code for the GPU; each process compiles it again unless the engine
is given what an earlier one compiled. From 2.13 on Torch-TensorRT can hand that out and take it back
(`versions.Release.runtime_cache`). It would keep it in a file of the temporary folder, where whoever can write there
chooses what runs on the GPU. In the program's file it is hashed, signed and confirmed by an answer like everything else
there, and the key that names the program says for which GPU, driver and libraries it is.

No GPU has run this: what ran on GPUs is 2.11, which has no such thing and takes none of these paths.

Usage:
    with collected(program, files):          # for compiler.save_program
        program(z)
    attach(exported.constants.values(), files[FILE])        # before the first run
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import zlib
from collections.abc import Iterable, Iterator

import torch

from owl_wms.interrupts import raise_interrupt
from owl_wms.trt.library import importer, versions

FILE = "tensorrt_kernels.txt"
# Torch-TensorRT's own defaults, as the numbers that its C++ engine takes: shapes "lazy", CUDA graphs "disabled".
_LAZY, _DISABLED = 0, 0
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def collected(program: object, files: dict[str, str]) -> Iterator[None]:
    """Add to `files` what the engines of a program compile while they run in the block; nothing where there is nothing.

    Args:
        program: as `compiler.compile_exported` returns it; anything else has no engines and adds nothing.
    """
    release = versions.of_torch()
    if release is None or not release.runtime_cache or not isinstance(program, torch.nn.Module):
        yield
        return
    stream, context = io.BytesIO(), contextlib.ExitStack()
    try:
        context.enter_context(importer.submodule("runtime").runtime_cache(program, stream))
    except Exception as error:  # no engine in it, no Torch-TensorRT, or another flavour: then there is nothing to keep
        _LOG.debug("no kernels to collect: %s: %s", type(error).__name__, error)
        yield
        return
    try:
        yield
    finally:
        try:
            context.close()
        except Exception as error:  # the program is as good without them
            _LOG.warning("the engines' kernels are not kept: %s: %s", type(error).__name__, error)
            stream = io.BytesIO()
    if stream.getvalue():
        files[FILE] = base64.b64encode(zlib.compress(stream.getvalue())).decode("ascii")


def attach(objects: Iterable[object], text: str) -> int:
    """Give kernels to engines that have not run yet; without them, or if they are refused, the engines compile again.

    Args:
        objects: constants of an exported program, the engines among them.
        text: what `collected` wrote, verified by the caller; empty for none.

    Returns:
        How many engines took them.
    """
    release = versions.of_torch()
    if not text or release is None or not release.runtime_cache:
        return 0
    taken = 0
    try:
        handle = torch.classes.tensorrt.RuntimeCacheHandle("")  # no path: nothing is written back
        kernels = bytearray(zlib.decompress(base64.b64decode(text, validate=True)))
        handle.deserialize(torch.frombuffer(kernels, dtype=torch.uint8))
        for engine in objects:
            if hasattr(engine, "update_runtime_settings"):
                engine.update_runtime_settings(_LAZY, _DISABLED, handle)
                taken += 1
    except Exception as error:
        raise_interrupt(error)
        _LOG.info("kernels that came with the program are not used: %s: %s", type(error).__name__, error)
    return taken
