"""Everything a program depends on, as one JSON-ready dict that the cache hashes.

Why it exists: Torch-TensorRT's own cache key leaves out weights, operator arguments, GPU and TensorRT version, so two
different decoders can get each other's engine. Here a field that is missing is a wrong picture; a field too many is a
rebuild. The graph is the recording of the folded decoder (no weights, milliseconds), with all arguments, shapes and
dtypes. What plans and rewrites make of it is covered by the hash of our own sources.

Usage:
    material = key_material(decoder, request)
    key = owl_wms.cache.Key.of(material)
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from owl_wms import env
from owl_wms.request import Request
from owl_wms.trt import plans
from owl_wms.trt.graph.digest import weights_digest
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.library.importer import installed_flavour
from owl_wms.trt.spec import compile_settings

SCHEMA = 3
"""Raised when a program of the same material would be read differently. `owl_wms.cache.key.SCHEMA` is another number:
that of the entry format, which knows nothing of what a program is.
"""

MACHINE_FIELDS = (
    "torch", "triton", "torch_tensorrt", "tensorrt", "cuda", "nvrtc", "cudnn", "driver", "gpu", "compute_capability",
    "sm_count", "python",
)  # fmt: skip
SOURCES = ("trt", "fused", "ops", "vae", "request.py", "state.py", "cudnn.py", "timing.py", "device_order.py")
"""Folders and files of `owl_wms` whose sources shape a program: all that lowering a decoder loads. If one of them
changes, programs are built anew. `tests/runtime/test_counts.py` checks that none is missing.
"""


def key_material(decoder: nn.Module, request: Request) -> dict[str, Any]:
    """Returns what a program for `decoder` under `request` depends on.

    Args:
        decoder: any device and float dtype, weight norm live or folded; not changed.
        request: what is wanted.

    Raises:
        FastPathError: stage "export" when the decoder cannot be recorded or carries hooks; such a decoder has no
            program anyway.
    """
    recording = Recording.of(decoder, request.input_shape, request.state)
    machine = env.describe_machine(request.device_index)
    return {
        "schema": SCHEMA,
        "decoder": f"{type(decoder).__module__}.{type(decoder).__qualname__}",
        "graph": recording.digest(),
        "weights": weights_digest(decoder),
        "decoder_dtype": str(recording.dtype),
        "plans": [plan.name for plan in plans.named(request)],
        "sources": sources_digest(),
        "compile_settings": {at: compile_settings(request, at) for at in request.precisions()},
        "flavour": installed_flavour()[0],
        "machine": {name: machine[name] for name in MACHINE_FIELDS},
        **request.key_fields(),
    }


@functools.cache
def sources_digest() -> str:
    """SHA-256 over the names and bytes of the sources in `SOURCES`."""
    package = Path(inspect.getfile(importlib.import_module("owl_wms"))).parent
    found = [path for name in SOURCES for path in (package / name, *(package / name).rglob("*"))]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.suffix in (".py", ".cu", ".cuh")):
        for part in (str(path.relative_to(package)).encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()
