"""Every kernel variant compiles, without a GPU, for each architecture that can run it."""

from __future__ import annotations

import pytest
import torch

from owl_wms.ops import (
    conv_out,
    depthwise_gate,
    enlarging,
    enlarging_both,
    frame_bytes,
    grouped_conv,
    resize,
    stage_products,
    up_residual,
)
from owl_wms.ops.common import gpu
from owl_wms.ops.common.nvrtc import Kernel, KernelError, _nvrtc, compile_kernel
from owl_wms.ops.conv3x3 import resident
from owl_wms.ops.stage_tail import plan_of

FAMILIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
ARCHITECTURES = {f"sm_{major}{minor}": gpu.SHARED_LIMITS[major, minor] for major, minor in FAMILIES}


def variants() -> list[Kernel]:
    found: list[Kernel] = []
    for dtype in (torch.bfloat16, torch.float16):
        found += [grouped_conv.kernel_of(dtype, up2) for up2 in (False, True)]
        found += [up_residual.kernel_of(dtype, mode) for mode in range(3)]
        for channels, shortcut in ((16, 32), (32, 0), (96, 192), (192, 384)):
            plan = plan_of(channels, shortcut)
            assert plan is not None
            found += [plan.projection(dtype)]
        found += [enlarging.kernel_of(dtype, 384), enlarging.kernel_of(dtype, 384, torch.int8)]
        found += [enlarging_both.kernel_of(dtype, 768, shortcut) for shortcut in (False, True)]
        found += [resident.kernel_of(dtype, bias, relu, not relu) for bias in (False, True) for relu in (False, True)]
        found += [resident.kernel_of(dtype, bias=True, relu=False, residual=False, silu=True)]
        found += [resident.kernel_of(dtype, True, False, residual, norm_eps=1e-5) for residual in (False, True)]
        found += [resident.shuffled_kernel_of(dtype, bias) for bias in (False, True)]
        found += [stage_products.kernel_of(dtype, channels) for channels in (32, 96, 192)]
        for pad, rows in ((4, 13), (8, 4)):
            found += [conv_out.kernel_of(dtype, pad=pad, blocks=8, silu=silu, rows=rows) for silu in (False, True)]
        found += [depthwise_gate.kernel_of(dtype, 512, 32, span) for span in depthwise_gate.SPANS]
    found += [resize.kernel_of(dtype, pad=4) for dtype in (torch.bfloat16, torch.float16)]
    found += [frame_bytes.kernel_of(dtype, n) for dtype in (torch.bfloat16, torch.float16) for n in (1, 3, 4, 8)]
    return found


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        _nvrtc()
    except KernelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kernel", variants(), ids=lambda kernel: f"{kernel.op}-{'-'.join(kernel.defines)}")
def test_variant_compiles(kernel: Kernel) -> None:
    targets = {f"sm_90{kernel.suffix}": ARCHITECTURES["sm_90"]} if kernel.suffix else ARCHITECTURES
    if "FP16" in kernel.defines:  # the element type changes a few instructions, which the oldest has too
        targets = {name: limit for name, limit in targets.items() if name in ("sm_80", "sm_90", "sm_90a")}
    for architecture, limit in targets.items():
        image = compile_kernel(kernel, architecture)
        assert image[:4] == b"\x7fELF"
        assert kernel.entry.encode() in image
        assert kernel.shared_bytes <= limit, architecture


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "sm_120"])
def test_codes_of_float8_need_8_9(architecture: str) -> None:
    assert compile_kernel(enlarging.kernel_of(torch.bfloat16, 384, torch.float8_e4m3fn), architecture)[:4] == b"\x7fELF"


def test_intermediate_code_for_a_driver_to_translate() -> None:
    text = compile_kernel(resize.kernel_of(torch.bfloat16, pad=4), "compute_80")
    assert b".target sm_80" in text
    assert b".entry resize" in text


@pytest.mark.parametrize(
    ("pad", "blocks", "capability", "rows"),
    [(4, 8, (8, 6), 13), (8, 8, (9, 0), 13), (8, 8, (12, 0), 4), (8, 64, (8, 6), 0)],
)
def test_the_last_convolution_takes_the_tile_that_fits(
    pad: int, blocks: int, capability: tuple[int, int], rows: int
) -> None:
    assert conv_out.tile_rows(pad, blocks, gpu.SHARED_LIMITS[capability]) == rows


def test_compiler_errors_are_quoted() -> None:
    broken = Kernel("resize", "resize", ("PAD=zebra",))
    with pytest.raises(KernelError, match="zebra"):
        compile_kernel(broken, "sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the absence of a GPU")
def test_launch_without_a_gpu_is_an_error_not_a_crash() -> None:
    with pytest.raises((KernelError, RuntimeError, AssertionError)):
        resize.kernel_of(torch.bfloat16, pad=4).launch(torch.device("cuda", 0), grid=1, block=1, arguments=(1,))
