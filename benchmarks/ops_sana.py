"""Lists the sana decoder's ops at the shapes that dominate it, for `benchmarks.ops`; convolutions by both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from owl_wms.ops import channel_norm, conv3x3, conv_out, depthwise_gate, linear_attention, nearest_up, shuffle_add

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

    def make(b: int) -> tuple[Any, ...]:
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


def checks(
    dtype: torch.dtype, device: str = "cuda", most_side: int = 512
) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
    """Every operator of AutoencoderDC in all its ways: name, a call on the GPU, and its reference in fp32 on the same
    values. Sizes are those of 512x512 pixels, and some that no tile divides; none has a side above `most_side`.
    """

    def t(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def case(name: str, op: Any, *values: Any, tail: tuple[Any, ...] = ()) -> tuple[str, Callable[[], Tensor], Tensor]:
        exact = [value.float() if isinstance(value, Tensor) else value for value in values]
        return name, lambda: op(*values, *tail), op(*exact, *tail)

    for side, channels in ((512, 128), (256, 256), (48, 128), (21, 64)):
        if side > most_side:
            continue
        x, weight, bias, gain = t(1, side, side, channels), t(channels, 3, 3, channels), wide(channels), wide(channels)
        weight = weight * (9 * channels) ** -0.5
        residual, name = t(1, side, side, channels), f"{side}x{side}x{channels}"
        for how in conv3x3.ways(x, weight, False, False, silu=True):
            one, run, _ = case(f"conv3x3 SiLU {name} way {how}", OPS.conv3x3, x, weight, bias, None, False, how, True)
            yield one, run, conv3x3.reference(x.float(), weight.float(), bias, None, False, True)
        wanted = OPS.conv3x3_norm(x.float(), weight.float(), gain, bias, residual.float(), 1e-5, conv3x3.LIBRARY)
        for how in conv3x3.ways(x, weight, True, False, norm=True):
            arguments = (x, weight, gain, bias, residual, 1e-5, how)
            yield f"conv3x3_norm {name} way {how}", functools.partial(OPS.conv3x3_norm, *arguments), wanted
    for batch, side, channels, out in ((1, 256, 256, 128), (2, 64, 512, 512), (1, 17, 64, 32)):
        if side > most_side:
            continue
        weight = nearest_up.pack(wide(out, channels, 3, 3) * (9 * channels) ** -0.5).to(dtype)
        yield case(
            f"nearest_up {side}x{side} {channels} to {out}",
            OPS.nearest_up, t(batch, side, side, channels), weight, wide(out), (4 * out) % channels == 0,
        )  # fmt: skip
    for batch, height, width, heads in ((1, 64, 64, 16), (8, 16, 16, 32), (1, 33, 29, 32), (1, 256, 256, 16)):
        if height > most_side:
            continue
        qkv = t(batch, height, width, heads * 96)
        taps, point = linear_attention.pack_scale(wide(heads * 96, 1, 5, 5) / 5, wide(heads * 96, 32, 1, 1) / 6)
        name = f"{batch}x{height}x{width}, {heads} heads"
        yield case(f"linear_attention {name}", OPS.linear_attention, qkv, tail=(32, 1e-15))
        yield case(
            f"multiscale_attention {name}", OPS.multiscale_attention, qkv, taps, point.to(dtype), tail=(32, 1e-15)
        )
    weight, bias = wide(3, 128, 3, 3) / 34, wide(4)
    packed = conv_out.pack(weight.to(dtype))
    x = t(1, most_side, most_side, 128)
    yield case(f"conv_out without SiLU {most_side}x{most_side}x128", OPS.conv_out, x, packed, bias, tail=(False,))
    image = wide(1, 200, 300, 4)
    yield "resize to the size it has", lambda: OPS.resize(image, 3, 200, 300, dtype), image[..., :3].permute(0, 3, 1, 2)
