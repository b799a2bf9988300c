"""`stage_products`: which stages it takes and what it needs, its kernel on a GPU of compute capability 9.0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from owl_wms.ops import stage, stage_products
from owl_wms.ops.stage_tail.plan import SHARED_LIMIT
from tests.ops.test_gpu import DTYPES, LIMIT, close, poison
from tests.ops.test_references import arguments

# batch, height, width, C: less than a tile, its border, several tiles a block, odd sizes
SHAPES = [
    (1, 1, 1, 32),
    (1, 8, 8, 64),
    (2, 5, 13, 96),
    (1, 64, 66, 96),
    (3, 131, 67, 96),
    (4, 96, 128, 64),
    (1, 1, 1, 128),
    (2, 5, 13, 192),
    (1, 64, 65, 192),
    (2, 131, 67, 192),
    (3, 96, 128, 128),
]


def inputs(batch: int, height: int, width: int, channels: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    x = torch.randn(batch, height, width, 2 * channels, device=device)
    proj = torch.randn(channels, 2 * channels, device=device) * (2 * channels) ** -0.5
    w1 = torch.randn(2 * channels, channels, device=device) * channels**-0.5
    return tuple(value.to(dtype) for value in (x, proj, w1, torch.randn(2 * channels, device=device)))


@pytest.mark.parametrize("channels", stage_products.WIDTHS)
def test_a_block_fits_a_multiprocessor(channels: int) -> None:
    assert stage_products.kernel_of(torch.bfloat16, channels).shared_bytes <= SHARED_LIMIT


def test_it_takes_a_stages_products_on_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_products, "has_kernel", lambda x: x.dtype != torch.float32)
    monkeypatch.setattr(stage_products, "is_hopper", lambda _: True)
    x, proj, w1, _ = inputs(1, 2, 3, 96, torch.bfloat16, "cpu")
    assert stage_products.fits(x, proj, w1)
    assert not stage_products.fits(x.float(), proj.float(), w1.float())
    assert not stage_products.fits(x, proj, w1.half())
    assert not stage_products.fits(x, proj, w1[:96])
    assert not stage_products.fits(x[..., :96], proj[:, :96], w1)
    assert not stage_products.fits(*inputs(1, 2, 3, 384, torch.bfloat16, "cpu")[:3])
    monkeypatch.setattr(stage_products, "is_hopper", lambda _: False)
    assert not stage_products.fits(x, proj, w1)


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = inputs(*shape, dtype, "cuda")
    x, proj, w1, b1 = (value.double() for value in values)
    for elements in (x.numel(), x.numel() // 2):
        poison(elements)
    low, hidden = stage_products.launch(*values)
    close(low, x @ proj.t(), LIMIT[dtype])
    close(hidden, low.double() @ w1.t() + b1, LIMIT[dtype])
    for _ in range(10):
        again = stage_products.launch(*values)
        assert torch.equal(again[0], low)
        assert torch.equal(again[1], hidden)


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [96, 192])
def test_a_stage_uses_it_and_replays_it(channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(1, 2, True, dtype, "cuda", channels)
    seen: list[int] = []
    launch = stage_products.launch
    monkeypatch.setattr(stage_products, "launch", lambda *a: seen.append(1) or launch(*a))
    want = torch.ops.owl_wms.stage(*values)
    assert seen
    apart = stage._two_products(values[0], values[2], values[3][0], values[4][0])
    for got, wanted in zip(launch(values[0], values[2], values[3][0], values[4][0]), apart, strict=True):
        close(got, wanted, LIMIT[dtype])
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.ops.owl_wms.stage(*values)
    with torch.cuda.graph(graph):
        got = torch.ops.owl_wms.stage(*values)
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, want)
