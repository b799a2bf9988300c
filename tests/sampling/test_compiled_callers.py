"""A caller under torch.compile, and a compiled core: Dynamo stays outside of samplers and meets no break in a core."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.nn.kv_cache import KVCache
from owl_wms.sampling import AVCachingSampler, AVWindowSampler, CausalAVWindowSampler
from tests.world import inputs, tiny_core

SAMPLERS = {
    "caching": AVCachingSampler(2, 1.3, 4),
    "window": AVWindowSampler(2, 1.3, 8, 4),
    "causal": CausalAVWindowSampler(2, 1.3, 8, 4),
}


class Recording:
    """A backend that runs what it gets as it is and counts graphs and their operators."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = self.operators = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        self.graphs += 1
        self.operators += sum(node.op.startswith("call") for node in graph.graph.nodes)
        return graph.forward


X, T, MOUSE, BUTTONS = inputs(1, 8)


def clip(name: str, core: Any) -> Tensor:
    context = (X[:, :4],) if name == "caching" else (X[:, :4], None)
    return SAMPLERS[name](core, *context, MOUSE, BUTTONS).latents


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_compiled_caller_gets_the_clip_and_compiles_its_own_part(name: str) -> None:
    core, backend = tiny_core(n_layers=2), Recording()
    compiled = torch.compile(lambda: clip(name, core) * 2, backend=backend)
    torch.manual_seed(0)
    wanted = clip(name, core) * 2
    torch.manual_seed(0)
    assert torch.equal(compiled(), wanted)
    assert backend.operators == 2, "the slice and the product are the caller's"


def test_a_compiled_core_stays_compiled_inside_a_sampler() -> None:
    core, backend = tiny_core(n_layers=2), Recording()
    torch.manual_seed(0)
    wanted = clip("window", core)
    torch.manual_seed(0)
    assert torch.equal(clip("window", torch.compile(core, backend=backend)), wanted)
    assert backend.operators > 100


@pytest.mark.parametrize("window", [None, 6])
def test_a_core_with_a_cache_is_one_graph(window: int | None) -> None:
    core = tiny_core(n_layers=3)
    cache = KVCache(core.config, max_window=window)
    backend = Recording()
    with torch.no_grad():
        core(X[:, :4], T[:, :4], MOUSE[:, :4], BUTTONS[:, :4], kv_cache=cache)
        cache.disable_cache_updates()
        new = X[:, 4:5], T[:, 4:5], MOUSE[:, 4:5], BUTTONS[:, 4:5]
        wanted = core(*new, kv_cache=cache)
        assert torch.equal(torch.compile(core, backend=backend)(*new, kv_cache=cache), wanted)
    assert backend.graphs == 1
