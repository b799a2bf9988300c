"""Everything a program depends on, as one JSON-ready dict that the cache hashes.

Why it exists: Torch-TensorRT's own cache key leaves out weights, operator arguments, GPU and TensorRT version, so two
different decoders can get each other's engine. Here a field that is missing is a wrong picture; a field too many is a
rebuild. The graph is that of the folded decoder, exported on the meta device (no weights, under a second), with all
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms import env
from owl_wms.trt import plans
from owl_wms.trt.calibration import calibration_digest
from owl_wms.trt.export import export_decoder, graph_text
from owl_wms.trt.importer import installed_flavour
from owl_wms.trt.shapes import meta_copy, module_dtype
from owl_wms.trt.spec import EIGHT_BITS, BuildSpec
from owl_wms.vae import fold_weight_norm

SCHEMA = 1
"""Raised when a program of the same material would be read differently."""

MACHINE_FIELDS = (
    "torch", "triton", "torch_tensorrt", "tensorrt", "cuda", "cudnn", "driver", "gpu", "compute_capability", "sm_count",
    "python",
)  # fmt: skip


def key_material(decoder: nn.Module, spec: BuildSpec) -> dict[str, Any]:
    """What a program for `decoder` under `spec` depends on.

    Args:
        decoder: any device and float dtype, weight norm live or folded; not changed.
        spec: the request.

    Raises:
        FastPathError: stage "export" when the decoder cannot be traced; such a decoder has no program anyway.
    """
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
    """Text of the folded decoder's exported graph at the static shape, with every argument; no weight is read."""
    twin = fold_weight_norm(meta_copy(decoder)).eval().requires_grad_(False)
    z = torch.empty(spec.input_shape, dtype=module_dtype(decoder), device="meta")
    return graph_text(export_decoder(twin, z))


def weights_digest(decoder: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and bytes of every parameter, buffer and plain tensor attribute, by name."""
    found: dict[str, Tensor] = {}
    for name, child in decoder.named_modules():
        own = [*child._parameters.items(), *child._buffers.items(), *vars(child).items()]
        found.update({f"{name}.{key}": value for key, value in own if isinstance(value, Tensor)})
    digest = hashlib.sha256()
    for name, tensor in sorted(found.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


@functools.cache
def sources_digest() -> str:
    """SHA-256 over the sources that shape a program: `owl_wms/trt`, `owl_wms/ops` and the weight-norm folding."""
    package = Path(inspect.getfile(importlib.import_module("owl_wms"))).parent
    kernels = [path for path in (package / "ops").rglob("*") if path.suffix in (".py", ".cu", ".cuh")]
    files = [*(package / "trt").rglob("*.py"), *kernels, package / "vae" / "fold.py"]
    return _sha256(
        part for path in sorted(files) for part in (str(path.relative_to(package)).encode(), path.read_bytes())
    )


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
