"""Bootstrap of a build process without a GPU: the real worker, converters and partitioner, engines executed by
PyTorch.

Usage: python -c "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from tests.trt.build_child import main;
main(sys.argv[2:])" DIR FD The faults a test wants are named in the request's `seed`: see FAULTS."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch

from owl_wms.trt import plans
from tests.trt import cuda_stand_in

SECOND = "tensorrt again"
DEPTHWISE, SEGFAULT, HANG, DIE_IN_PARITY, DIE_IN_TIMING = 1, 2, 3, 4, 5
FAULTS = {
    DEPTHWISE: "refuse depthwise",
    SEGFAULT: "segfault on depthwise",
    HANG: "sleep",
    DIE_IN_PARITY: "segfault when the second program is held against the gate",
    DIE_IN_TIMING: "segfault when the second program is timed",
}


def depthwise(subgraph: torch.fx.GraphModule) -> bool:
    """Whether a 3x3 convolution with one channel a group is in the subgraph."""
    for node in subgraph.graph.nodes:
        if node.op == "call_function" and "convolution" in str(node.target) and node.args[-1] > 1:
            weight = (
                node.args[1].meta["val"] if "val" in node.args[1].meta else getattr(subgraph, str(node.args[1].target))
            )
            if weight.shape[1] == 1:
                return True
    return False


def second_plan() -> plans.Plan:
    """Another plan for every decoder, so that a build has two to compare."""
    return dataclasses.replace(plans.PLANS["tensorrt"], name=SECOND)


def main(arguments: list[str]) -> None:
    seed = json.loads((Path(arguments[0]) / "job.json").read_text())["request"]["seed"]

    def refuse(subgraph: torch.fx.GraphModule) -> str:
        if seed == HANG:
            signal.pause()
        if seed in (DEPTHWISE, SEGFAULT) and depthwise(subgraph):
            if seed == SEGFAULT:
                os.kill(os.getpid(), signal.SIGSEGV)
            return "Unable to create TensorRT execution context"
        return ""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    cuda_stand_in.install()
    plans.PLANS[SECOND] = second_plan()
    cuda_stand_in.run_engines_in_pytorch(refuse)
    from owl_wms.trt.build import worker
    from owl_wms.trt.build.child import main as child

    if seed in (DIE_IN_PARITY, DIE_IN_TIMING):
        judge = worker.Worker.judge

        def judged(self: worker.Worker, candidate: worker.Candidate, reference: worker.Reference) -> None:
            second = candidate.plan == SECOND
            if second and seed == DIE_IN_PARITY:
                candidate.program = die
            judge(self, candidate, reference)
            if second:
                candidate.program = die

        worker.Worker.judge = judged  # type: ignore[method-assign]

    sys.exit(child(arguments))
