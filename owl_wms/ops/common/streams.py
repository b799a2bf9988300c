"""Streams for capturing CUDA graphs."""

from __future__ import annotations

import torch

from owl_wms.ops.common import nvrtc


def own_stream() -> torch.cuda.Stream:
    """Returns a stream of the current device that nothing else in this process runs on, before or after.

    torch keeps one cuBLAS workspace for each handle and stream, and a captured product keeps that workspace's address.
    The streams that torch hands out are shared, and have a workspace as soon as anything was multiplied on them: memory
    outside of the graph, which `torch.compile(mode="reduce-overhead")` anywhere in the process frees when it records
    (torch._inductor.cudagraph_trees.clear_cublass_cache). A replay then reads and writes what is no longer its own. On
    a stream of its own the capture's first product takes its workspace from the graph's memory, where it stays.

    Never destroyed: a later stream could get its address, and with it the workspace of a graph that is gone.
    """
    return torch.cuda.ExternalStream(nvrtc.new_stream(), device=torch.cuda.current_device())
