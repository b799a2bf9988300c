"""8-bit kernels on a GPU against their references: odd shapes, fresh inputs, poisoned outputs, every tile, graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from owl_wms.fused import dcae8
from owl_wms.ops import codes, grouped_conv, grouped_conv8, linear8
from tests.ops.decoders import dcae
from tests.ops.test_codes import gains, some_codes
from tests.ops.test_gpu import poison

pytestmark = pytest.mark.gpu
OPS = torch.ops.owl_wms
FORMATS = list(codes.FORMATS.values())
FORMAT_NAMES = list(codes.FORMATS)


@pytest.fixture(autouse=True)
def _hopper_and_fresh_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcae8, "LEAST_CHANNELS", 64)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("8-bit products are for compute capability 9.0")
    torch.seed()
    torch.cuda.manual_seed(torch.initial_seed() % 2**31)


def near(got: Tensor, want: Tensor, dtype: torch.dtype, slack: Tensor | float = 0.0) -> None:
    """Codes of the kernel against the reference's: nearly all equal, none more than one step and `slack` away."""
    assert got.dtype == dtype
    got, want = got.float(), want.float()
    assert got.isfinite().all(), "not every code was written"
    step = torch.ones_like(want) if dtype == torch.int8 else (want.abs() / 8).clamp_min(2.0**-9)
    away = ((got - want).abs() - slack) / step
    assert away.max() <= 1.01, f"{away.max():.2f} steps away"
    differing = ((got - want).abs() > 0.01 * step + slack).float().mean()
    assert differing < 0.05, f"{differing:.1%} of the codes differ"
    assert (got - want).norm() < 0.02 * want.norm(), f"{(got - want).norm() / want.norm():.2e} in all"


def lost(x: Tensor, weight: Tensor) -> Tensor | float:
    """What a sum of fp8 products may lose: the matrix unit adds with about 14 bits, below the largest partial sum. Sums
    of int8 products are exact.
    """
    if x.dtype == torch.int8:
        return 0.0
    return 2.0**-11 * (x.float().abs() @ weight.float().abs().t())


def spoil(elements: int) -> None:
    """Leave bytes that are NaN as float8, and far from any sum as int8, where the next output will lie."""
    poison((elements + 1) // 2)
    block = torch.full((elements,), 0x7F, device="cuda", dtype=torch.uint8)
    torch.cuda.synchronize()
    del block


@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 48), (1, 16, 16, 64), (2, 33, 70, 80), (1, 131, 65, 192), (3, 1, 1, 16), (1, 70, 33, 272)]
)
def test_grouped_conv8_from_codes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    channels = shape[-1]
    x, bias, gain = some_codes(*shape, dtype=dtype, device="cuda"), torch.randn(channels), gains(shape[0])
    weight = 0.1 * torch.randn(channels, 16, 3, 3)
    taps, scale = grouped_conv8.pack_codes(weight, torch.rand(channels) + 1, dtype)
    fp8 = dtype == torch.float8_e4m3fn
    want = OPS.grouped_conv8(x.cpu(), taps, scale, bias, gain, False, fp8)
    spoil(want.numel())
    got = OPS.grouped_conv8(x, taps.cuda(), scale.cuda(), bias.cuda(), gain.cuda(), False, fp8)
    near(got.cpu(), want, dtype)


@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize(
    ("shape", "up2"),
    [((2, 5, 7, 48), False), ((1, 33, 70, 80), False), ((2, 3, 5, 48), True), ((1, 17, 33, 192), True)],
)
def test_grouped_conv8_from_floats(shape: tuple[int, ...], up2: bool, dtype: torch.dtype, element: torch.dtype) -> None:
    channels = shape[-1]
    x, bias, gain = 10 * torch.randn(*shape), torch.randn(channels), gains(shape[0])
    x, packed = x.to(element), grouped_conv.pack(torch.randn(channels, 16, 3, 3)).to(element)
    fp8 = dtype == torch.float8_e4m3fn
    want = OPS.grouped_conv8(x, packed, None, bias, gain, up2, fp8).float()
    spoil(want.numel())
    got = OPS.grouped_conv8(x.cuda(), packed.cuda(), None, bias.cuda(), gain.cuda(), up2, fp8).cpu().float()
    # The enlarged image is rounded to 16 bits inside the kernel, so codes may differ by what that rounding is worth.
    assert got.isfinite().all()
    assert (got - want).norm() < (0.03 if element == torch.bfloat16 else 0.02) * want.norm()


def operands(dtype: torch.dtype, shape: tuple[int, ...], channels: int) -> tuple[Tensor, ...]:
    """x `[*shape]` and weight as codes, scale, bias, gain, on the GPU."""
    x = some_codes(*shape, dtype=dtype, device="cuda")
    weight, unit = codes.quantise_rows(torch.randn(channels, shape[-1], device="cuda"), dtype)
    scale = unit * (40 if dtype == torch.int8 else 60) / x.float().std() / shape[-1] ** 0.5
    return x, weight, scale, torch.randn(channels, device="cuda"), gains(shape[0], "cuda")


@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
@pytest.mark.parametrize("tile", range(2))
@pytest.mark.parametrize(
    ("shape", "channels"), [((2, 9, 13, 96), 48), ((3, 16, 16, 512), 256), ((1, 5, 7, 2048), 4096)]
)
def test_every_tile(tile: int, shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    from owl_wms.ops.linear8 import kernel

    x, weight, scale, bias, gain = operands(dtype, shape, channels)
    rows, pixels = x.view(-1, shape[-1]), shape[1] * shape[2]
    want = linear8.reference(x, weight, scale, bias, gain)
    spoil(want.numel())
    got = kernel.launch(rows, weight, scale, bias, gain, pixels, kernel.TILES[tile])
    loss = lost(x, weight) * scale
    near(got.view_as(want), want, dtype, loss)
    u, inverse = torch.randn(*shape[:3], channels, device="cuda").bfloat16(), torch.rand(channels, device="cuda") * 20
    for given in (inverse, None):
        total, made = linear8.add_reference(u, x, weight, scale, gain, given)
        mine = u.clone().view(-1, channels)
        spoil(u.numel())
        found = kernel.launch_add_(mine, rows, weight, scale, gain, given, pixels, kernel.TILES[tile])
        assert (mine.view_as(total).float() - total.float()).norm() < 2e-3 * total.float().norm()
        if found is not None and made is not None:
            # Both factors of an image cancel: into the residual with one, into codes with the other.
            near(found.view_as(made), made, dtype, loss * given)


@pytest.mark.parametrize("dtype", FORMATS, ids=FORMAT_NAMES)
def test_a_decoder_with_codes_is_near_the_fp32_one_and_repeats_in_a_graph(dtype: torch.dtype) -> None:
    decoder = dcae(stages=(2, 3, 1), ch_0=64, ch_max=256, size=32, latent=16).cuda()
    z, calibration = (torch.randn(n, 16, 4, 4, device="cuda") for n in (3, 16))
    fused = dcae8.fuse8(decoder, torch.bfloat16, dtype, calibration)
    with torch.inference_mode():
        want, got = decoder(z), fused(z)
        assert (got.float() - want).norm() < (0.03 if dtype == torch.int8 else 0.06) * want.norm()
        assert torch.equal(fused(z), got)
        neighbours = torch.cat([9 * z[:1], z[1:2], z[2:] / 9])
        assert torch.equal(fused(neighbours)[1], got[1]), "an image must not depend on its neighbours"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(z)
        out.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, got)
