"""Every kernel variant compiles, without a GPU, for each architecture that can run it."""

from __future__ import annotations

import pytest
import torch

from owl_wms.ops import conv_out, enlarging, frame_bytes, grouped_conv, resize, up_residual
from owl_wms.ops.common.nvrtc import Kernel, KernelError, _nvrtc, compile_kernel
from owl_wms.ops.conv3x3 import resident
from owl_wms.ops.stage_tail import plan_of

ARCHITECTURES = ("sm_80", "sm_90")
# A block may have 227 KiB of shared memory on sm_90; two blocks share a multiprocessor in the kernels that matter.
MAX_SHARED = 227 * 1024


def variants() -> list[Kernel]:
    found: list[Kernel] = []
    for dtype in (torch.bfloat16, torch.float16):
        found += [grouped_conv.kernel_of(dtype, up2) for up2 in (False, True)]
        found += [up_residual.kernel_of(dtype, mode) for mode in range(3)]
        for channels, shortcut in ((16, 32), (32, 0), (96, 192), (192, 384)):
            plan = plan_of(channels, shortcut)
            assert plan is not None
            found += [plan.projection(dtype)]
        found += [enlarging.kernel_of(dtype, 384, codes) for codes in (None, torch.int8, torch.float8_e4m3fn)]
        found += [resident.kernel_of(dtype, bias, relu, not relu) for bias in (False, True) for relu in (False, True)]
        found += [conv_out.kernel_of(dtype, pad=pad, blocks=8, silu=silu) for pad in (4, 8) for silu in (False, True)]
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
    for architecture in (f"sm_90{kernel.suffix}",) if kernel.suffix else ARCHITECTURES:
        image = compile_kernel(kernel, architecture)
        assert image[:4] == b"\x7fELF"
        assert kernel.entry.encode() in image
    assert kernel.shared_bytes <= MAX_SHARED


def test_compiler_errors_are_quoted() -> None:
    broken = Kernel("resize", "resize", ("PAD=zebra",))
    with pytest.raises(KernelError, match="zebra"):
        compile_kernel(broken, "sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the absence of a GPU")
def test_launch_without_a_gpu_is_an_error_not_a_crash() -> None:
    with pytest.raises((KernelError, RuntimeError, AssertionError)):
        resize.kernel_of(torch.bfloat16, pad=4).launch(torch.device("cuda", 0), grid=1, block=1, arguments=(1,))
