"""The latents that 8-bit plans are calibrated on: the user's file, or seeded ones.

Why a file and not a tensor: the build runs in a process of its own, and the cache key must cover what it was calibrated
on. The request carries the hash that the key holds, and the build refuses a file that was replaced since.
Only `.safetensors` is taken, which holds numbers and no code; `owl-wms encode` writes it.

Usage:
    z = calibration_latents(request, "cuda:0")      # [N, c, h, w] fp32, in the build process
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from owl_wms.errors import FastPathError
from owl_wms.request import SEEDED, Request
from owl_wms.trt.check.parity import latents

MOST = 64
"""Of a file with more, this many are taken, evenly spaced: each costs one fp32 decode."""
# Parity and timing use the seeds from `request.seed` on; steps must not be judged by the latents they were made from.
SEED_OFFSET = 1000
KEY = "latents"
FACTS = "owl_wms"  # key of a file's metadata, see docs/formats.md


def calibration_latents(request: Request, device: torch.device | str) -> Tensor:
    """`[N, c, h, w]` fp32 latents on `device`, c, h, w those of the request, times the `vae_scale` that a file states.

    Raises:
        FastPathError: stage "build" for a file that is missing, not `.safetensors`, without a tensor called `latents`,
            not finite, nothing but zeros, of another latent shape, or with another hash than
            `request.calibration_digest`.
    """
    one = request.input_shape[1:]
    if not request.calibration:
        return latents((SEEDED, *one), 1.0, torch.float32, device, request.seed + SEED_OFFSET)
    path = Path(request.calibration)
    remedy = f"write latents [..., {', '.join(map(str, one))}] as {KEY!r} of a .safetensors file (owl-wms encode does)"
    try:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if request.calibration_digest not in ("", digest):
            raise FastPathError(
                "build",
                f"calibration file {path} was replaced after the program's key was made",
                "start the build again; leave the file alone while it runs",
            )
        found = load(data)  # from the bytes that were hashed: the file is not opened again
        scale = _stated_scale(data)
    except FastPathError:
        raise
    except Exception as error:  # a missing or damaged file raises OSError or the reader's own SafetensorError
        raise FastPathError("build", f"calibration file {path}: {type(error).__name__}: {error}", remedy) from error
    if KEY not in found:
        raise FastPathError("build", f"calibration file {path} holds {', '.join(found) or 'nothing'}", remedy)
    z = found[KEY].float() * scale
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


def _stated_scale(data: bytes) -> float:
    """Returns the factor that makes a decoder's input of the latents in a `.safetensors` file: 1 if it states none."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads((header.get("__metadata__") or {}).get(FACTS, "{}"))
    return float(facts.get("vae_scale") or 1.0)
