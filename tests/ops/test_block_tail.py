"""`block_tail`: its parts against the reference, a refused kernel, the kernel on a GPU of compute capability 9.0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.ops import block_tail, grouped_conv
from owl_wms.ops.common import gpu, nvrtc, register
from owl_wms.ops.common.driver import KernelRefused
from owl_wms.ops.common.tensor_maps import TensorMap
from tests.ops.test_gpu import DTYPES, LIMIT, close, poison

# batch, height, width, channels of hidden
SHAPES = [
    (1, 1, 1, 512),
    (1, 8, 16, 512),
    (2, 7, 15, 512),
    (3, 9, 17, 512),
    (1, 64, 80, 512),
    (2, 33, 129, 512),
    (5, 24, 31, 64),
    (1, 17, 200, 192),
    (1, 1, 300, 512),
    (1, 200, 2, 512),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, channels: int = 256) -> tuple[Tensor, ...]:
    """Fresh arguments of `add_branch_`."""

    def make(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=device) * scale).to(dtype)

    wide = shape[-1]
    return (
        make(*shape[:3], channels),
        make(*shape),
        grouped_conv.pack(make(wide, 16, 3, 3, scale=0.1)),
        torch.randn(wide, device=device),
        make(channels, wide, scale=0.1),
    )


def reference(u: Tensor, hidden: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> Tensor:
    return u + grouped_conv.reference(hidden, w2, b2, False) @ w3.t()


def test_it_is_the_rest_of_a_block_and_stays_in_place() -> None:
    u, *rest = inputs((2, 3, 5, 32), torch.float32, "cpu", 16)
    want = reference(u, *rest)
    assert block_tail.add_branch_(u, *rest) is u
    torch.testing.assert_close(u, want, rtol=1e-5, atol=1e-5)


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_tail, "has_kernel", lambda x: True)
    monkeypatch.setattr(block_tail, "processors", lambda device: 132)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(block_tail, "tensor_map", lambda x, box: TensorMap(None, x.data_ptr()))  # type: ignore[arg-type]
    monkeypatch.setattr(block_tail, "PAYS", True)
    monkeypatch.setattr(register, "_left", {})
    monkeypatch.setattr(register, "_reasons", {})


def test_a_refused_kernel_adds_the_branch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[int] = []

    def refuse(kernel: nvrtc.Kernel, device: torch.device, *, grid: int, block: int, arguments: Any) -> None:
        grids.append(grid)
        raise KernelRefused("too little shared memory")

    pretend_hopper(monkeypatch)
    monkeypatch.setattr(nvrtc.Kernel, "launch", refuse)
    u, *rest = inputs((1, 9, 17, 64), torch.bfloat16, "cpu")
    want = reference(u.double(), *(x.double() for x in rest))
    first, again = u.clone(), u.clone()
    close(block_tail.add_branch_(first, *rest), want, LIMIT[torch.bfloat16])
    assert torch.equal(block_tail.add_branch_(again, *rest), first)
    assert grids == [4], "two tiles down, two across, tried once"
    assert set(register.refused()) == {"block_tail"}


def test_shapes_that_do_not_belong_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch)
    u, hidden, w2, b2, w3 = inputs((1, 9, 17, 64), torch.bfloat16, "cpu")
    for wrong in (
        (u, hidden[:, :8], w2, b2, w3),
        (u, hidden, w2[:2], b2, w3),
        (u, hidden, w2, b2[:16], w3),
        (u, hidden, w2, b2, w3[:128]),
        (u, hidden, w2, b2, w3.half()),
    ):
        with pytest.raises(RuntimeError, match="do not belong together"):
            block_tail.add_branch_(*wrong)


def test_where_the_kernel_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch)
    u, hidden = torch.empty(1, 4, 4, 256), torch.empty(1, 4, 4, 512)
    assert block_tail.pays(u, hidden)
    assert not block_tail.pays(u[..., :128].contiguous(), hidden)
    assert not block_tail.pays(u.transpose(1, 2), hidden)
    assert not block_tail.pays(torch.empty(4097)[1:].view(1, 4, 4, 256), hidden)
    assert not block_tail.pays(u, hidden[..., :48])
    monkeypatch.setattr(gpu, "capability", lambda device: (10, 0))
    assert not block_tail.pays(u, hidden)


@pytest.fixture
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.seed()
    torch.cuda.manual_seed(torch.initial_seed() % 2**31)


def guarded(u: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `u` with NaN before and behind it in memory, and that memory."""
    memory = torch.full((u.numel() + 8192,), float("nan"), device=u.device, dtype=u.dtype)
    inside = memory[4096:-4096].view(u.shape)
    inside.copy_(u)
    return inside, memory


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, ...], cluster: int, dtype: torch.dtype) -> None:
    u, *rest = inputs(shape, dtype, "cuda")
    want = reference(u.double(), *(x.double() for x in rest))
    poison(u.numel())
    got, memory = guarded(u)
    close(block_tail.launch_(got, *rest, cluster=cluster), want, LIMIT[dtype])
    assert memory[:4096].isnan().all()
    assert memory[-4096:].isnan().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
def test_repeated_runs_and_replays_are_bit_equal() -> None:
    u, *rest = inputs((2, 130, 150, 512), torch.bfloat16, "cuda")
    want = block_tail.launch_(u.clone(), *rest)
    assert want.isfinite().all()
    for _ in range(20):
        assert torch.equal(block_tail.launch_(u.clone(), *rest), want), "a race"
    graph, out = torch.cuda.CUDAGraph(), u.clone()
    with torch.cuda.graph(graph):
        block_tail.launch_(out, *rest)
    for _ in range(3):
        out.copy_(u)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("_hopper")
def test_strided_and_misaligned_arguments() -> None:
    u, hidden, w2, b2, w3 = inputs((1, 9, 33, 512), torch.float16, "cuda")
    want = block_tail.add_branch_(u.clone(), hidden, w2, b2, w3)
    shifted = []
    for value in (hidden, w2, b2, w3):
        shifted.append(torch.empty(value.numel() + 1, device="cuda", dtype=value.dtype)[1:].view(value.shape))
        shifted[-1].copy_(value)
    assert torch.equal(block_tail.add_branch_(u.clone(), *shifted), want)
    mirrored = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(block_tail.add_branch_(u.clone(), mirrored, w2, b2, w3), want)
    odd = torch.empty(u.numel() + 1, device="cuda", dtype=u.dtype)[1:].view(u.shape).copy_(u)
    close(block_tail.add_branch_(odd, hidden, w2, b2, w3), want, LIMIT[torch.float16])
