"""The latents that 8-bit plans are calibrated on: the user's file, or seeded ones.

Why a file and not a tensor: the build runs in a child process and the cache key must cover what it was calibrated on,
so both read the same bytes: the child is told the hash that the key holds, and refuses a file that was replaced since.
Only `.safetensors` is taken, which holds numbers and no code; `owl-wms encode` writes it.

Usage:
    material["calibration"] = calibration_digest(spec)
    spec = dataclasses.replace(spec, calibration_digest=material["calibration"])
    z = calibration_latents(spec, "cuda:0")      # [N, c, h, w] fp32, in the building process
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from owl_wms.errors import FastPathError
from owl_wms.trt.check.parity import latents
from owl_wms.trt.spec import BuildSpec

SEEDED = 16
"""Seeded normal latents drawn where no file is given."""
MOST = 64
"""Of a file with more, this many are taken, evenly spaced: each costs one fp32 decode."""
# Parity and timing use the seeds from `spec.seed` on; steps must not be judged by the latents they were made from.
SEED_OFFSET = 1000
KEY = "latents"


def calibration_latents(spec: BuildSpec, device: torch.device | str) -> Tensor:
    """`[N, c, h, w]` fp32 latents on `device`, c, h, w those of the spec.

    Raises:
        FastPathError: stage "build" for a file that is missing, not `.safetensors`, without a tensor called `latents`,
            not finite, nothing but zeros, of another latent shape, or with another hash than `spec.calibration_digest`.
    """
    one = spec.input_shape[1:]
    if not spec.calibration:
        return latents((SEEDED, *one), 1.0, torch.float32, device, spec.seed + SEED_OFFSET)
    path = Path(spec.calibration)
    remedy = f"write latents [..., {', '.join(map(str, one))}] as {KEY!r} of a .safetensors file (owl-wms encode does)"
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if spec.calibration_digest not in ("", digest):
            raise FastPathError(
                "build",
                f"calibration file {path} was replaced after the program's key was made",
                "start the build again; leave the file alone while it runs",
            )
        found = load(data)  # from the bytes that were hashed: the file is not opened again
    except FastPathError:
        raise
    except Exception as error:  # a missing or damaged file raises OSError or the reader's own SafetensorError
        raise FastPathError("build", f"calibration file {path}: {type(error).__name__}: {error}", remedy) from error
    if KEY not in found:
        raise FastPathError("build", f"calibration file {path} holds {', '.join(found) or 'nothing'}", remedy)
    z = found[KEY].float()
    if z.dim() < 4 or tuple(z.shape[-3:]) != one or not z.numel():
        raise FastPathError("build", f"calibration file {path} holds latents {list(z.shape)}", remedy)
    if not z.isfinite().all():
        raise FastPathError("build", f"calibration file {path} holds values that are not finite", remedy)
    flat = z.reshape(-1, *one)
    step = -(-len(flat) // MOST)
    taken = flat[::step]
    if not taken.any():  # they reach nowhere: any other latent would reach infinitely further
        raise FastPathError("build", f"calibration file {path} holds nothing but zeros", remedy)
    return taken.contiguous().to(device)


def calibration_digest(spec: BuildSpec) -> str:
    """SHA-256 of the file's bytes, or how many latents are seeded. A file that cannot be read says so, as a value of
    its own: the build will name the reason.
    """
    if not spec.calibration:
        return f"seeded {SEEDED}"
    try:
        return hashlib.sha256(Path(spec.calibration).read_bytes()).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"
