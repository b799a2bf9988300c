"""`stage_tail`: the reference against the ops it fuses, its plans, its kernels on a GPU of compute capability 9.0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from owl_wms.ops import grouped_conv, stage, stage_tail
from owl_wms.ops.enlarging import rows_of_band
from owl_wms.ops.stage_tail import plan_of
from owl_wms.ops.stage_tail.plan import SHARED_LIMIT, padded
from tests.ops.test_gpu import DTYPES, LIMIT, close, poison
from tests.ops.test_references import arguments

# batch, height, width, C, channels of the shortcut
SHAPES = [
    (1, 1, 1, 16, 32),
    (2, 2, 3, 16, 16),
    (1, 5, 17, 32, 0),
    (2, 7, 16, 48, 96),
    (1, 9, 33, 64, 256),
    (2, 3, 8, 80, 160),
    (1, 31, 50, 96, 192),
    (3, 12, 16, 96, 24),
    (1, 17, 23, 96, 0),
    (1, 6, 40, 96, 384),
    (1, 3, 16, 112, 224),
    (2, 5, 19, 128, 256),
    (2, 13, 21, 192, 384),
    (1, 4, 16, 192, 96),
    (1, 2, 5, 256, 512),
]


def inputs(batch: int, height: int, width: int, channels: int, shortcut: int, dtype: torch.dtype, device: str) -> tuple:
    """Fresh arguments of the op; the last number of a shape is 0 for no shortcut."""

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    wide = 2 * channels
    return (
        make(batch, height, width, channels),
        make(batch, height, width, wide),
        make(batch, height, width, shortcut) if shortcut else None,
        grouped_conv.pack(make(wide, 16, 3, 3, scale=0.1)),
        torch.randn(wide, device=device),
        make(channels, wide, scale=0.1),
    )


def widened(values: tuple) -> tuple:
    return tuple(None if value is None else value.double() for value in values)


@pytest.mark.parametrize("shape", [(2, 3, 5, 16, 32), (1, 1, 1, 16, 0), (1, 4, 2, 32, 32)])
def test_op_and_composition_are_the_reference_on_the_cpu(shape: tuple[int, ...]) -> None:
    values = inputs(*shape, torch.float32, "cpu")
    want = stage_tail.reference(*values)
    torch.testing.assert_close(torch.ops.owl_wms.stage_tail(*values), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stage_tail.composition(*values), want, rtol=1e-5, atol=1e-5)


def test_it_is_the_rest_of_a_stage() -> None:
    x, shortcut, proj, w1, b1, w2, b2, w3, scale = arguments(1, 2, True)
    low = x @ proj.t()
    got = stage_tail.reference(low, low @ w1[0].t() + b1[0], shortcut, w2[0], b2[0], w3[0])
    want = stage.reference(x, shortcut, proj, w1, b1, w2, b2, w3, scale)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_op_passes_opcheck_and_refuses_what_does_not_fit() -> None:
    values = inputs(1, 3, 4, 16, 32, torch.float32, "cpu")
    torch.library.opcheck(torch.ops.owl_wms.stage_tail, values)
    torch.library.opcheck(torch.ops.owl_wms.stage_tail, (*values[:2], None, *values[3:]))
    low, hidden, shortcut, w2, b2, w3 = (value.to("meta") for value in values)
    op = torch.ops.owl_wms.stage_tail
    assert op(low, hidden, shortcut, w2, b2, w3).shape == (1, 6, 8, 16)
    with pytest.raises(RuntimeError, match="twice as wide"):
        op(low, hidden[..., :16], shortcut, w2, b2, w3)
    with pytest.raises(RuntimeError, match="width 16"):
        op(low, hidden, shortcut, w2, b2, w3[:8])
    with pytest.raises(RuntimeError, match="shortcut"):
        op(low, hidden, shortcut[:, :2], w2, b2, w3)
    with pytest.raises(RuntimeError, match="one type"):
        op(low, hidden, shortcut.half(), w2, b2, w3)


def test_plans_fit_and_say_where_there_is_none() -> None:
    assert plan_of(96, 192).whole
    assert plan_of(16, 32).whole
    assert not plan_of(192, 384).whole
    assert plan_of(192, 384).columns == 96
    assert not plan_of(96, 384).whole, "this shortcut leaves no room for the branch"
    assert plan_of(96, 192, whole=False).columns == 96
    assert plan_of(192, 384, whole=True) is None
    for channels, shortcut in ((24, 48), (96, 100), (32, 12), (1024, 2048)):
        assert plan_of(channels, shortcut) is None
    for channels in range(16, 257, 16):
        plan = plan_of(channels, 2 * channels)
        assert plan is not None
        assert plan.shared_bytes <= SHARED_LIMIT
        assert plan.threads <= 512
        assert channels % plan.columns == 0
        assert padded(plan.columns) >= plan.columns


@pytest.mark.parametrize(("height", "columns"), [(256, 128), (256, 16), (1, 1), (7, 3), (128, 64), (1000, 9)])
def test_bands_cover_the_image_in_few_waves(height: int, columns: int) -> None:
    rows = rows_of_band(height, columns, 132)
    assert 1 <= rows <= height
    waves = -(-columns * -(-height // rows) // 132)
    assert waves * (rows + 3) <= -(-columns // 132) * (height + 3), "no worse than one band a column"


def run_poisoned(run: Callable[..., Tensor], values: tuple) -> Tensor:
    poison(values[0].numel() * 4)
    return run(*values)


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = inputs(*shape, dtype, "cuda")
    want = stage_tail.reference(*widened(values))
    for whole in (True, False):
        plan = plan_of(shape[3], shape[4], whole)
        if plan is not None:
            close(run_poisoned(lambda *v, p=plan: stage_tail.run_plan(p, *v), values), want, 1.5 * LIMIT[dtype])
    close(torch.ops.owl_wms.stage_tail(*values), want, 1.5 * LIMIT[dtype])


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("shape", [(2, 40, 70, 96, 192), (1, 40, 70, 192, 384), (4, 64, 64, 32, 64)])
def test_repeated_runs_and_replays_are_bit_equal(shape: tuple[int, ...]) -> None:
    values = inputs(*shape, torch.bfloat16, "cuda")
    want = torch.ops.owl_wms.stage_tail(*values)
    assert want.isfinite().all()
    for _ in range(20):
        assert torch.equal(run_poisoned(torch.ops.owl_wms.stage_tail, values), want), "a race"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.owl_wms.stage_tail(*values)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
def test_strided_and_misaligned_arguments() -> None:
    values = inputs(1, 5, 6, 32, 64, torch.float16, "cuda")
    want = torch.ops.owl_wms.stage_tail(*values)
    shifted = [
        torch.empty(value.numel() + 1, device="cuda", dtype=value.dtype)[1:].view(value.shape) for value in values
    ]
    for target, value in zip(shifted, values, strict=True):
        target.copy_(value)
    assert torch.equal(torch.ops.owl_wms.stage_tail(*shifted), want)
    mirrored = values[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(torch.ops.owl_wms.stage_tail(mirrored, *values[1:]), want)


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
def test_fp32_takes_the_composition() -> None:
    values = inputs(1, 4, 5, 16, 32, torch.float32, "cuda")
    close(torch.ops.owl_wms.stage_tail(*values), stage_tail.reference(*widened(values)), 1e-3)
