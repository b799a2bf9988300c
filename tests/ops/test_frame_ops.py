"""The ops of a streaming decoder: references against the layers they stand for, launches, everything on the GPU.

Run: python -m pytest tests/ops/test_frame_ops.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ops_taehv import cases
from owl_wms.ops import frame_conv as ops
from owl_wms.ops import frame_depthwise, pointwise
from owl_wms.ops.common.nvrtc import Kernel, compile_kernel, nvrtc_library_names
from owl_wms.ops.common.tensor_maps import TensorMap
from owl_wms.ops.frame_conv import kernel
from owl_wms.vae.taehv import Grow, MemoryBlock, SuperMemoryBlock, shifted

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    error = torch.linalg.vector_norm(got.float() - wanted.float()) / torch.linalg.vector_norm(wanted.float())
    assert error <= TOLERANCE[got.dtype], f"relative error {error:.2e}"


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@torch.no_grad()
def test_a_memory_block() -> None:
    """Two streams of three frames each."""
    block, x, state = MemoryBlock(8), torch.randn(6, 8, 5, 4), torch.randn(2, 8, 5, 4)
    past, _ = shifted(x, state)
    first, second, third = block.conv[0], block.conv[2], block.conv[4]
    y = ops.frame_conv(nhwc(x), nhwc(state), ops.pack(first.weight), first.bias, None, ops.LIBRARY)
    y = ops.frame_conv(y, None, ops.pack(second.weight), second.bias, None, ops.LIBRARY)
    y = ops.frame_conv(y, None, ops.pack(third.weight), third.bias, nhwc(x), ops.LIBRARY)
    close(nchw(y), block(x, past))


@torch.no_grad()
def test_a_super_memory_block() -> None:
    block, x, state = SuperMemoryBlock(8), torch.randn(6, 8, 9, 10), torch.randn(2, 8, 9, 10)
    past, _ = shifted(x, state)
    depthwise, wide, narrow = block.conv[0], block.conv[1], block.conv[3]
    taps = frame_depthwise.pack(depthwise.weight)
    y = frame_depthwise.frame_depthwise(nhwc(x), nhwc(state), taps)
    y = pointwise.pointwise_relu(y, wide.weight.flatten(1), wide.bias)
    y = pointwise.pointwise_add(y, narrow.weight.flatten(1), nhwc(x))
    close(nchw(y), block(x, past))


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
@torch.no_grad()
def test_enlargement_and_growth(frames: int, relu: bool) -> None:
    grow, conv = Grow(6, frames), nn.Conv2d(6, 5, 3, padding=1, bias=False)
    x = torch.randn(3, 6, 4, 7)
    wanted = conv(grow(F.interpolate(x, scale_factor=2)))
    weight = ops.pack_enlarging(grow.conv.weight, conv.weight)
    got = ops.enlarge_conv(nhwc(x), weight, frames, relu, ops.LIBRARY)
    close(nchw(got), F.relu(wanted) if relu else wanted)
    close(nchw(pointwise.pointwise_frames(nhwc(x), grow.conv.weight.flatten(1), frames)), grow(x))


@pytest.mark.parametrize("patch", [1, 2, 4])
@torch.no_grad()
def test_pictures(patch: int) -> None:
    conv, x = nn.Conv2d(8, 3 * patch**2, 3, padding=1), torch.randn(2, 8, 3, 5)
    wanted = F.pixel_shuffle(conv(x) + 0.5, patch).clamp(0, 1)
    weight, bias = ops.pack_picture(conv.weight, None if conv.bias is None else conv.bias + 0.5)
    close(ops.picture_conv(nhwc(x), weight, bias, patch, False, ops.LIBRARY), wanted)
    bytes_ = ops.picture_conv(nhwc(x), weight, bias, patch, True, ops.LIBRARY)
    assert float((nchw(bytes_).float() - wanted * 255).abs().max()) <= 0.501
    with pytest.raises(ValueError, match="at most 64"):
        ops.pack_picture(torch.zeros(65, 8, 3, 3), None)


COUNT = len(cases("meta", torch.float32))


@pytest.mark.parametrize("index", range(0, COUNT, 3))
def test_opcheck(index: int) -> None:
    op, arguments = cases("cpu", torch.float32)[index]
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", range(COUNT))
def test_on_the_gpu(index: int, dtype: torch.dtype) -> None:
    op, arguments = cases("cuda", dtype)[index]
    wide = [a.float() if isinstance(a, Tensor) else a for a in arguments]
    wanted = op(*wide)  # fp32 takes the reference
    # What was freed before the call is full of NaN: an output element that is not written shows.
    torch.full((1 << 26,), float("nan"), device="cuda", dtype=dtype)
    got = op(*arguments)
    if got.dtype == torch.uint8:
        assert int((got.int() - wanted.int()).abs().max()) <= (1 if dtype == torch.float16 else 4)
    else:
        close(got, wanted.to(got.dtype))


@pytest.mark.gpu
def test_nan_is_not_hidden_on_the_gpu() -> None:
    x = torch.zeros(1, 16, 16, 64, device="cuda", dtype=torch.float16)
    x[0, 3, 4, 5] = float("nan")
    weight = torch.ones(64, 3, 3, 64, device="cuda", dtype=torch.float16)
    for how in (ops.LIBRARY, ops.RESIDENT_64):
        assert int(ops.frame_conv(x, None, weight, None, None, how).isnan().sum()) == 9 * 64
    frames = ops.picture_conv(x, weight[:32], torch.zeros(32, device="cuda"), 1, False, ops.RESIDENT)
    assert int(frames.isnan().sum()) == 9 * 3


VARIANTS = [
    *({"columns": c, "bias": True, "relu": 1, "past": True} for c in (64, 128)),
    *({"columns": c, "bias": True, "relu": 2, "residual": True} for c in (64, 128)),
    *({"columns": c, "taps": 4, "relu": 1} for c in (64, 128)),
    {"columns": 64, "bias": True, "relu": 2, "residual": True, "hold": True},
    *({"columns": c, "bias": True, "hold": True, "frames": f, "patch": p} for c, p, f in ((32, 2, 1), (64, 4, 2))),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_kernels_compile_for_hopper(variant: dict[str, Any]) -> None:
    if not any(Path(name).exists() for name in nvrtc_library_names()):
        pytest.skip("no NVRTC here")
    made = kernel.kernel_of(torch.float16, **variant)
    assert made.shared_bytes <= 227 * 1024
    assert len(compile_kernel(made, "sm_90a")) > 1000


def test_the_depthwise_kernel_compiles() -> None:
    if not any(Path(name).exists() for name in nvrtc_library_names()):
        pytest.skip("no NVRTC here")
    for dtype in (torch.float16, torch.bfloat16):
        assert len(compile_kernel(frame_depthwise.kernel_of(dtype), "sm_80")) > 1000


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Launches that were asked for; tensor maps are stand-ins that hold nothing, as the driver's do."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, device, **given: found.append({"kernel": kernel, **given}))
    monkeypatch.setattr(kernel, "tensor_map", lambda x, box: TensorMap(None, x.data_ptr()))  # type: ignore[arg-type]
    monkeypatch.setattr(kernel, "processors", lambda device: 132)
    return found


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def test_a_past_that_is_the_frame_itself_is_a_past_all_the_same(launches: list[dict[str, Any]]) -> None:
    x = half(1, 45, 80, 64)
    kernel.launch_frame(x, x, half(64, 3, 3, 128), None, None, 64)
    (asked,) = launches
    assert "PAST=1" in asked["kernel"].defines
    # Down, across, column tiles, tiles, chunks; then frames per stream, channels, height, width.
    assert asked["arguments"][5:10] == (3, 5, 1, 15, 2)
    assert asked["arguments"][12:] == (1, 64, 45, 80)


@pytest.mark.parametrize(
    ("x", "past", "weight", "residual"),
    [
        (half(4, 5, 5, 64), half(3, 5, 5, 64), half(64, 3, 3, 128), None),  # 4 frames of 3 streams
        (half(4, 5, 5, 64), half(2, 5, 4, 64), half(64, 3, 3, 128), None),
        (half(4, 5, 5, 64), half(2, 5, 5, 64).float(), half(64, 3, 3, 128), None),
        (half(4, 5, 5, 64), None, half(64, 3, 3, 128), None),
        (half(4, 5, 5, 32), None, half(64, 3, 3, 32), None),
        (half(4, 5, 5, 64), None, half(96, 3, 3, 64), None),
        (half(4, 5, 5, 64), None, half(64, 3, 3, 64), half(4, 5, 5, 32)),
        (half(4, 5, 5, 64), None, half(64, 3, 3, 64).float(), None),
    ],
)
def test_what_a_kernel_would_misread_is_refused(
    x: Tensor, past: Tensor | None, weight: Tensor, residual: Tensor | None, launches: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="no kernel of frame_conv for"):
        kernel.launch_frame(x, past, weight, None, residual, 64)
    with pytest.raises(ValueError, match="enlarge_conv"):
        kernel.launch_enlarge(x, half(4 * 96, 2, 2, 64), 1, False, 64)
    with pytest.raises(ValueError, match="picture_conv"):
        kernel.launch_picture(x, half(32, 3, 3, 64), torch.zeros(32), 4, False)
    assert launches == []
