"""Everything a program depends on, as one JSON-ready dict that the cache hashes.

Why it exists: Torch-TensorRT's own cache key leaves out weights, operator arguments, GPU and TensorRT version, so two
different decoders can get each other's engine. Here a field that is missing is a wrong picture; a field too many is a
rebuild. The graph is that of the folded decoder, recorded on the meta device (no weights, milliseconds), with all
arguments, shapes and dtypes; what the rewrites make of it is covered by the hash of our own sources.

Usage:
    material = key_material(decoder, spec)
    key = owl_wms.cache.cache_key(material)
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_wms import env
from owl_wms.settings import EIGHT_BITS
from owl_wms.trt import plans
from owl_wms.trt.check.calibration import calibration_digest
from owl_wms.trt.graph.digest import weights_digest
from owl_wms.trt.graph.export import export_decoder, graph_text
from owl_wms.trt.graph.record import record
from owl_wms.trt.graph.shapes import meta_copy, module_dtype
from owl_wms.trt.library.importer import installed_flavour
from owl_wms.trt.spec import BuildSpec
from owl_wms.vae import fold_weight_norm

SCHEMA = 2
"""Raised when a program of the same material would be read differently."""

MACHINE_FIELDS = (
    "torch", "triton", "torch_tensorrt", "tensorrt", "cuda", "cudnn", "driver", "gpu", "compute_capability", "sm_count",
    "python",
)  # fmt: skip
_LOG = logging.getLogger(__name__)


def key_material(decoder: nn.Module, spec: BuildSpec) -> dict[str, Any]:
    """What a program for `decoder` under `spec` depends on.

    Args:
        decoder: any device and float dtype, weight norm live or folded; not changed.
        spec: the request.

    Raises:
        FastPathError: stage "export" when the decoder cannot be traced or carries hooks; such a decoder has no program
            anyway.
    """
    plans.require_unaltered(decoder)
    machine = env.describe_machine(spec.device_index)
    return {
        "schema": SCHEMA,
        "decoder": f"{type(decoder).__module__}.{type(decoder).__qualname__}",
        "graph": _sha256([graph_of(decoder, spec).encode()]),
        "weights": weights_digest(decoder),
        "input_shape": list(spec.input_shape),
        "decoder_dtype": str(module_dtype(decoder)),
        "precision": spec.precision,
        "plans": [plan.name for plan in plans.PLANS.values() if not spec.plans or plan.name in spec.plans],
        "sources": sources_digest(),
        "compile_settings": {p: spec.compile_settings(p) for p in spec.wanted_precisions()},
        "build": {
            "isolation_seconds": spec.isolation_seconds, "isolation_tries": spec.isolation_tries, "seed": spec.seed,
            "timeout_seconds": spec.timeout_seconds,
        },
        "calibration": calibration_digest(spec) if spec.precision in EIGHT_BITS else "",
        "flavour": installed_flavour()[0],
        "machine": {name: machine[name] for name in MACHINE_FIELDS},
    }  # fmt: skip


def graph_of(decoder: nn.Module, spec: BuildSpec) -> str:
    """Text of what the folded decoder does at the static shape, with every argument; no weight is read.

    `record` has what torch.export's graph has, and more (see there), in milliseconds. What it cannot follow is exported
    after all; the first line says which, so the two never meet.

    Raises:
        FastPathError: stage "export" when neither can follow the forward.
    """
    with torch.inference_mode(False), torch.no_grad():  # in a caller's inference mode other operators are recorded
        twin = fold_weight_norm(meta_copy(decoder)).eval().requires_grad_(False)
        z = torch.empty(spec.input_shape, dtype=module_dtype(decoder), device="meta")
        try:
            return f"recorded\n{record(twin, z)}"
        except Exception as error:  # an operator without a meta form, or whatever the forward raises on the meta device
            _LOG.debug("the forward of %s is exported for the key: %s", type(decoder).__name__, error)
        return f"exported\n{graph_text(export_decoder(twin, z))}"


@functools.cache
def sources_digest() -> str:
    """SHA-256 over the sources that shape a program: `trt`, `fused`, `ops`, and further files that lowering uses."""
    package = Path(inspect.getfile(importlib.import_module("owl_wms"))).parent
    kernels = [path for path in (package / "ops").rglob("*") if path.suffix in (".py", ".cu", ".cuh")]
    single = [package / name for name in ("cudnn.py", "timing.py", "vae/autoencoder_dc.py", "vae/fold.py")]
    files = [*(package / "trt").rglob("*.py"), *(package / "fused").rglob("*.py"), *kernels, *single]
    return _sha256(
        part for path in sorted(files) for part in (str(path.relative_to(package)).encode(), path.read_bytes())
    )


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
