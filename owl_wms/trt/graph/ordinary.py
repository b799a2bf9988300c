"""Whether a decoder does what its configuration says, and nothing besides.

Why it exists: the fused forms are made from a decoder's weights and configuration, not from its forward. A subclass, a
module that somebody exchanged or a clamp that somebody added would be lost in them, and the parity gate sees what the
seeded latents reach and no more. So the decoder is compared with a fresh one of its configuration, operator by operator
(`record.py`; no weight is read, tens of milliseconds after the first).

Usage:
    is_ordinary(folded, (8, 128, 8, 8))
"""

from __future__ import annotations

import torch
from torch import nn

from owl_wms.trt.graph.record import record
from owl_wms.trt.graph.shapes import meta_copy, module_dtype
from owl_wms.vae import build_decoder, fold_weight_norm
from owl_wms.vae.dcae import DCAEDecoder
from owl_wms.vae.distill import DistillDecoder


def is_ordinary(decoder: DCAEDecoder | DistillDecoder, input_shape: tuple[int, ...]) -> bool:
    """True when decoding latents of `input_shape` is the same list of operators, arguments, shapes and dtypes; False
    also for a decoder whose forward cannot be followed.

    Args:
        decoder: weight norm live or folded, eval or train mode, any memory format.
        input_shape: `(B, c, h, w)`.
    """
    with torch.device("meta"):
        fresh = build_decoder(decoder.config, variant=decoder.variant if isinstance(decoder, DCAEDecoder) else None)
    z = torch.empty(input_shape, dtype=module_dtype(decoder), device="meta")
    with torch.inference_mode(False), torch.no_grad():
        try:
            lines = [record(_plain(module, z.dtype), z) for module in (decoder, fresh)]
        except Exception:  # whatever a forward of somebody's own raises on the meta device
            return False
    return lines[0] == lines[1]


def _plain(decoder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """On the meta device, without weight norm, in one dtype and memory format."""
    twin = fold_weight_norm(meta_copy(decoder)).eval().requires_grad_(False).to(dtype)
    return twin.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
