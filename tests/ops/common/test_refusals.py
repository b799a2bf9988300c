"""A kernel that this GPU, driver or compiler cannot have: its operator alone is computed by a simpler way.

There is no GPU here: operators are told that they have kernels, and every launch is refused or fails.
"""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from owl_wms import cudnn
from owl_wms.fused.dcae import fuse
from owl_wms.ops import frame_bytes, frame_conv, frame_depthwise, linear8, stage_products, stage_tail
from owl_wms.ops.common import driver, gpu, nvrtc, register
from owl_wms.ops.common.driver import KernelError, KernelRefused
from owl_wms.vae import fold_weight_norm
from tests.ops.decoders import dcae, distill
from tests.ops.test_sana_ops import cases

OPS = torch.ops.owl_wms
REFUSAL = KernelRefused("resize does not compile for sm_80:\nkernel.cu(3): error")


class Launches:
    """Stands in for `Kernel.launch`: raises `error`, and counts."""

    def __init__(self) -> None:
        self.error: Exception = REFUSAL
        self.ops: list[str] = []

    def __call__(self, kernel: nvrtc.Kernel, device: torch.device, **_: Any) -> None:
        self.ops.append(kernel.op)
        raise self.error


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(nvrtc.Kernel, "launch", lambda kernel, device, **rest: made(kernel, device, **rest))
    monkeypatch.setattr(register, "_left", {})
    monkeypatch.setattr(register, "_reasons", {})
    return made


def pretend(monkeypatch: pytest.MonkeyPatch, *ops: str, capability: gpu.Capability = (8, 0)) -> None:
    """Tell these operators, or all, that their tensors lie on a GPU."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("owl_wms.ops."):
            continue
        if (not ops or name.split(".")[2] in ops) and hasattr(module, "has_kernel"):
            monkeypatch.setattr(module, "has_kernel", lambda x, dtype=None: True)
        if hasattr(module, "processors"):
            monkeypatch.setattr(module, "processors", lambda device: 108)
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setattr(stage_products, "tensor_map", lambda x, box: None)  # the driver's part
    monkeypatch.setattr(cudnn, "convolution", lambda image, taps: F.conv2d(image, taps, padding=1))
    monkeypatch.setattr(
        cudnn, "convolution_relu", lambda image, taps, bias: F.conv2d(image, taps, bias, padding=1).relu()
    )


def t(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def others() -> list[tuple[Any, tuple[Any, ...]]]:
    """Operators and arguments besides those of AutoencoderDC."""
    taps = frame_depthwise.pack(torch.randn(8, 1, 7, 7) / 7)
    grown = frame_conv.pack_enlarging(torch.randn(8, 8, 1, 1) / 3, torch.randn(4, 8, 3, 3) / 9).bfloat16()
    last, bias = frame_conv.pack_picture(torch.randn(12, 8, 3, 3) / 9, None)
    return [
        (OPS.frame_bytes.default, (t(1, 3, 4, 8),)),
        (OPS.frame_depthwise.default, (t(2, 5, 6, 4), t(1, 5, 6, 4), taps)),
        (OPS.frame_conv.default, (t(2, 4, 5, 8), t(1, 4, 5, 8), t(8, 3, 3, 16), t(8), t(2, 4, 5, 8), -3)),
        (OPS.enlarge_conv.default, (t(1, 4, 5, 8), grown, 1, True, -3)),
        (OPS.picture_conv.default, (t(1, 4, 5, 8), last.bfloat16(), bias, 2, False, -3)),
        (OPS.resize.default, (torch.randn(1, 8, 8, 4), 3, 5, 8, torch.bfloat16)),
        (OPS.up_residual.default, (t(1, 3, 5, 16), t(1, 3, 5, 32))),
    ]


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert float((got.double() - want.double()).norm()) <= 1e-2 * float(want.double().norm())


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_every_operator_has_a_way_without_its_kernel(
    capability: gpu.Capability, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton, which finds no GPU here, refuses its kernels by itself."""

    def refuse(*_: Any) -> Tensor:
        raise REFUSAL

    for name in ("launch_frame", "launch_enlarge", "launch_picture"):  # these ask the driver to describe tensors first
        monkeypatch.setattr(frame_conv.kernel, name, refuse)
    for op, arguments in [*cases("cpu", torch.bfloat16), *others()]:
        with monkeypatch.context() as here:
            want = op(*arguments)
            pretend(here, capability=capability)
            close(op(*arguments), want)
    needed = {"channel_norm", "conv3x3", "depthwise_gate", "enlarge_conv", "frame_bytes", "frame_conv"}
    needed |= {"frame_depthwise", "linear_attention", "multiscale_attention", "nearest_up", "picture_conv", "resize"}
    needed |= {"shuffle_add", "shuffle_frames", "up_residual"}
    assert needed <= set(register.refused())


@pytest.mark.parametrize(
    ("ops", "capability", "lost"),
    [
        (("conv_out",), (8, 0), {"conv_out"}),
        (("grouped_conv",), (8, 0), {"grouped_conv"}),
        (("resize",), (12, 0), {"resize"}),
        (("stage_tail",), (9, 0), {"stage_tail"}),
        ((), (8, 0), {"conv_out", "grouped_conv", "resize", "up_residual"}),
        ((), (9, 0), {"conv_out", "grouped_conv", "resize", "stage_products", "stage_tail", "up_residual"}),
    ],
)
@pytest.mark.parametrize("make", [dcae, distill])
def test_a_decoder_loses_the_refused_operators_alone(
    make: Any,
    ops: tuple[str, ...],
    capability: gpu.Capability,
    lost: set[str],
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = fold_weight_norm(make().eval())
    fused, z = fuse(decoder, torch.bfloat16), t(1, decoder.latent_channels, 4, 4)
    with torch.no_grad():
        want = fused(z)
        pretend(monkeypatch, *ops, capability=capability)
        first = fused(z)
        made = len(launches.ops)
        again = fused(z)
    close(first, want)
    assert set(register.refused()) == lost
    assert made > 0
    assert len(launches.ops) == made, "what was refused is not tried again: a graph's capture would break"
    assert torch.equal(first, again)


def test_one_warning_says_which_operator_and_why(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for size in (4, 8):
            frame_bytes.frame_bytes(t(1, 3, size, size))
    (line,) = caplog.messages
    assert (
        line
        == "frame_bytes is computed by a simpler and slower way on this machine: resize does not compile for sm_80:"
    )


def test_without_triton_its_kernels_are_refused(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = t(1, 2, 3, 16), torch.rand(16)
    want = OPS.channel_norm(x, weight, weight, None, 1e-5, False)
    pretend(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "owl_wms.ops.channel_norm.kernel", raising=False)
    assert torch.equal(OPS.channel_norm(x, weight, weight, None, 1e-5, False), want)
    assert "triton" in register.refused()["channel_norm"]


def test_a_kernel_that_failed_while_it_ran_is_no_refusal(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    launches.error = KernelError("launching: CUDA error 700, an illegal memory access was encountered")
    with pytest.raises(KernelError, match="700"):
        frame_bytes.frame_bytes(t(1, 3, 4, 8))
    assert register.refused() == {}


def test_nothing_is_added_twice(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that add into their argument are refused one after the other; the sum is that of one."""
    codes, weight = torch.randint(-9, 9, (1, 4, 4, 192)).to(torch.int8), torch.randint(-9, 9, (96, 192)).to(torch.int8)
    scale, gain = torch.rand(96), torch.ones(1, 2)
    for shortcut, capability in ((None, (8, 0)), (t(1, 2, 2, 192), (8, 0)), (t(1, 2, 2, 192), (9, 0))):
        u = t(1, 4, 4, 96)
        want, _ = linear8.add_reference(u, codes, weight, scale, gain, None, shortcut)
        with monkeypatch.context() as here:
            pretend(here, capability=capability)
            linear8.add_linear8_(u, codes, weight, scale, gain, None, shortcut)
        close(u, want)
    assert {"linear8", "up_residual"} <= set(register.refused())


def test_a_refused_tail_is_made_of_the_operators_it_fuses(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    low, hidden, shortcut = t(1, 3, 5, 16), t(1, 3, 5, 32), t(1, 3, 5, 32)
    arguments = (low, hidden, shortcut, t(2, 9, 32, 8) / 9, torch.randn(32), t(16, 32) / 5)
    want = OPS.stage_tail(*arguments)
    pretend(monkeypatch, "stage_tail", capability=(9, 0))
    close(OPS.stage_tail(*arguments), want)
    assert launches.ops == ["stage_tail"]
    assert set(register.refused()) == {"stage_tail"}
    assert stage_tail.pays(low, shortcut)


def test_a_refused_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def loaded(kernel: nvrtc.Kernel, architecture: str) -> None:
        tried.append(architecture)
        raise KernelRefused(f"no {architecture}")

    monkeypatch.setattr(nvrtc, "_loaded", loaded)
    monkeypatch.setattr(nvrtc, "_refused", {})
    monkeypatch.setattr(gpu, "capability", lambda device: (8, 6))
    for _ in range(2):
        with pytest.raises(KernelRefused, match="no sm_86"):
            nvrtc._function(frame_bytes.kernel_of(torch.bfloat16, 3), 0)
    assert tried == ["sm_86"]


@pytest.mark.parametrize(
    ("status", "refused"), [(1, True), (209, True), (218, True), (222, True), (701, True), (2, False), (700, False)]
)
def test_the_driver_s_word_decides(status: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "driver", lambda: SimpleNamespace(cuGetErrorString=lambda status, text: 0))
    with pytest.raises(KernelError) as raised:
        driver.check_driver(status, "loading it")
    assert isinstance(raised.value, KernelRefused) == refused


WITHOUT_KERNELS = {"code_gain", "pointwise", "pointwise_add", "pointwise_frames", "pointwise_relu", "stage", "stage8"}
"""Made of libraries' products and of other operators."""


def test_every_operator_with_a_kernel_names_a_simpler_way() -> None:
    bare = set()
    for path in Path(cudnn.__file__).parent.glob("ops/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "define":
                schema = node.args[0]
                assert isinstance(schema, ast.Constant)
                if not any(word.arg == "simpler" for word in node.keywords):
                    bare.add(str(schema.value).partition("(")[0])
    assert bare == WITHOUT_KERNELS
