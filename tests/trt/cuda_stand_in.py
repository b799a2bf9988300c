"""A stand-in for torch.cuda's queries, so that Torch-TensorRT imports, converts and partitions on a machine without a
GPU.

Everything but execution is real: converters, lowering passes, the partitioner, TensorRT's own network and builder. Only
deserializing an engine needs a GPU. Installed in a process of its own, because it changes torch.cuda for good.

Usage (first lines of a child process):
    from tests.trt import cuda_stand_in
    cuda_stand_in.install()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

PROPERTIES = SimpleNamespace(
    name="stand-in sm_90", major=9, minor=0, total_memory=141 * 2**30, multi_processor_count=132, gcnArchName=""
)


def install() -> None:
    """Replace the queries, import Torch-TensorRT, and let it place PyTorch subgraphs on the CPU."""
    answers = {
        "get_device_capability": (9, 0),
        "get_device_name": PROPERTIES.name,
        "get_device_properties": PROPERTIES,
        "mem_get_info": (130 * 2**30, 141 * 2**30),
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "synchronize": None,
        "set_device": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_args, _answer=answer, **_kwargs: _answer)

    from owl_wms.trt.library import importer

    importer.require()
    cpu = torch.device("cpu")
    importer.submodule("dynamo._compiler").to_torch_device = lambda _device: cpu


class _EngineBytes:
    """A serialized engine that nobody can run here, behind the one method the conversion asks of it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def serialize(self) -> Any:
        return self.data

    def get_aliased_input_tensor(self, _output: str) -> None:
        """No output shares memory with an input (asked from 2.14 on)."""


@contextlib.contextmanager
def engines_as_bytes() -> Iterator[None]:
    """Inside the block a built engine stays serialized, since deserializing it is what needs a GPU."""
    from owl_wms.trt.library import importer

    tensorrt = importer.submodule("dynamo.conversion._TRTInterpreter").trt
    original = tensorrt.Runtime
    tensorrt.Runtime = lambda *_args: SimpleNamespace(deserialize_cuda_engine=_EngineBytes)
    try:
        yield
    finally:
        tensorrt.Runtime = original


def run_engines_in_pytorch(refuse: Callable[[torch.fx.GraphModule], str] = lambda _subgraph: "") -> None:
    """From now on a TensorRT subgraph is executed as the PyTorch graph it came from, so that a whole build runs on the
    CPU.

    Args:
        refuse: called with every subgraph that would become an engine; a non-empty answer makes its build fail with
            that reason.
    """
    from owl_wms.trt.library import importer

    compiler = importer.submodule("dynamo._compiler")

    def convert(subgraph: torch.fx.GraphModule, *_args: Any, **_kwargs: Any) -> torch.fx.GraphModule:
        reason = refuse(subgraph)
        if reason:
            raise RuntimeError(reason)
        subgraph.set_output_tensors_as_unowned = lambda _flag: None  # type: ignore[assignment]
        return subgraph

    compiler.convert_module = convert
