"""`linear8`'s plans, the shortcut of its reference and of the op, and that every planned variant compiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from owl_wms.ops import codes, linear8
from owl_wms.ops.common import nvrtc
from owl_wms.ops.linear8 import fitting, plan_of
from owl_wms.ops.linear8.plan import SHARED_LIMIT, WEIGHT_REGISTERS
from owl_wms.ops.up_residual import shuffle
from tests.ops.test_codes import gains, some_codes

FORMATS = list(codes.FORMATS.values())
# depth, channels, adds, codes, channels of the shortcut: the products of stages of 256 and 512 channels
USED = [
    (256, 512, False, True, 0),
    (512, 256, True, True, 0),
    (512, 256, True, False, 0),
    (512, 256, True, False, 512),
    (512, 1024, False, True, 0),
    (1024, 512, True, True, 0),
    (1024, 512, True, False, 0),
    (1024, 512, True, False, 1024),
    (1024, 2048, False, True, 0),
]


@pytest.mark.parametrize("shape", USED)
def test_products_of_wide_stages_have_a_plan(shape: tuple[int, int, bool, bool, int]) -> None:
    plan = plan_of(*shape)
    assert plan is not None
    assert (plan.depth, plan.channels, plan.adds, plan.codes, plan.shortcut) == shape


@pytest.mark.parametrize("shape", [(2048, 1024), (2048, 4096), (96, 192), (192, 96)])
def test_other_products_are_tritons(shape: tuple[int, int]) -> None:
    assert plan_of(*shape, False, True, 0) is None
    assert plan_of(*shape, True, True, 0) is None


def test_plans_fit_the_multiprocessor() -> None:
    depths, widths = (16, 48, 96, 256, 512, 1024, 2048), (16, 48, 96, 192, 256, 512, 1024, 4096)
    found = 0
    for depth, channels, adds, shortcut in itertools.product(depths, widths, (False, True), (0, 64, 256, 1024)):
        for with_codes in (False, True):
            plan = fitting(depth, channels, adds, with_codes, shortcut)
            if plan is None:
                continue
            found += 1
            assert plan.shared_bytes <= SHARED_LIMIT
            assert plan.blocks * 4 * -(-depth // 32) <= WEIGHT_REGISTERS
            assert plan.slices * plan.blocks * 128 >= channels
            assert min(plan.x_slots, plan.out_slots) >= 2
            assert plan.grid(1000, 132) % plan.slices == 0
            assert plan.grid(1000, 132) <= max(132, plan.slices)
    assert found > 100
    assert fitting(2048, 256, True, True, 0) is None, "its weights are more than a thread's registers"
    assert fitting(24, 256, False, True, 0) is None
    assert fitting(256, 256, True, True, 64) is None, "a shortcut comes with the last block, which has no codes"
    assert fitting(256, 256, True, False, 96) is None, "a copy of 24 channels would straddle blocks"
    assert fitting(256, 256, False, False, 0) is None


def test_tiles_cover_an_image() -> None:
    plain, shortcut = fitting(256, 256, True, False, 0), fitting(256, 256, True, False, 256)
    assert plain is not None
    assert shortcut is not None
    assert [plain.tiles_of_image(1, width) for width in (1, 64, 65)] == [1, 1, 2]
    assert [shortcut.tiles_of_image(4, width) for width in (2, 32, 34)] == [2, 2, 4]
    assert plain.grid(3, 132) == 3
    assert plain.grid(1000, 132) == 132


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_shortcut_is_shuffled_and_added(dtype: torch.dtype) -> None:
    x, gain = some_codes(2, 4, 6, 32, dtype=dtype), gains(2)
    weight, unit = codes.quantise_rows(torch.randn(48, 32), dtype)
    u, shortcut, inverse = torch.randn(2, 4, 6, 48), torch.randn(2, 2, 3, 96), torch.rand(48) * 9
    want, made = linear8.add_reference(u + shuffle(shortcut, 48), x, weight, unit, gain, inverse)
    total, found = linear8.add_reference(u, x, weight, unit, gain, inverse, shortcut)
    torch.testing.assert_close(total, want)
    assert made is not None
    assert found is not None
    assert ((found.float() - made.float()).abs() <= 1 + made.float().abs() / 8).all()
    kept = u.clone()
    assert linear8.add_linear8_(kept, x, weight, unit, gain, None, shortcut) is None
    torch.testing.assert_close(kept, want)


def test_a_residual_or_shortcut_that_does_not_fit_is_refused() -> None:
    x, gain = some_codes(1, 3, 4, 32, dtype=torch.int8), gains(1)
    weight, unit = codes.quantise_rows(torch.randn(48, 32), torch.int8)
    u = torch.randn(1, 3, 4, 48)
    with pytest.raises(RuntimeError, match="shortcut"):
        linear8.add_linear8_(u, x, weight, unit, gain, None, torch.randn(1, 1, 2, 48))
    with pytest.raises(RuntimeError, match="residual"):
        linear8.add_linear8_(u[..., :32], x, weight, unit, gain, None)


def _has_nvrtc() -> bool:
    try:
        nvrtc._nvrtc()
    except nvrtc.KernelError:
        return False
    return True


@pytest.mark.skipif(not _has_nvrtc(), reason="needs libnvrtc")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", USED)
def test_planned_variants_compile(shape: tuple[int, int, bool, bool, int], dtype: torch.dtype) -> None:
    plan = plan_of(*shape)
    assert plan is not None
    assert nvrtc.compile_kernel(plan.kernel(dtype, torch.bfloat16), "sm_90a")
