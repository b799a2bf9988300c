"""`Recording`: what a decoder computes at one shape, found in one forward on the meta device.

Why one object: the cache key needs the text of the forward, a build needs the shapes inside it, and the question
whether the decoder is an ordinary one of its family needs the text again. The build process also compares the digest of
its own recording with the one in the key. A class that was altered in the caller's process only, or a file of weights
that turned into another decoder, shows there.

Usage:
    recording = Recording.of(decoder, (8, 128, 8, 8))
    recording.digest(), recording.shapes["blocks.0.up"]
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.trt.graph.export import export_decoder, graph_text
from owl_wms.trt.graph.record import record
from owl_wms.trt.graph.shapes import meta_copy, module_dtype, noted_shapes
from owl_wms.vae.fold import folded
from owl_wms.vae.meta import WeightNormShapes

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One forward of a decoder with weight norm folded; holds no weights.

    Attributes:
        text: `recorded` and every call and operator with all arguments, or `exported` and the text of torch.export's
            graph, where the forward cannot be followed on the meta device. The first word keeps the two apart.
        shapes: input shape of every submodule that is called with one tensor, by dotted name; None when exported.
        input_shape: `(B, c, h, w)` of the latents.
        state: shapes of a streaming decoder's state.
        dtype: of the decoder's parameters.
    """

    text: str
    shapes: Mapping[str, tuple[int, ...]] | None
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    state: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, decoder: nn.Module, input_shape: tuple[int, ...], state: tuple[tuple[int, ...], ...] = ()) -> Recording:
        """Run `decoder` once on the meta device: no weight is read, tens of milliseconds.

        Args:
            decoder: any device and float dtype, weight norm live or folded, eval or train mode; not changed.
            input_shape: static `(B, c, h, w)`.
            state: shapes of the state that the forward takes after the latents and returns after the frames.

        Raises:
            FastPathError: stage "export"; a module has a hook or a forward that is not its class's, neither way can
                follow the forward, or the state that it returns is not like the one that it takes.
        """
        require_unaltered(decoder)
        dtype = module_dtype(decoder)
        with torch.inference_mode(False), torch.no_grad():  # in a caller's inference mode other operators are recorded
            with WeightNormShapes():
                twin = folded(meta_copy(decoder)).eval().requires_grad_(False)
            inputs = meta_inputs(input_shape, state, dtype)
            shapes: Mapping[str, tuple[int, ...]] | None
            try:
                with noted_shapes(twin) as shapes:
                    text = f"recorded\n{record(twin, *inputs, inspect=functools.partial(_require_alike, inputs[1:]))}"
            except FastPathError:
                raise
            except Exception as error:  # an operator without a meta form, or whatever the forward itself raises
                raise_interrupt(error)
                _LOG.info("the forward of %s cannot be recorded, so it is exported: %s", type(decoder).__name__, error)
                text, shapes = f"exported\n{graph_text(export_decoder(twin, *inputs))}", None
        return cls(text=text, shapes=shapes, input_shape=tuple(input_shape), dtype=dtype, state=state)

    def digest(self) -> str:
        """SHA-256 of the text, 64 hex digits: the field `graph` of the key material."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def meta_inputs(
    input_shape: tuple[int, ...], state: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Returns latents and state without values."""
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in (input_shape, *state))


def _require_alike(state: tuple[torch.Tensor, ...], answered: Any) -> None:
    if not state:
        return
    following = answered[1:] if isinstance(answered, (tuple, list)) else ()
    took, gave = ([(list(t.shape), str(t.dtype)) for t in tensors] for tensors in (state, following))
    if took != gave:
        raise FastPathError(
            "export",
            f"the step takes a state of {took} and returns one of {gave}",
            "make the step return a state like the one that it takes",
        )


def require_unaltered(decoder: nn.Module) -> None:
    """Refuse a decoder with hooks. Plans take its weights and put other modules in the place of its own, so a hook on
    one of those would not be called.

    Raises:
        FastPathError: stage "export"; a module has a forward hook, or a forward that is not its class's.
    """
    for name, module in decoder.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked or "forward" in vars(module):
            what = "a forward hook" if hooked else "a forward of its own"
            where = f"its module {name}" if name else "the decoder"
            raise FastPathError(
                "export", f"{where} has {what}, which a compiled decoder would not call", "remove it to be compiled"
            )
