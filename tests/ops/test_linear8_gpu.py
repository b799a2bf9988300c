"""`linear8`'s CUDA kernel on a GPU of compute capability 9.0: every kind of variant, odd shapes, repeated runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from owl_wms.ops import codes, linear8
from owl_wms.ops.linear8 import fitting, run_plan
from tests.ops.test_codes import gains, some_codes
from tests.ops.test_codes_gpu import lost, near, operands, spoil

pytestmark = pytest.mark.gpu
OPS = torch.ops.owl_wms
FORMATS = list(codes.FORMATS.values())
FORMAT_NAMES = list(codes.FORMATS)
ELEMENTS = [torch.bfloat16, torch.float16]
# batch, height, width, depth, channels
SHAPES = [
    (1, 1, 1, 16, 256),
    (2, 5, 7, 48, 48),
    (3, 9, 13, 80, 112),
    (2, 7, 19, 144, 208),
    (1, 33, 31, 528, 256),
    (3, 40, 37, 256, 512),
    (2, 50, 31, 512, 256),
    (2, 30, 31, 512, 1024),
    (2, 31, 30, 1024, 512),
    (1, 9, 16, 1024, 2048),
]
# batch, height, width, depth, channels, channels of the shortcut
WITH_SHORTCUT = [
    (1, 2, 2, 64, 64, 64),
    (2, 4, 34, 96, 64, 64),
    (2, 6, 70, 64, 128, 256),
    (1, 2, 40, 32, 256, 256),
    (2, 36, 66, 512, 256, 512),
    (2, 26, 40, 1024, 512, 1024),
]


@pytest.fixture(autouse=True)
def _hopper_and_fresh_inputs() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")
    torch.seed()
    torch.cuda.manual_seed(torch.initial_seed() % 2**31)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the bit."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_leaky_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *pixels, depth, channels = shape
    x, weight, scale, bias, gain = operands(dtype, (*pixels, depth), channels)
    plan = fitting(depth, channels, False, True, 0)
    assert plan is not None
    want = linear8.reference(x, weight, scale, bias, gain)
    spoil(want.numel())
    got = run_plan(plan, x, weight, scale, bias, gain)
    assert got is not None
    near(got, want, dtype, lost(x, weight) * scale)
    assert all(same(run_plan(plan, x, weight, scale, bias, gain), got) for _ in range(5)), "runs differ"


def adds(shape: tuple[int, ...], shortcut: int, with_codes: bool, dtype: torch.dtype, element: torch.dtype) -> None:
    """One addition against the reference, several times."""
    *pixels, depth, channels = shape
    x, weight, scale, _, gain = operands(dtype, (*pixels, depth), channels)
    u = torch.randn(*pixels, channels, device="cuda").to(element)
    inverse = torch.rand(channels, device="cuda") * 2 if with_codes else None
    half = (pixels[0], pixels[1] // 2, pixels[2] // 2)
    more = torch.randn(*half, shortcut, device="cuda").to(element) if shortcut else None
    plan = fitting(depth, channels, True, with_codes, shortcut)
    assert plan is not None
    total, made = linear8.add_reference(u, x, weight, scale, gain, inverse, more)
    results = []
    for _ in range(5):
        mine = u.clone()
        spoil(u.numel())
        results.append((mine, run_plan(plan, x, weight, scale, inverse, gain, mine, more)))
    mine, found = results[0]
    assert mine.isfinite().all()
    assert (mine.double() - total.double()).norm() < 2e-3 * total.double().norm()
    if made is not None:
        assert found is not None
        assert inverse is not None
        near(found, made, dtype, lost(x, weight) * scale * inverse)
    assert all(same(a, mine) and same(b, found) for a, b in results), "runs differ"


@pytest.mark.parametrize("element", ELEMENTS, ids=["bf16", "fp16"])
@pytest.mark.parametrize("with_codes", [True, False], ids=["codes", "plain"])
@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3:] != (1024, 2048)], ids=str)
def test_additions(shape: tuple[int, ...], dtype: torch.dtype, with_codes: bool, element: torch.dtype) -> None:
    adds(shape, 0, with_codes, dtype, element)


@pytest.mark.parametrize("element", ELEMENTS, ids=["bf16", "fp16"])
@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("shape", WITH_SHORTCUT, ids=str)
def test_additions_with_a_shortcut(shape: tuple[int, ...], dtype: torch.dtype, element: torch.dtype) -> None:
    adds(shape[:5], shape[5], False, dtype, element)


@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
def test_the_op_takes_whatever_lies_in_memory_and_repeats_in_a_graph(dtype: torch.dtype) -> None:
    x, weight, scale, bias, gain = operands(dtype, (2, 24, 31, 256), 512)
    want = OPS.linear8(x, weight, scale, bias, gain)
    shifted = torch.empty(x.numel() + 8, device="cuda", dtype=dtype)[8:].view(x.shape)
    shifted.copy_(x)
    assert same(OPS.linear8(shifted, weight, scale, bias, gain), want), "rows at odd addresses"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPS.linear8(x, weight, scale, bias, gain)
    x.copy_(some_codes(*x.shape, dtype=dtype, device="cuda"))
    graph.replay()
    assert same(out, OPS.linear8(x, weight, scale, bias, gain))


@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
def test_an_image_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    x, weight, scale, bias, _ = operands(dtype, (3, 9, 11, 256), 512)
    gain = gains(3, "cuda")
    got = OPS.linear8(x, weight, scale, bias, gain)
    for i in range(3):
        assert same(OPS.linear8(x[i : i + 1], weight, scale, bias, gain[i : i + 1]), got[i : i + 1])


@pytest.mark.parametrize("shortcut", [512, 64])
def test_the_op_adds_a_shortcut_with_or_without_a_plan(shortcut: int) -> None:
    x, weight, scale, _, gain = operands(torch.int8, (2, 12, 34, 512), 256)
    u = torch.randn(2, 12, 34, 256, device="cuda").bfloat16()
    more = torch.randn(2, 6, 17, shortcut, device="cuda").bfloat16()
    for inverse in (None, torch.rand(256, device="cuda")):
        total, made = linear8.add_reference(u, x, weight, scale, gain, inverse, more)
        mine = u.clone()
        found = linear8.add_linear8_(mine, x, weight, scale, gain, inverse, more)
        assert (mine.double() - total.double()).norm() < 4e-3 * total.double().norm()
        assert (found is None) == (made is None)
