"""8-bit products on the CPU: codes, packed layouts, references against plain PyTorch, Triton in its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from owl_wms.ops import codes, grouped_conv, grouped_conv8, linear8
from owl_wms.ops.common.nvrtc import compile_kernel, nvrtc_library_names

OPS = torch.ops.owl_wms
FORMATS = list(codes.FORMATS.values())
INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_kernels_in_the_interpreter starts")


def some_codes(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Codes of all magnitudes."""
    x = torch.randn(*shape, device=device)
    return codes.encode(x * (40 if dtype == torch.int8 else 60), dtype)


def gains(batch: int, device: str = "cpu") -> Tensor:
    """A gain and its inverse for each image, the first 1."""
    gain = torch.linspace(1, 1.75, batch, device=device)
    return torch.stack([gain, 1 / gain], dim=1)


def test_integer_codes_round_to_even_and_saturate() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 126.6, 127.4, 1e9, -1e9, float("inf"), -float("inf")])
    assert codes.encode(x, torch.int8).tolist() == [0, 2, -2, 127, 127, 127, -127, 127, -127]


def test_float_codes_saturate() -> None:
    x = torch.tensor([0.0, 448.0, 460.0, 1e9, -1e9, float("inf"), 2.0**-9])
    got = codes.encode(x, torch.float8_e4m3fn).float()
    assert got.tolist() == [0.0, 448.0, 448.0, 448.0, -448.0, 448.0, 2.0**-9]


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_use_their_full_range(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 32) * torch.logspace(-6, 2, 5)[:, None]
    weight[3] = 0
    rounded, step = codes.quantise_rows(weight, dtype)
    assert rounded.float().abs().amax(dim=1)[[0, 1, 2, 4]].tolist() == [codes.LARGEST[dtype]] * 4
    assert torch.equal(rounded[3].float(), torch.zeros(32))
    assert (rounded.float() * step[:, None] - weight).norm() < 0.04 * weight.norm()


def test_gain_widens_only_what_reaches_further_and_ignores_what_is_not_finite() -> None:
    z = torch.ones(5, 2, 3, 3)
    z[1] *= 8
    z[2, 0, 0, 0] = float("inf")
    z[3, 0, 0, 0] = float("nan")
    z[4] *= 0.1
    gain = OPS.code_gain(z, 4.0)
    assert gain[:, 0].tolist() == [1.0, 2.0, 1.0, 1.0, 1.0]
    assert torch.equal(gain[:, 1], gain[:, 0].reciprocal())


@pytest.mark.parametrize("dtype", FORMATS)
def test_packed_taps_are_the_weights(dtype: torch.dtype) -> None:
    weight, step = torch.randn(48, 16, 3, 3), torch.rand(48) + 0.5
    taps, scale = grouped_conv8.pack_codes(weight, step, dtype)
    assert tuple(taps.shape) == ((3, 18, 32, 4) if dtype == torch.int8 else (3, 9, 2, 2, 32, 2))
    back = grouped_conv8.unpack_codes(taps) * (scale * step).view(-1, 1, 1, 1)
    assert (back - weight).norm() < (0.01 if dtype == torch.int8 else 1e-3) * weight.norm()
    # Lane 4g + t, tile n: output channel 4 (g // 2) + 2n + g % 2, inputs 4t..4t+3; here group 1, dy 2, dx 1.
    g, t, n, byte = 3, 2, 1, 3
    unit = weight[16 + 4 * 1 + 2 * 1 + 1, 4 * t + byte, 2, 1] / (scale * step)[16 + 7]
    if dtype == torch.int8:
        assert taps[1, (2 * 2 + n) * 3 + 1, 4 * g + t, byte] == unit.round()
    else:
        assert taps[1, 2 * 3 + 1, n, 1, 4 * g + t, 1] == unit.half()
    with pytest.raises(ValueError, match="16, 3, 3"):
        grouped_conv8.pack_codes(torch.randn(48, 8, 3, 3), step, dtype)


def near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Codes within one rounding of what they should be, and on average far nearer."""
    assert got.dtype == dtype
    got, want = got.float(), want.clamp(-codes.LARGEST[dtype], codes.LARGEST[dtype])
    slack = torch.full_like(want, 0.51) if dtype == torch.int8 else want.abs() / 15 + 2.0**-9
    assert ((got - want).abs() <= slack).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("up2", [False, True])
def test_grouped_conv8_from_floats(dtype: torch.dtype, up2: bool) -> None:
    x, weight, bias, gain = torch.randn(2, 5, 7, 32), torch.randn(32, 16, 3, 3), torch.randn(32), gains(2)
    step = torch.rand(32) * 0.2 + 0.2
    packed = grouped_conv.pack(weight / step.view(-1, 1, 1, 1))
    got = OPS.grouped_conv8(x, packed, None, bias / step, gain, up2, dtype == torch.float8_e4m3fn)
    middle = OPS.grouped_conv(x, grouped_conv.pack(weight), bias, up2)
    near(got, middle / step * gain[:, 1].view(-1, 1, 1, 1), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_grouped_conv8_from_codes(dtype: torch.dtype) -> None:
    x, weight, bias, gain = some_codes(2, 5, 7, 32, dtype=dtype), torch.randn(32, 16, 3, 3), torch.randn(32), gains(2)
    step_in, step = torch.rand(32) * 0.1 + 0.05, torch.rand(32) + 1
    scaled = weight.view(2, 16, 16, 3, 3) * step_in.view(2, 1, 16, 1, 1)
    taps, scale = grouped_conv8.pack_codes(scaled.view(32, 16, 3, 3), step, dtype)
    got = OPS.grouped_conv8(x, taps, scale, bias / step, gain, False, dtype == torch.float8_e4m3fn)
    rounded = (grouped_conv8.unpack_codes(taps) * (scale * step).view(-1, 1, 1, 1)).double()
    widened = gain[:, 0].view(-1, 1, 1, 1)
    image = (x.float() * widened).double().permute(0, 3, 1, 2)
    y = F.leaky_relu(F.conv2d(image, rounded, bias.double(), padding=1, groups=2), 0.01).permute(0, 2, 3, 1)
    near(got, (y / step / widened).float(), dtype)


def product(dtype: torch.dtype, depth: int, channels: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """x [2, 3, 5, depth] and weight as codes, scale, bias, gain."""
    x = some_codes(2, 3, 5, depth, dtype=dtype, device=device)
    weight, unit = codes.quantise_rows(torch.randn(channels, depth, device=device), dtype)
    return x, weight, unit * 0.1, torch.randn(channels, device=device), gains(2, device)


@pytest.mark.parametrize("dtype", FORMATS)
def test_linear8_is_a_product_with_leaky_relu(dtype: torch.dtype) -> None:
    x, weight, scale, bias, gain = product(dtype, 32, 48)
    y = F.linear(x.double(), weight.double()).float() * scale + bias / gain[:, 0].view(-1, 1, 1, 1)
    near(OPS.linear8(x, weight, scale, bias, gain), F.leaky_relu(y, 0.01), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
def test_add_linear8_changes_the_residual_in_place(dtype: torch.dtype) -> None:
    x, weight, scale, _, gain = product(dtype, 32, 48)
    u, inverse = torch.randn(2, 3, 5, 48), torch.rand(48) * 9
    want = u + F.linear(x.double(), weight.double()).float() * scale * gain[:, 0].view(-1, 1, 1, 1)
    kept = u
    got = linear8.add_linear8_(u, x, weight, scale, gain, inverse)
    torch.testing.assert_close(kept, want)
    assert got is not None
    near(got, want * inverse * gain[:, 1].view(-1, 1, 1, 1), dtype)
    assert linear8.add_linear8_(u, x, weight, scale, gain, None) is None


def test_what_does_not_fit_is_refused_by_the_fakes() -> None:
    x, weight, scale, bias, gain = (value.to("meta") for value in product(torch.int8, 32, 48))
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.linear8(x, weight[:, :16], scale, bias, gain)
    with pytest.raises(RuntimeError, match="for 2 images"):
        OPS.linear8(x, weight, scale, bias, gain[:1])
    taps = grouped_conv8.pack_codes(torch.randn(32, 16, 3, 3), torch.ones(32), torch.int8)[0].to("meta")
    with pytest.raises(RuntimeError, match="cannot be enlarged"):
        OPS.grouped_conv8(x, taps, scale[:32], bias[:32], gain, True, False)
    with pytest.raises(RuntimeError, match="taps"):
        OPS.grouped_conv8(x, taps, scale[:32], bias[:32], gain, False, True)


def test_opcheck() -> None:
    # Of int8 alone: the checker itself scales arguments, which torch cannot do to float8.
    x, weight, scale, bias, gain = product(torch.int8, 32, 32)
    torch.library.opcheck(OPS.linear8, (x, weight, scale, bias, gain))
    taps, unit = grouped_conv8.pack_codes(torch.randn(32, 16, 3, 3), torch.ones(32), torch.int8)
    torch.library.opcheck(OPS.grouped_conv8, (x, taps, unit, bias, gain, False, False))
    torch.library.opcheck(OPS.code_gain, (torch.randn(2, 4, 3, 3), 2.0))


@settings(max_examples=60, deadline=None)
@given(st.floats(-200, 200), st.sampled_from(FORMATS))
def test_encoding_is_the_nearest_code(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value])
    every = torch.arange(-127, 128).float() if dtype == torch.int8 else torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every.float()
    nearest = (every[every.isfinite()] - x).abs().min()
    assert (codes.encode(x, dtype).float() - x).abs() <= nearest + 1e-4


@pytest.mark.skipif(not nvrtc_library_names()[:-2], reason="no NVRTC in this installation")
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernels_compile_for_hopper(dtype: torch.dtype) -> None:
    assert compile_kernel(grouped_conv8.kernel_of(dtype), "sm_90")
    for element in (torch.bfloat16, torch.float16):
        for up2 in (False, True):
            assert compile_kernel(grouped_conv.kernel_of(element, up2, dtype), "sm_90")


@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout, done.stdout[-300:]


@pytest.fixture
def run_time_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter keeps a scalar argument as an array of one element, which NumPy 2.4 no longer takes for
    the bound of a loop.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@interpreted
@pytest.mark.usefixtures("run_time_bounds")
@pytest.mark.parametrize(("depth", "channels"), [(32, 48), (80, 96)])
def test_interpreted_integer_products(depth: int, channels: int) -> None:
    from owl_wms.ops.linear8 import kernel

    tile = kernel.Tile(16, 32, 32, 4, 2)
    x, weight, scale, bias, gain = product(torch.int8, depth, channels)
    rows, pixels = x.view(-1, depth), x.shape[1] * x.shape[2]
    got = kernel.launch(rows, weight, scale, bias, gain, pixels, tile).view(2, 3, 5, channels)
    assert torch.equal(got, linear8.reference(x, weight, scale, bias, gain))


@interpreted
@pytest.mark.usefixtures("run_time_bounds")
@pytest.mark.parametrize("with_codes", [False, True])
def test_interpreted_integer_addition(with_codes: bool) -> None:
    from owl_wms.ops.linear8 import kernel

    tile = kernel.Tile(16, 32, 32, 4, 2)
    x, weight, scale, _, gain = product(torch.int8, 80, 48)
    u = torch.randn(2, 3, 5, 48).bfloat16()
    inverse = torch.rand(48) * 9 if with_codes else None
    total, codes_wanted = linear8.add_reference(u, x, weight, scale, gain, inverse)
    flat = u.view(-1, 48).clone()
    got = kernel.launch_add_(flat, x.view(-1, 80), weight, scale, gain, inverse, 15, tile)
    torch.testing.assert_close(flat.view_as(total), total, rtol=1e-2, atol=1e-2)
    if with_codes:
        assert got is not None
        assert codes_wanted is not None
        assert (got.view_as(codes_wanted).int() - codes_wanted.int()).abs().max() <= 1
    else:
        assert got is None
