"""What the resident 3x3 convolution hands to the driver, and what it never does; for results see test_sana_ops.py."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms.ops import conv3x3
from owl_wms.ops.common import gpu
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.tensor_maps import TensorMap
from owl_wms.ops.conv3x3 import resident

PIXELS, OUT, DEPTH = (1, 16, 16), 128, 64


def arguments(**changes: Any) -> dict[str, Any]:
    to = {"dtype": torch.bfloat16}
    given: dict[str, Any] = {
        "x": torch.zeros(*PIXELS, DEPTH, **to),
        "weight": torch.zeros(OUT, 3, 3, DEPTH, **to),
        "bias": torch.zeros(OUT),
        "residual": torch.zeros(*PIXELS, OUT, **to),
        "relu": False,
    }
    return {**given, **changes}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Launches that were asked for; tensor maps are stand-ins that hold nothing, as the driver's do."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, device, **given: found.append({"kernel": kernel, **given}))
    monkeypatch.setattr(resident, "tensor_map", lambda x, box: TensorMap(None, x.data_ptr()))  # type: ignore[arg-type]
    monkeypatch.setattr(resident, "processors", lambda device: 132)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(1, 24, 16, DEPTH, dtype=torch.bfloat16)},
        {"x": torch.zeros(*PIXELS, DEPTH, dtype=torch.float16)},
        {"weight": torch.zeros(OUT, 3, 3, 2 * DEPTH, dtype=torch.bfloat16)},
        {"weight": torch.zeros(OUT, 1, 9, DEPTH, dtype=torch.bfloat16)},
        {"weight": torch.zeros(OUT - 64, 3, 3, DEPTH, dtype=torch.bfloat16)},
        {"residual": torch.zeros(*PIXELS, OUT, dtype=torch.float16)},
        {"residual": torch.zeros(1, 1, 1, OUT, dtype=torch.bfloat16)},
    ],
)
def test_what_the_kernel_would_misread_is_refused(changes: dict[str, Any], launches: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no resident 3x3 convolution of"):
        resident.launch(**arguments(**changes))
    assert launches == []


def shuffled(out: int = 96, **changes: Any) -> dict[str, Any]:
    to = {"dtype": torch.bfloat16}
    given: dict[str, Any] = {
        "x": torch.zeros(2, 16, 32, DEPTH, **to),
        "weight": torch.zeros(4 * out, 3, 3, DEPTH, **to),
        "bias": torch.zeros(4 * out),
        "base": torch.zeros(2, 32, 64, out, **to),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(2, 16, 32, DEPTH, dtype=torch.float16)},
        {"x": torch.zeros(2, 8, 32, DEPTH, dtype=torch.bfloat16)},
        {"weight": torch.zeros(4 * 96, 3, 3, 2 * DEPTH, dtype=torch.bfloat16)},
        {"base": torch.zeros(2, 32, 64, 96, dtype=torch.float16)},
        {"base": torch.zeros(2, 16, 32, 4 * 96, dtype=torch.bfloat16)},
        shuffled(out=48),
        shuffled(out=16),
    ],
)
def test_what_a_shuffled_convolution_would_misread_is_refused(
    changes: dict[str, Any], launches: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="no shuffled 3x3 convolution of"):
        resident.launch_shuffled(**shuffled(**changes))
    assert launches == []


@pytest.mark.parametrize("out", [32, 96, 192])
def test_a_phase_of_the_shuffle_is_a_box(
    out: int, launches: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 columns lie in one row parity, and 32 in one phase, so the boxes of the maps hold what the kernel asks for."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def noted(x: Tensor, box: tuple[int, ...]) -> TensorMap:
        boxes.append((tuple(x.shape), box))
        return TensorMap(None, x.data_ptr())  # type: ignore[arg-type]

    monkeypatch.setattr(resident, "tensor_map", noted)
    base = torch.randn(2, 32, 64, out).bfloat16()
    kept = base.clone()
    result = resident.launch_shuffled(**shuffled(out=out, base=base))
    (asked,) = launches
    assert result.shape == base.shape
    assert result.data_ptr() != base.data_ptr()
    assert torch.equal(base, kept)
    assert asked["kernel"].defines == ("BIAS=1", "RELU=0", "RESIDUAL=1", "SHUFFLE=1")
    enlarged = ((2, 16, 2, 32, 2 * out), (1, 8, 1, 16, 64))
    assert boxes == [
        ((2, 16, 32, DEPTH), resident.X_PIECE),
        ((out, 4, 9 * DEPTH), (32, 1, DEPTH)),
        enlarged,
        enlarged,
    ]
    assert 2 * out % 64 == 0
    assert out % 32 == 0
    assert asked["arguments"][5:] == (1, 2, out // 32, 2 * 2 * out // 32, 1, out)


def test_no_images_are_no_shuffled_launch(launches: list[dict[str, Any]]) -> None:
    none = {"x": torch.zeros(0, 16, 32, DEPTH), "base": torch.zeros(0, 32, 64, 96)}
    none = {name: tensor.bfloat16() for name, tensor in none.items()}
    assert resident.launch_shuffled(**shuffled(**none)).shape == (0, 32, 64, 96)
    assert launches == []


def test_a_norm_needs_every_channel_in_one_tile(launches: list[dict[str, Any]]) -> None:
    norm = (torch.ones(OUT), 1e-5)
    resident.launch(**arguments(norm=norm))
    assert launches[0]["kernel"].defines == ("BIAS=1", "RELU=0", "RESIDUAL=1", "NORM", "EPS=1e-05f")
    assert launches[0]["arguments"][-1].data_ptr() == norm[0].data_ptr()
    wide = {"weight": torch.zeros(2 * OUT, 3, 3, DEPTH, dtype=torch.bfloat16), "residual": None, "bias": None}
    with pytest.raises(ValueError, match="128 output channels, got 256"):
        resident.launch(**arguments(**wide, norm=(torch.ones(2 * OUT), 1e-5)))


def test_no_images_are_no_launch(launches: list[dict[str, Any]]) -> None:
    none = {key: torch.zeros(0, 16, 16, n, dtype=torch.bfloat16) for key, n in (("x", DEPTH), ("residual", OUT))}
    assert resident.launch(**arguments(**none)).shape == (0, 16, 16, OUT)
    assert launches == []


def test_copies_of_misaligned_tensors_live_until_the_launch(
    monkeypatch: pytest.MonkeyPatch, launches: list[dict[str, Any]]
) -> None:
    """A tensor map keeps no memory: a copy that died before the launch could be somebody else's by then."""
    copies: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    original = resident.aligned

    def aligned(tensor: Tensor) -> Tensor:
        made = original(tensor)
        if made is not tensor:
            copies.append(weakref.ref(made))
        return made

    def misaligned(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)

    monkeypatch.setattr(resident, "aligned", aligned)
    monkeypatch.setattr(Kernel, "launch", lambda *_a, **_k: alive.extend(copy() is not None for copy in copies))
    given = arguments()
    given.update({key: misaligned(given[key]) for key in ("x", "weight", "bias", "residual")})
    resident.launch(**given)
    assert alive == [True] * 4
    assert all(copy() is None for copy in copies)


@pytest.mark.parametrize(
    ("dtype", "capability", "count"), [("bfloat16", 9, 3), ("float16", 9, 3), ("float32", 9, 0), ("float16", 8, 0)]
)
def test_what_is_compiled_ahead_is_what_convolutions_launch(
    dtype: str, capability: int, count: int, monkeypatch: pytest.MonkeyPatch, launches: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: (capability, 0))
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=getattr(torch, dtype), device=torch.device("cuda", 0))
    ahead = conv3x3.variants(on_gpu)
    assert len(set(ahead)) == count
    if dtype != "float32" and count:
        given = {k: v.to(on_gpu.dtype) for k, v in arguments().items() if isinstance(v, Tensor) and k != "bias"}
        for relu, residual in ((True, None), (False, given["residual"]), (False, None)):
            resident.launch(**arguments(**{**given, "residual": residual, "relu": relu}))
        assert {asked["kernel"] for asked in launches} == set(ahead)
        launches.clear()
        resident.launch(**arguments(**{**given, "residual": None, "silu": True}))
        resident.launch(**arguments(**{**given, "norm": (torch.ones(OUT), 1e-5)}))
        resident.launch(**arguments(**{**given, "residual": None, "bias": None}))
        assert {asked["kernel"] for asked in launches} == set(conv3x3.variants(on_gpu, True, 1e-5)) - set(ahead)
        launches.clear()
        given = {k: v.to(on_gpu.dtype) for k, v in shuffled().items() if k != "bias"}
        resident.launch_shuffled(**shuffled(**given))
        assert {asked["kernel"] for asked in launches} == set(conv3x3.variants(on_gpu, shuffled=True)) - set(ahead)


@pytest.mark.parametrize(("tiles", "blocks"), [((1, 16, 16), 1), ((3, 64, 160), 120), ((8, 128, 128), 132)])
def test_a_block_a_multiprocessor_and_no_more_than_tiles(
    tiles: tuple[int, int, int], blocks: int, launches: list[dict[str, Any]]
) -> None:
    x = torch.zeros(1, dtype=torch.bfloat16).expand(*tiles, DEPTH)
    resident.launch(**arguments(x=x, residual=None, relu=True))
    (asked,) = launches
    assert asked["grid"] == blocks
    assert asked["kernel"].defines == ("BIAS=1", "RELU=1", "RESIDUAL=0")
    down, across, columns, count, chunks = asked["arguments"][5:]
    assert (down, across, columns, chunks) == (tiles[1] // 16, tiles[2] // 16, 1, 1)
    assert count == tiles[0] * down * across
