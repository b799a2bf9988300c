"""Lists the 8-bit ops at the shapes of the base decoder's wide stages, for `benchmarks.ops`.

Errors are of codes against the reference's codes, both read as numbers: half a percent of the codes lie on an edge and
fall to either side, and the matrix unit adds fp8 products with about 14 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.accuracy import relative_l2
from benchmarks.case import Case
from owl_wms.ops import codes, grouped_conv8, linear8
from owl_wms.ops.grouped_conv import pack

LIMIT = 2e-2
# (side of the image, width of the stage)
STAGES = ((512, 256), (256, 512), (128, 1024), (64, 2048))
# Random codes of all magnitudes that seldom saturate.
SPREAD = {torch.int8: 40.0, torch.float8_e4m3fn: 60.0}


def code_cases(batch: int, device: str, stages: tuple[tuple[int, int], ...] = STAGES) -> Iterator[Case]:
    """Products and grouped convolutions of every stage in both formats, for images of `batch`."""
    for side, width in stages:
        for name, dtype in codes.FORMATS.items():
            yield from _products(batch, device, side, width, name, dtype)
            yield from _convolutions(batch, device, side, 2 * width, name, dtype)


def _codes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return codes.encode(torch.randn(*shape, device=device) * SPREAD[dtype], dtype)


def _one(batch: int, device: str) -> Tensor:
    return torch.ones(batch, 2, device=device)


def _products(batch: int, device: str, side: int, width: int, name: str, dtype: torch.dtype) -> Iterator[Case]:
    pixels = batch * side * side

    def weights(channels: int, depth: int) -> tuple[Tensor, Tensor]:
        rows, unit = codes.quantise_rows(torch.randn(channels, depth, device=device), dtype)
        return rows, unit * 0.7 / depth**0.5

    up, up_scale = weights(2 * width, width)
    bias = torch.randn(2 * width, device=device)
    yield Case(
        name=f"linear8 up {name} {side}x{side} {width} to {2 * width}",
        make=lambda b: (_codes((b, side, side, width), dtype, device), up, up_scale, bias, _one(b, device)),
        run=torch.ops.owl_wms.linear8,
        reference=linear8.reference,
        bytes_moved=pixels * 3 * width,
        flops=4 * pixels * width * width,
        compare=lambda values: relative_l2(torch.ops.owl_wms.linear8(*values), linear8.reference(*values)),
        limit=LIMIT,
    )
    down, down_scale = weights(width, 2 * width)
    inverse = torch.ones(width, device=device)

    def compare(values: tuple) -> float:
        total, made = linear8.add_reference(*values)
        got = linear8.add_linear8_(*values)
        assert got is not None
        assert made is not None
        return max(relative_l2(got, made), relative_l2(values[0], total))

    yield Case(
        name=f"linear8 down {name} {side}x{side} {2 * width} to {width}, residual and codes",
        make=lambda b: (
            torch.randn(b, side, side, width, device=device).bfloat16(),
            _codes((b, side, side, 2 * width), dtype, device),
            *(down, down_scale, _one(b, device), inverse),
        ),
        run=linear8.add_linear8_,
        reference=lambda *values: linear8.add_reference(*values)[1],
        bytes_moved=pixels * 7 * width,
        flops=4 * pixels * width * width,
        compare=compare,
        limit=LIMIT,
    )


def _convolutions(batch: int, device: str, side: int, channels: int, name: str, dtype: torch.dtype) -> Iterator[Case]:
    pixels, fp8 = batch * side * side, dtype == torch.float8_e4m3fn
    weight, bias = 0.1 * torch.randn(channels, 16, 3, 3), torch.randn(channels, device=device)
    taps, scale = grouped_conv8.pack_codes(weight, torch.ones(channels), dtype)
    floats = pack(weight * SPREAD[dtype]).to(device=device, dtype=torch.bfloat16)
    run = torch.ops.owl_wms.grouped_conv8

    def reference(*values: Tensor) -> Tensor:
        return grouped_conv8.reference(*values[:-1], dtype)

    made = (taps.to(device), scale.to(device), bias, _one(batch, device))
    for title, up2, factor, inputs in (("", False, 1, made), (" up2", True, 2, (floats, None, bias, made[-1]))):
        low = side // factor

        def make(b: int, up2: bool = up2, low: int = low, inputs: tuple = inputs) -> tuple:
            shape = (b, low, low, channels)
            x = torch.randn(*shape, device=device).bfloat16() if up2 else _codes(shape, dtype, device)
            return (x, *inputs[:-1], inputs[-1][:b], up2, fp8)

        yield Case(
            name=f"grouped_conv8{title} {name} {side}x{side}x{channels}",
            make=make,
            run=run,
            reference=reference,
            bytes_moved=pixels * channels + pixels // factor**2 * channels * (2 if up2 else 1),
            flops=pixels * channels * 2 * 9 * 16,
            compare=lambda values: relative_l2(run(*values), reference(*values)),
            limit=LIMIT * (2 if up2 else 1),
        )
