"""Decoders on our ops: they run by themselves, under a CUDA graph, or inside a compiled program, without TensorRT.

A decoder family has one module here, named in `FORMS`, with
    supports(decoder) -> (bool, why not)             # cheap, on any device; weight norm live or folded
    fuse(decoder, dtype, input_shape) -> nn.Module   # folded fp32 decoder on its device, not changed
and, where the form is made from the configuration and not from the forward,
    standard(decoder) -> nn.Module                   # a new decoder of the same configuration, random weights

Usage:
    form, why = form_of(decoder)
    if form is not None:
        fast = form.fuse(decoder, torch.bfloat16, (8, 128, 8, 8))
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn

FORMS = ("owl_wms.fused.dcae", "owl_wms.fused.sana", "owl_wms.fused.taehv")
"""Modules with the fused form of a decoder family; the first that supports a decoder is taken."""


def form_of(decoder: nn.Module) -> tuple[ModuleType | None, str]:
    """The module of `FORMS` that supports `decoder`, or None and the reason of each that does not. Never raises."""
    reasons = []
    for name in FORMS:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # no Triton, or one that does not fit this torch: no program of ours can run either
            return None, f"our fused operators cannot be imported: {type(error).__name__}: {error}"
        supported, reason = module.supports(decoder)
        if supported:
            return module, ""
        reasons.append(reason)
    return None, "; ".join(reasons)
