"""A captured program beside others that capture: its workspace is not freed under it, and it writes to its own memory.

In processes of their own, because what goes wrong here ends a process's use of its GPU.
"""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from owl_wms.runtime import VideoDecode
from owl_wms.settings import TensorRTConfig
from owl_wms.trt.check.parity import latents
from owl_wms.trt.run.cuda_graph import GraphedProgram
from tests.trt import decoders

pytestmark = pytest.mark.gpu

# Deep products over few rows, which cuBLAS cuts into parts that it sums up in its workspace.
CHILD = """
import sys, torch
from torch import nn
from owl_wms.trt.run.cuda_graph import GraphedProgram

def draw(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

torch.manual_seed(0)
down, up = draw(16384, 256) / 128, draw(256, 16384) / 16
for _ in range(3):  # each takes over the stream and the workspace of the one before
    graphed = GraphedProgram(lambda z: (z @ down).relu() @ up @ down, draw(256, 16384))
assert graphed.graphed, graphed.reason
z = draw(256, 16384)
wanted = graphed(z)

def clear():
    torch._C._cuda_clearCublasWorkspaces()

module = nn.Sequential(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 4096)).cuda()
neighbour = torch.compile(module, mode="reduce-overhead")

@torch.no_grad()
def record():
    torch.compiler.cudagraph_mark_step_begin()
    neighbour(torch.ones(64, 4096, device="cuda"))

disturb = {"clear": clear, "reduce-overhead": record}[sys.argv[1]]
for unmap in (False, True, False, False):
    disturb()
    if unmap:
        torch.cuda.empty_cache()
    # Whatever was freed just now is somebody else's from here on.
    others = [torch.full((mib << 18,), 7.0, device="cuda") for mib in (1, 2, 4, 8, 16, 32) for _ in range(8)]
    assert torch.equal(graphed(z), wanted), "another answer"
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others), "wrote to memory of others"
    del others
print("whole")
"""


@pytest.mark.parametrize("disturbance", ["clear", "reduce-overhead"])
@pytest.mark.timeout(150)
def test_a_graph_does_not_depend_on_workspaces_of_others(disturbance: str) -> None:
    command = [sys.executable, "-c", CHILD, disturbance]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140)
    assert done.stdout.split() == ["whole"], done.stderr[-2000:]


@torch.no_grad()
def test_a_graph_that_is_gone_leaves_no_workspace_behind() -> None:
    weight, z = (torch.randn(512, 512, device="cuda", dtype=torch.float16) for _ in range(2))

    def capture() -> int:
        graphed = GraphedProgram(lambda z: z @ weight, z)
        assert graphed.graphed, graphed.reason
        assert torch.equal(graphed(z), z @ weight)
        del graphed
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    capture()
    first = capture()
    assert [capture() - first for _ in range(4)] == [0] * 4


def test_a_callers_own_graph_holds_pytorchs_decode() -> None:
    decoder, shape = decoders.make("tiled")
    decoder = decoder.cuda().half()
    plain = VideoDecode(decoder, batch_size=2, settings=TensorRTConfig(enabled=False))
    decode = VideoDecode(decoder, batch_size=2)
    z = latents(shape, 1.0, torch.float16, "cuda")[None]
    plain(z)  # what is made once, cuDNN's plans for one, must not be made in a recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        frames = decode(z)
    z.copy_(latents(shape, 0.5, torch.float16, "cuda", seed=5)[None])
    graph.replay()
    assert torch.allclose(frames, plain(z), atol=0.02)
    assert decode.stats().builds == 0


# A capture that ends in an error, while the caller has random numbers to draw and a graph of its own that draws some.
FAILING = """
import sys, torch
from owl_wms.ops.common import streams
from owl_wms.trt.run.cuda_graph import GraphedProgram

cures = sys.argv[1:]
for name in ("_capture_nothing", "_renew_state"):
    if name not in cures:
        setattr(streams, name, lambda generator: None)

def numbers():
    return torch.randn(9, device="cuda")

x, stream = torch.ones(64, device="cuda"), torch.cuda.Stream()
own = torch.cuda.CUDAGraph()
with torch.cuda.graph(own):
    dropped = torch.nn.functional.dropout(x, 0.5)

def course(between):
    torch.manual_seed(11)
    seen = []
    for between_them in (lambda: None, between, lambda: None):
        between_them()
        seen.append(numbers())
        if "_capture_nothing" in cures:  # a graph keeps the state that it was captured with
            own.replay()
            seen.append(dropped.clone())
    return seen

def fail():
    def program(z):
        torch.cuda.synchronize()  # not allowed in a capture, which it ends
        return 2 * z
    graphed = GraphedProgram(program, x)
    assert not graphed.graphed
    assert torch.equal(graphed(x), 2 * x)

wanted = course(lambda: None)
for _ in range(2):
    assert all(map(torch.equal, course(fail), wanted)), "other numbers"
good = GraphedProgram(lambda z: z @ torch.eye(64, device="cuda"), torch.ones(1, 64, device="cuda"))
assert good.graphed, good.reason
with torch.cuda.stream(stream):  # memory that another stream has used is used again: nothing waits for a capture
    side = torch.ones(1 << 20, device="cuda")
side.record_stream(torch.cuda.current_stream())
torch.cuda.synchronize()
place = side.data_ptr()
del side
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    assert torch.ones(1 << 20, device="cuda").data_ptr() == place, "its memory is lost"
print("whole")
"""


@pytest.mark.parametrize("cures", [("_capture_nothing", "_renew_state"), ("_renew_state",)])
@pytest.mark.timeout(100)
def test_random_numbers_go_on_after_a_capture_that_failed(cures: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING, *cures], capture_output=True, text=True, timeout=90)
    assert done.stdout.split() == ["whole"], done.stderr[-2000:]
