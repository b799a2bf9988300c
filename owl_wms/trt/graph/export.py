"""From a lowered decoder to an ExportedProgram of one static shape.

Usage:
    exported = export_decoder(module, z)
    text = graph_text(exported)          # every operator with its arguments, shapes and dtypes: part of the cache key
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from owl_wms.errors import FastPathError


def export_decoder(module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """Exports the forward at the static shapes of `inputs`, in eval mode and without gradients.

    Args:
        module: a decoder or a part of one.
        inputs: latents, followed by the state where the decoder streams.

    Non-strict tracing: it follows Python as eager does, so a decoder needs no changes for Dynamo's sake.

    Raises:
        FastPathError: stage "export", with torch's reason.
    """
    try:
        with torch.no_grad():
            return torch.export.export(module.eval(), inputs, strict=False)
    except Exception as error:  # export raises its own dozen types, and whatever the decoder's forward raises
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise FastPathError(
            "export",
            f"{type(module).__name__} cannot be exported: {type(error).__name__}: {first}",
            "the decoder's forward must be traceable by torch.export for one static shape",
        ) from error


def graph_text(exported: ExportedProgram) -> str:
    """The graph as text, one line per node: operator, arguments, keyword arguments, shape and dtype of its value."""
    lines = []
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        lines.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {_describe(value)}")
    return "\n".join(lines)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {tuple(value.stride())}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_describe(item) for item in value) + "]"
    return repr(value) if isinstance(value, (int, float, bool, str, type(None))) else type(value).__name__
