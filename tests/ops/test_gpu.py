"""The kernels on a GPU: odd shapes, poisoned outputs, fresh inputs, both types, graph capture, whole decoders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from owl_wms.fused.dcae import fuse
from owl_wms.ops import conv_out, enlarging_both, frame_bytes, grouped_conv, resize, stage, up_residual
from owl_wms.ops.common import gpu
from tests.ops.decoders import dcae, distill
from tests.ops.test_references import arguments

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def _fresh_inputs() -> None:
    torch.seed()
    torch.cuda.manual_seed(torch.initial_seed() % 2**31)


@pytest.fixture(autouse=True, params=[None, (8, 0), (8, 9)], ids=["this", "as-8.0", "as-8.9"])
def _gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """This GPU's kernels, and those of older ones, which its driver translates."""
    older = request.param
    if older is not None and older >= torch.cuda.get_device_capability():
        pytest.skip("this GPU is not newer")
    with contextlib.nullcontext() if older is None else gpu.treated_as(older):
        yield


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def poison(elements: int) -> None:
    """Leave NaN in the block that the allocator hands out next for an output of this size."""
    block = torch.full((elements,), float("nan"), device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    del block


def close(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.isfinite().all(), "not every element was written"
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < limit, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "up2"),
    [
        ((2, 5, 7, 48), False),
        ((1, 16, 16, 64), False),
        ((2, 33, 70, 80), False),
        ((1, 131, 65, 192), False),
        ((2, 3, 5, 48), True),
        ((1, 8, 8, 128), True),
        ((2, 17, 33, 80), True),
        ((1, 66, 40, 192), True),
    ],
)
def test_grouped_conv(shape: tuple[int, ...], up2: bool, dtype: torch.dtype) -> None:
    x, bias = random(*shape, dtype=dtype), torch.randn(shape[-1], device="cuda")
    packed = grouped_conv.pack(0.1 * random(shape[-1], 16, 3, 3, dtype=dtype))
    want = grouped_conv.reference(x.double(), packed.double(), bias.double(), up2)
    poison(want.numel())
    close(torch.ops.owl_wms.grouped_conv(x, packed, bias, up2), want, LIMIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "shortcut_channels"),
    [((2, 3, 5, 16), 16), ((1, 9, 17, 24), 24), ((2, 16, 33, 96), 192), ((1, 20, 8, 96), 96), ((1, 9, 7, 64), 256)],
)
def test_up_residual(shape: tuple[int, ...], shortcut_channels: int, dtype: torch.dtype) -> None:
    low, shortcut = random(*shape, dtype=dtype), random(*shape[:3], shortcut_channels, dtype=dtype)
    for given in (None, shortcut):
        want = up_residual.reference(low.double(), None if given is None else given.double())
        poison(want.numel())
        close(torch.ops.owl_wms.up_residual(low, given), want, LIMIT[dtype])
    base = random(shape[0], 2 * shape[1], 2 * shape[2], shape[3], dtype=dtype)
    want = base.double() + up_residual.shuffle(shortcut.double(), shape[3])
    close(up_residual.add_shortcut_(base, shortcut), want, LIMIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 16, 16),
        (2, 3, 5, 48, 0),
        (1, 8, 8, 1536, 1536),
        (3, 16, 17, 384, 768),
        (1, 40, 33, 208, 0),
        (8, 32, 32, 768, 1536),
    ],
)
def test_residual_beside_the_branch_is_bit_equal_to_both_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, height, width, channels, shortcut_channels = shape
    low, hidden = (random(batch, height, width, wide * channels, dtype=dtype) for wide in (1, 2))
    shortcut = random(batch, height, width, shortcut_channels, dtype=dtype) if shortcut_channels else None
    packed = grouped_conv.pack(0.1 * random(2 * channels, 16, 3, 3, dtype=dtype))
    bias = torch.randn(2 * channels, device="cuda")
    want = up_residual.up_residual(low, shortcut), grouped_conv.grouped_conv(hidden, packed, bias, True)
    for elements in (want[1].numel(), want[0].numel()):
        poison(elements)
    for way in (enlarging_both.launch, stage.enlarged_beside):
        for got, wanted in zip(way(low, shortcut, hidden, packed, bias), want, strict=True):
            assert got.isfinite().all(), "not every element was written"
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((2, 5, 7, 16), 3), ((1, 16, 32, 96), 3), ((2, 33, 70, 256), 4), ((1, 20, 40, 24), 7)]
)
def test_conv_out(shape: tuple[int, ...], outputs: int, silu: bool, dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    packed = conv_out.pack(0.1 * random(outputs, shape[-1], 3, 3, dtype=dtype))
    bias = torch.randn(conv_out.padded(outputs), device="cuda")
    want = conv_out.reference(x.double(), packed.double(), bias.double(), silu)
    poison(2 * want.numel())
    close(torch.ops.owl_wms.conv_out(x, packed, bias, silu), want, LIMIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "target", "pad", "channels"),
    [((32, 32), (18, 32), 4, 3), ((64, 64), (45, 80), 8, 7), ((20, 20), (20, 20), 4, 4)],
)
def test_resize(size: tuple[int, int], target: tuple[int, int], pad: int, channels: int, dtype: torch.dtype) -> None:
    square = torch.randn(2, *size, pad, device="cuda")
    want = resize.reference(square.double(), channels, *target, torch.float64)
    poison(want.numel())
    close(torch.ops.owl_wms.resize(square, channels, *target, dtype), want, LIMIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(8, 3, 360, 640), (3, 4, 6, 10), (2, 1, 2, 2), (1, 8, 18, 32), (2, 3, 5, 7), (1, 9, 4, 4)]
)
def test_frame_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 1.5 * random(*shape, dtype=dtype)
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype, device="cuda")
    block = torch.full((x.numel(),), 77, device="cuda", dtype=torch.uint8)  # what the allocator hands out next
    del block
    for given in (x, x.to(memory_format=torch.channels_last), x[:, :, :, : shape[3] // 2 * 2]):
        got = torch.ops.owl_wms.frame_bytes(given)
        assert got.is_contiguous()
        assert torch.equal(got, frame_bytes.reference(given)), "the same bits as the reference"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("depth", "scale", "shortcut"), [(1, 2, True), (3, 2, True), (2, 1, False), (1, 4, False)])
def test_stage(depth: int, scale: int, shortcut: bool, dtype: torch.dtype) -> None:
    values = arguments(depth, scale, shortcut, dtype, "cuda")
    widen = lambda value: value.double() if isinstance(value, Tensor) else value  # noqa: E731
    wide = [[widen(v) for v in value] if isinstance(value, list) else widen(value) for value in values]
    kept = values[0].clone()
    close(torch.ops.owl_wms.stage(*values), stage.reference(*wide), 3 * LIMIT[dtype])
    assert torch.equal(values[0], kept), "the op must not write its input"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("decoder", "latent"),
    [
        (dcae(), (2, 16, 4, 4)),
        (dcae(stages=(1, 1, 1), ch_0=32, ch_max=128, channels=4, size=(32, 32)), (1, 16, 4, 4)),
        (dcae(ch_0=24, ch_max=96, latent=12, use_middle_block=True), (1, 12, 4, 4)),
        (dcae("learned", use_middle_block=True, size=32), (1, 16, 4, 4)),
        (distill(), (2, 16, 2, 2)),
    ],
    ids=["tiled", "square", "middle", "learned", "distill"],
)
def test_fused_decoder_is_as_accurate_as_eager(decoder: nn.Module, latent: tuple[int, ...], dtype: torch.dtype) -> None:
    decoder = decoder.cuda().float()
    z = torch.randn(latent, device="cuda").to(dtype)
    with torch.inference_mode():
        want = decoder(z.float()).double()
        fused = fuse(decoder, dtype)
        mine = float((fused(z).double() - want).norm() / want.norm())
        eager = float((decoder.to(dtype)(z).double() - want).norm() / want.norm())
    assert mine < 1.2 * eager


def test_graph_replay_gives_the_eager_result() -> None:
    fused = fuse(dcae().cuda(), torch.bfloat16)
    z = torch.randn(2, 16, 4, 4, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        want = fused(z)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(z)
        out.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
