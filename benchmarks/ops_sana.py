"""The sana decoder's ops at the shapes that dominate it, for `benchmarks.ops`; convolutions by both, us and library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Case
from owl_wms.ops import channel_norm, conv3x3, depthwise_gate, shuffle_add

OPS = torch.ops.owl_wms
# (side of the image, channels, channels of the result, whether a residual is added instead of a ReLU)
CONVOLUTIONS = (
    (128, 512, 512, False),
    (128, 512, 512, True),
    (256, 256, 256, False),
    (256, 256, 256, True),
    (64, 512, 2048, False),
    (32, 1024, 2048, False),
    (16, 1024, 4096, False),
)
# (side, channels of the gate's result)
GATES = ((64, 2048), (32, 4096), (16, 4096), (8, 8192))
WAYS = {"ours": conv3x3.RESIDENT, "library": conv3x3.LIBRARY}


def sana_cases(
    batch: int,
    device: str,
    dtype: torch.dtype,
    convolutions: tuple[tuple[int, int, int, bool], ...] = CONVOLUTIONS,
    gates: tuple[tuple[int, int], ...] = GATES,
) -> Iterator[Case]:
    """Every op for images of `batch`."""
    for side, channels, out, adds in convolutions:
        yield from _convolution(batch, device, dtype, side, channels, out, adds)
    for side, channels in gates:
        yield _gate(batch, device, dtype, side, channels)
    side, channels, _, _ = convolutions[0]
    yield _shuffle(batch, device, dtype, side, channels)
    yield _norm(batch, device, dtype, side, channels)


def _convolution(
    batch: int, device: str, dtype: torch.dtype, side: int, channels: int, out: int, adds: bool
) -> Iterator[Case]:
    pixels = batch * side * side
    weight = conv3x3.pack(torch.randn(out, channels, 3, 3, device=device) * (9 * channels) ** -0.5).to(dtype)
    bias = torch.randn(out, device=device)

    def make(b: int) -> tuple:
        x = torch.randn(b, side, side, channels, device=device).to(dtype)
        return x, weight, bias, torch.randn(b, side, side, out, device=device).to(dtype) if adds else None, not adds

    for name, how in WAYS.items():
        yield Case(
            name=f"conv3x3 {name} {side}x{side} {channels} to {out}, {'residual' if adds else 'ReLU'}",
            make=make,
            run=lambda *values, how=how: OPS.conv3x3(*values, how),
            reference=conv3x3.reference,
            bytes_moved=2 * (pixels * (channels + out * (1 + adds)) + weight.numel()),
            flops=18 * pixels * channels * out,
        )


def _gate(batch: int, device: str, dtype: torch.dtype, side: int, channels: int) -> Case:
    weight = depthwise_gate.pack(torch.randn(2 * channels, 1, 3, 3, device=device) / 3).float()
    bias = torch.randn(2 * channels, device=device)
    return Case(
        name=f"depthwise_gate {side}x{side}x{channels}",
        make=lambda b: (torch.randn(b, side, side, 2 * channels, device=device).to(dtype), weight, bias),
        run=OPS.depthwise_gate,
        reference=depthwise_gate.reference,
        bytes_moved=6 * batch * side * side * channels,
        flops=36 * batch * side * side * channels,
    )


def _shuffle(batch: int, device: str, dtype: torch.dtype, side: int, channels: int) -> Case:
    """To half the channels at twice the side."""

    def make(b: int) -> tuple[Tensor, Tensor]:
        y, x = (torch.randn(b, side, side, n * channels, device=device).to(dtype) for n in (2, 1))
        return y, x

    return Case(
        name=f"shuffle_add {2 * side}x{2 * side}x{channels // 2}",
        make=make,
        run=OPS.shuffle_add,
        reference=shuffle_add.reference,
        bytes_moved=2 * batch * side * side * 5 * channels,
    )


def _norm(batch: int, device: str, dtype: torch.dtype, side: int, channels: int) -> Case:
    weight, bias = torch.randn(channels, device=device), torch.randn(channels, device=device)
    return Case(
        name=f"channel_norm {side}x{side}x{channels}, ReLU",
        make=lambda b: (torch.randn(b, side, side, channels, device=device).to(dtype), weight, bias, None, 1e-5, True),
        run=OPS.channel_norm,
        reference=channel_norm.reference,
        bytes_moved=4 * batch * side * side * channels,
    )
