"""The ops of the fused sana decoder: Triton in its interpreter, everything on the GPU, `opcheck`.

Run: python -m pytest tests/ops/test_sana_ops.py
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from owl_wms.ops import channel_norm, conv3x3, depthwise_gate, linear_attention, nearest_up, pointwise, shuffle_add
from owl_wms.ops.common.nvrtc import compile_kernel, nvrtc_library_names
from owl_wms.ops.conv3x3 import resident

pytest.importorskip("triton")
OPS = torch.ops.owl_wms
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
# Triton chooses its interpreter when it is imported, so these run in a process of their own: the test below starts it.
interpreted = pytest.mark.skipif(not INSIDE, reason="runs in the process that test_kernels_in_the_interpreter starts")


def kernel_of(op: str) -> ModuleType:
    return importlib.import_module(f"owl_wms.ops.{op}.kernel")


@pytest.mark.skipif(INSIDE, reason="this is that process")
def test_kernels_in_the_interpreter() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not gpu",
            "-k",
            "interpreted",
            __file__,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "17 passed" in done.stdout, done.stdout[-300:]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    error = torch.linalg.vector_norm(got.float() - wanted.float()) / torch.linalg.vector_norm(wanted.float())
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.2e}"


def conv_arguments(
    width: int, channels: int, out: int, *, residual: bool = False, height: int = 3, **to: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.randn(2, height, width, channels).to(**to)
    weight = conv3x3.pack(torch.randn(out, channels, 3, 3) * channels**-0.5 / 3).to(**to)
    bias = torch.randn(out).to(device=x.device)
    return x, weight, bias, torch.randn(2, height, width, out).to(**to) if residual else None


@interpreted
@pytest.mark.parametrize(("relu", "residual"), [(True, False), (False, True), (False, False)])
def test_interpreted_convolution_tile(relu: bool, residual: bool) -> None:
    kernel = kernel_of("conv3x3")
    tile = kernel.Tile(16, 16, 16, 4, 2)
    x, weight, bias, extra = conv_arguments(32, 32, 48, residual=residual, dtype=torch.float16)
    assert kernel.fits(x, weight, kernel.Tile(16, 48, 16, 4, 2))
    assert not kernel.fits(x[:, :, :31], weight, tile)
    got = kernel.launch(x, weight, bias, extra, relu, tile)
    close(
        got, conv3x3.reference(x.float(), weight.float(), bias, None if extra is None else extra.float(), relu).half()
    )


@interpreted
def test_interpreted_finish() -> None:
    y, residual, bias = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randn(7)
    got = kernel_of("conv3x3").finish_(y.clone(), bias, residual, True)
    close(got, torch.relu(y + bias) + residual)
    y[0, 0, 0] = float("nan")
    got = kernel_of("conv3x3").finish_(y.clone(), bias, residual, False, relu_last=True)
    assert got[0, 0, 0].isnan()
    close(got[1:], torch.relu(y + bias + residual)[1:])


@interpreted
def test_interpreted_finish_with_silu() -> None:
    y, bias = torch.randn(3, 5, 7), torch.randn(7)
    got = kernel_of("conv3x3").finish_(y.clone(), bias, None, False, True)
    close(got, torch.nn.functional.silu(y + bias))


@interpreted
@pytest.mark.parametrize("relu", [False, True])
def test_interpreted_norm(relu: bool) -> None:
    x, residual = torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    arguments = (x, torch.randn(24), torch.randn(24), None if relu else residual, 1e-5, relu)
    close(kernel_of("channel_norm").launch(*arguments), channel_norm.reference(*arguments))


@interpreted
def test_interpreted_attention() -> None:
    qkv = torch.randn(2, 7, 11, 3 * 2 * 16).half()
    close(kernel_of("linear_attention").launch(qkv, None, None, 16, 1e-15), linear_attention.reference(qkv, 16, 1e-15))


def scale(channels: int, head: int, size: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a second set of heads."""
    depthwise = torch.randn(channels, 1, size, size, device=device) / size
    return linear_attention.pack_scale(depthwise, torch.randn(channels, head, 1, 1, device=device) / head**0.5)


@interpreted
@pytest.mark.parametrize(("size", "programs"), [(5, 1024), (3, 2), (1, 1)])
def test_interpreted_attention_at_two_scales(size: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs make each one take several steps, as large images do."""
    monkeypatch.setattr(kernel_of("linear_attention"), "PROGRAMS", programs)
    qkv = torch.randn(2, 13, 11, 3 * 2 * 16).half()
    taps, point = scale(96, 16, size)
    got = kernel_of("linear_attention").launch(qkv, taps, point.half(), 16, 1e-15)
    close(got, linear_attention.multiscale_reference(qkv.float(), taps, point.half().float(), 16, 1e-15).half())


@interpreted
@pytest.mark.parametrize("shortcut", [False, True])
def test_interpreted_nearest_up(shortcut: bool) -> None:
    x, weight, bias = torch.randn(2, 3, 5, 8), nearest_up.pack(torch.randn(6, 8, 3, 3) / 8), torch.randn(6)
    y = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), padding=1)
    got = kernel_of("nearest_up").launch(y.permute(0, 2, 3, 1).contiguous(), bias, x if shortcut else None)
    close(got, nearest_up.reference(x, weight, bias, shortcut))


@interpreted
@pytest.mark.parametrize("channels", [4, 2, 1, 0])
def test_interpreted_shuffle(channels: int) -> None:
    kernel = kernel_of("shuffle_add")
    y = torch.randn(2, 3, 5, 12)
    x = torch.randn(2, 3, 5, 3 * channels) if channels else None
    close(kernel.launch(y, x), shuffle_add.reference(y, x))
    close(kernel.launch_frames(y, 3), shuffle_add.frames_reference(y, 3))


def test_four_small_convolutions_are_the_enlarged_one() -> None:
    weight, bias, x = torch.randn(6, 8, 3, 3) / 8, torch.randn(6), torch.randn(2, 8, 3, 5)
    large = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    wanted = torch.nn.functional.conv2d(large, weight, bias, padding=1)
    rows = x.permute(0, 2, 3, 1).contiguous()
    close(nearest_up.reference(rows, nearest_up.pack(weight), bias, False).permute(0, 3, 1, 2), wanted)
    narrow = torch.nn.functional.conv2d(x, nearest_up.as_pixel_shuffle(weight), bias.repeat_interleave(4), padding=1)
    close(torch.nn.functional.pixel_shuffle(narrow, 2), wanted)
    with pytest.raises(ValueError, match="3, 3"):
        nearest_up.pack(torch.zeros(4, 4, 1, 1))


def test_a_scales_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="no scale has weights"):
        linear_attention.pack_scale(torch.zeros(96, 1, 4, 4), torch.zeros(96, 16, 1, 1))


def test_phases_first_is_a_pixel_shuffle() -> None:
    x, weight = torch.randn(1, 6, 4, 5), torch.randn(8, 6, 1, 1)
    wanted = torch.nn.functional.pixel_shuffle(torch.nn.functional.conv2d(x, weight), 2).permute(0, 2, 3, 1)
    rows = torch.nn.functional.linear(x.permute(0, 2, 3, 1), shuffle_add.phases_first(weight).flatten(1))
    close(shuffle_add.reference(rows, None), wanted.contiguous())


def test_packed_weights_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match="3, 3"):
        conv3x3.pack(torch.zeros(4, 4, 1, 1))
    with pytest.raises(ValueError, match="depthwise_gate"):
        depthwise_gate.pack(torch.zeros(8, 2, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_kernel_compiles_for_hopper(dtype: torch.dtype) -> None:
    if not any(Path(name).exists() for name in nvrtc_library_names()):
        pytest.skip("no NVRTC here")
    for span in depthwise_gate.SPANS:
        assert len(compile_kernel(depthwise_gate.kernel_of(dtype, 64, 70, span), "sm_90")) > 1000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 13, 70, 2048), (1, 64, 64, 2048), (3, 21, 33, 100)])
def test_gates_of_both_spans_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The first has threads enough for the longer span; no side is a multiple of what a thread walks."""
    *sides, channels = shape
    x = torch.randn(*sides, 2 * channels, device="cuda").to(dtype)
    taps = depthwise_gate.pack(torch.randn(2 * channels, 1, 3, 3, device="cuda") / 3).float()
    arguments = (x, taps, torch.randn(2 * channels, device="cuda"))
    torch.full((1 << 26,), float("nan"), device="cuda", dtype=dtype)
    close(OPS.depthwise_gate(*arguments), reference_of(OPS.depthwise_gate.default, arguments).to(dtype))


def cases(device: str, dtype: torch.dtype) -> list[tuple]:
    """`(op, arguments)` of every op at small odd shapes."""

    def t(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def wide(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    gate_taps = depthwise_gate.pack(wide(24, 1, 3, 3))
    weight = conv3x3.pack(t(16, 8, 3, 3) / 8)
    taps, point = scale(96, 16, 5, device)
    return [
        (OPS.conv3x3.default, (t(2, 3, 5, 8), weight, wide(16), t(2, 3, 5, 16), False, -1)),
        (OPS.conv3x3.default, (t(2, 3, 5, 8), weight, wide(16), None, True, -1)),
        (OPS.conv3x3.default, (t(2, 3, 5, 8), weight, wide(16), None, True, -2)),
        (OPS.conv3x3.default, (t(2, 3, 5, 8), weight, wide(16), None, False, -1, True)),
        (OPS.conv3x3_norm.default, (t(2, 3, 5, 8), weight, wide(16), wide(16), t(2, 3, 5, 16), 1e-5, -1)),
        (OPS.conv3x3_shuffled.default, (t(2, 3, 5, 8), weight, wide(16), t(2, 6, 10, 4))),
        (OPS.nearest_up.default, (t(2, 3, 5, 8), nearest_up.pack(t(16, 8, 3, 3) / 8), wide(16), True)),
        (OPS.multiscale_attention.default, (t(2, 7, 11, 96), taps, point.to(dtype), 16, 1e-15)),
        (OPS.multiscale_attention.default, (t(2, 3, 4, 96), taps, point.to(dtype), 16, 1e-15)),
        (OPS.multiscale_attention.default, (t(1, 70, 61, 96), taps, point.to(dtype), 16, 1e-15)),
        (OPS.latent_conv.default, (t(2, 8, 3, 5), weight, t(16), 2)),
        (OPS.pointwise.default, (t(2, 3, 5, 8), t(16, 8), t(16))),
        (OPS.depthwise_gate.default, (t(2, 5, 37, 24), gate_taps, wide(24))),
        (OPS.channel_norm.default, (t(2, 3, 5, 24), wide(24), wide(24), t(2, 3, 5, 24), 1e-5, False)),
        (OPS.linear_attention.default, (t(2, 7, 11, 96), 16, 1e-15)),
        (OPS.linear_attention.default, (t(2, 3, 4, 96), 16, 1e-15)),
        (OPS.shuffle_add.default, (t(2, 3, 5, 24), t(2, 3, 5, 12))),
        (OPS.shuffle_frames.default, (t(2, 3, 5, 16), 3)),
    ]


@pytest.mark.parametrize("index", range(18))
def test_opcheck(index: int) -> None:
    op, arguments = cases("cpu", torch.float32)[index]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def reference_of(op: object, arguments: tuple) -> torch.Tensor:
    """What the op computes, in fp32 on the same values; the op itself takes its reference for fp32."""
    wide = [a.float() if isinstance(a, torch.Tensor) else a for a in arguments]
    return op(*wide)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", range(18))
def test_on_the_gpu(index: int, dtype: torch.dtype) -> None:
    op, arguments = cases("cuda", dtype)[index]
    # What was freed before the call is full of NaN: an output element that is not written shows.
    torch.full((1 << 22,), float("nan"), device="cuda", dtype=dtype)
    close(op(*arguments), reference_of(op, arguments).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "own"), [(512, conv3x3.RESIDENT), (16, conv3x3.NARROW)])
@pytest.mark.parametrize("residual", [False, True])
def test_every_way_on_the_gpu(dtype: torch.dtype, out: int, own: int, residual: bool) -> None:
    x, weight, bias, extra = conv_arguments(256, 128, out, residual=residual, height=16, device="cuda", dtype=dtype)
    arguments = (x, weight, bias, extra, not residual)
    wanted = reference_of(OPS.conv3x3.default, (*arguments, -1)).to(dtype)
    ways = conv3x3.ways(x, weight, residual, not residual)
    assert conv3x3.LIBRARY in ways
    if conv3x3.is_hopper(x.device):
        assert own in ways
    for how in ways:
        torch.full((1 << 24,), float("nan"), device="cuda", dtype=dtype)
        close(OPS.conv3x3(*arguments, how), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16, 16, 64), (2, 128, 96, 128), (3, 64, 64, 320)])
@pytest.mark.parametrize("residual", [False, True])
def test_silu_and_norm_in_the_kernel_on_the_gpu(shape: tuple[int, ...], residual: bool, dtype: torch.dtype) -> None:
    to = {"device": "cuda", "dtype": dtype}
    x = torch.randn(*shape, **to)
    if not conv3x3.is_hopper(x.device):
        pytest.skip("needs compute capability 9.0")
    weight = conv3x3.pack(torch.randn(128, shape[-1], 3, 3, device="cuda") * shape[-1] ** -0.5 / 3).to(dtype)
    gain, shift = torch.randn(128, device="cuda"), torch.randn(128, device="cuda")
    added = torch.randn(*shape[:-1], 128, **to) if residual else None
    for op, arguments, ways in (
        (OPS.conv3x3.default, (x, weight, shift, None, False, -1, True), (conv3x3.LIBRARY, conv3x3.RESIDENT)),
        (
            OPS.conv3x3_norm.default,
            (x, weight, gain, shift, added, 1e-5, -1),
            (conv3x3.LIBRARY, conv3x3.RESIDENT, conv3x3.RESIDENT_NORM),
        ),
    ):
        silu = op == OPS.conv3x3.default
        assert set(ways) == set(conv3x3.ways(x, weight, residual and not silu, False, silu, not silu))
        wanted = reference_of(op, arguments).to(dtype)
        for how in ways:
            torch.full((1 << 24,), float("nan"), device="cuda", dtype=dtype)
            called = (*arguments[:5], how, True) if silu else (*arguments[:6], how)
            close(op(*called), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bias", "relu", "residual"), [(1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 0), (0, 0, 1), (1, 1, 1)]
)
@pytest.mark.parametrize(
    "shape",  # one tile; several sides and channel tiles; one to five steps of channels; up to five tiles a processor
    [
        (1, 16, 16, 64, 128),
        (2, 16, 48, 192, 384),
        (4, 112, 112, 64, 256),
        (3, 96, 96, 128, 640),
        (2, 128, 128, 320, 256),
    ],
)
def test_resident_pixels_on_the_gpu(
    shape: tuple[int, ...], bias: int, relu: int, residual: int, dtype: torch.dtype
) -> None:
    batch, height, width, channels, out = shape
    to = {"device": "cuda", "dtype": dtype}
    x = torch.randn(batch, height, width, channels, **to)
    weight = conv3x3.pack(torch.randn(out, channels, 3, 3, device="cuda") * channels**-0.5 / 3).to(dtype)
    added = torch.randn(batch, height, width, out, **to) if residual else None
    arguments = (x, weight, torch.randn(out, device="cuda") if bias else None, added, bool(relu))
    if not conv3x3.is_hopper(x.device):
        pytest.skip("needs compute capability 9.0")
    assert conv3x3.RESIDENT in conv3x3.ways(x, weight, bool(residual), bool(relu))
    wanted = reference_of(OPS.conv3x3.default, (*arguments, -1)).to(dtype)
    torch.full((1 << 24,), float("nan"), device="cuda", dtype=dtype)
    close(OPS.conv3x3(*arguments, conv3x3.RESIDENT), wanted)


@pytest.mark.parametrize(
    ("shape", "out", "fits"),
    [
        ((1, 16, 16, 64), 128, True),
        ((3, 32, 640, 128), 384, True),
        ((1, 24, 16, 64), 128, False),
        ((1, 16, 8, 64), 128, False),
        ((1, 16, 16, 32), 128, False),
        ((1, 16, 16, 64), 64, False),
    ],
)
def test_what_resident_pixels_take(shape: tuple[int, ...], out: int, fits: bool) -> None:
    x = torch.empty(shape, device="meta")
    assert resident.fits(x, torch.empty(out, 3, 3, shape[-1], device="meta")) is fits


def test_pointwise_is_a_linear_layer() -> None:
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)
    close(OPS.pointwise(x, weight, bias), pointwise.reference(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",  # one tile; phases that end inside a tile; several images, chunks and tiles a processor; wide
    [(1, 16, 16, 64, 32), (2, 16, 48, 192, 96), (3, 32, 16, 128, 160), (4, 96, 112, 64, 96), (1, 64, 64, 512, 256)],
)
def test_shuffled_onto_an_image_on_the_gpu(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    batch, height, width, channels, out = shape
    to = {"device": "cuda", "dtype": dtype}
    x, base = torch.randn(batch, height, width, channels, **to), torch.randn(batch, 2 * height, 2 * width, out, **to)
    weight = conv3x3.pack(torch.randn(4 * out, channels, 3, 3, device="cuda") * channels**-0.5 / 3).to(dtype)
    added = torch.randn(4 * out, device="cuda") if bias else None
    if not conv3x3.fits_shuffled(x, weight):
        pytest.skip("needs compute capability 9.0")
    arguments, kept = (x, weight, added, base), base.clone()
    wanted = reference_of(OPS.conv3x3_shuffled.default, arguments).to(dtype)
    got = None
    for _ in range(5):
        torch.full((1 << 26,), float("nan"), **to)
        again = OPS.conv3x3_shuffled(*arguments)
        close(again, wanted)
        assert got is None or torch.equal(got, again), "a race"
        got = again
    # One by one as well: a wrong pixel is lost in a norm over millions.
    worst = (got.float() - wanted.float()).abs() / wanted.float().abs().clamp_min(1)
    assert float(worst.max()) < 4 * TOLERANCE[dtype]
    assert torch.equal(base, kept), "an op must not write its arguments"
