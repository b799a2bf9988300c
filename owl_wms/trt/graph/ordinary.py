"""Checks that a decoder runs exactly the operators of a new decoder built from its configuration.

Why it exists: the fused forms are made from a decoder's weights and configuration, not from its forward. They would
lose anything that a subclass, an exchanged module or an added clamp does, and the parity check sees only as much of
that as the seeded latents reach. So the recording of the decoder is compared with that of the new one, operator by
operator.

Usage:
    is_ordinary(decoder, Recording.of(decoder, shape), fused.dcae.standard)
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from owl_wms.interrupts import raise_interrupt
from owl_wms.trt.graph.record import record
from owl_wms.trt.graph.recording import Recording, meta_inputs
from owl_wms.trt.graph.shapes import meta_copy
from owl_wms.vae.fold import folded
from owl_wms.vae.meta import WeightNormShapes

_LOG = logging.getLogger(__name__)


def is_ordinary(decoder: nn.Module, recording: Recording, standard: Callable[[nn.Module], nn.Module]) -> bool:
    """True when `decoder` runs the same operators as `standard(decoder)`, with the same arguments, shapes and dtypes.
    False also for a decoder whose forward cannot be recorded.

    Args:
        decoder: any device, weight norm live or folded.
        recording: of the decoder as its caller runs it, in its own dtype.
        standard: makes a new decoder of the same configuration; called with the meta device as default.
    """
    with torch.device("meta"), WeightNormShapes():
        fresh = standard(decoder)
    inputs = meta_inputs(recording.input_shape, recording.state, recording.dtype)
    with torch.inference_mode(False), torch.no_grad():
        try:
            wanted = f"recorded\n{record(_plain(fresh, recording.dtype), *inputs)}"
            # Another memory order, or parts in another dtype, make another text of the same operators.
            return (
                recording.text == wanted or f"recorded\n{record(_plain(decoder, recording.dtype), *inputs)}" == wanted
            )
        except Exception as error:  # whatever a forward of somebody's own raises on the meta device
            raise_interrupt(error)
            _LOG.info("%s cannot be compared with a new one: %s", type(decoder).__name__, error)
            return False


def _plain(decoder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """On the meta device, without weight norm, in one dtype and memory format."""
    with WeightNormShapes():
        twin = folded(meta_copy(decoder)).eval().requires_grad_(False).to(dtype)
    return twin.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]
