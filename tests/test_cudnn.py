"""cuDNN's flags belong to the process: threads take turns, and our convolutions do not ask them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from owl_wms import cudnn
from owl_wms.trt.check.parity import reference_arithmetic


def state() -> tuple[bool, bool, bool, bool]:
    backend = torch.backends.cudnn
    return backend.enabled, backend.benchmark, backend.deterministic, backend.allow_tf32


def test_two_threads_restore_what_was_there() -> None:
    """Interleaved, the second to enter would restore the first one's values, after the first had restored its own."""
    before, entered = state(), threading.Event()

    def early() -> None:
        with reference_arithmetic():
            entered.set()
            time.sleep(0.2)

    def late() -> None:
        entered.wait()
        with cudnn.flags(**cudnn.BY_SHAPE):
            time.sleep(0.2)

    threads = [threading.Thread(target=target) for target in (early, late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before


def test_convolutions_say_themselves_how_cudnn_is_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    seen: list[tuple[bool, bool, bool, bool]] = []

    class Operators:
        @staticmethod
        def cudnn_convolution(*arguments: Any) -> Tensor:
            asked.append(arguments)
            return torch.zeros(1)

        @staticmethod
        def cudnn_convolution_relu(*arguments: Any) -> Tensor:
            seen.append(state())
            return torch.zeros(1)

    monkeypatch.setattr(cudnn.torch.ops, "aten", Operators)
    x = torch.zeros(1)
    with torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=True, allow_tf32=True):
        before = state()
        cudnn.convolution(x, x)
        assert state() == before
        cudnn.convolution_relu(x, x, None)
        assert state() == before
    assert asked == [(x, x, [1, 1], [1, 1], [1, 1], 1, False, False, False)]
    assert seen == [(True, False, False, False)]


def test_the_operators_take_what_they_are_given() -> None:
    """By torch's own schemas, which a CPU has too."""
    names = [a.name for a in torch.ops.aten.cudnn_convolution.default._schema.arguments]
    assert names[2:] == ["padding", "stride", "dilation", "groups", "benchmark", "deterministic", "allow_tf32"]
    names = [a.name for a in torch.ops.aten.cudnn_convolution_relu.default._schema.arguments]
    assert names[2:] == ["bias", "stride", "padding", "dilation", "groups"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bits_whatever_the_flags(dtype: torch.dtype) -> None:
    image = torch.randn(2, 64, 32, 32, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    taps = torch.randn(128, 64, 3, 3, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    bias = torch.randn(128, device="cuda", dtype=dtype)
    plain, fused = cudnn.convolution(image, taps), cudnn.convolution_relu(image, taps, bias)
    exact = torch.nn.functional.conv2d(image.double(), taps.double(), padding=1)
    assert (plain.double() - exact).norm() <= 1e-2 * exact.norm()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True, allow_tf32=True):
        assert torch.equal(cudnn.convolution(image, taps), plain)
        assert torch.equal(cudnn.convolution_relu(image, taps, bias), fused)
