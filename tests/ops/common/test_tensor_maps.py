"""What the driver is told about a tensor, and which tensors it is never told about."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from owl_wms.ops.common import tensor_maps
from owl_wms.ops.common.driver import KernelError, ensure_context


class Driver:
    """Keeps the arguments of the last call; `status` is what it answers."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.arguments = status, ()
        self.context: int | None = None

    def cuTensorMapEncodeTiled(self, *arguments: Any) -> int:
        self.arguments = arguments
        return self.status

    def cuCtxGetCurrent(self, context: Any) -> int:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = self.context
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = 40 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = 100 + device.value
        return 0

    def cuCtxSetCurrent(self, context: ctypes.c_void_p) -> int:
        self.context = context.value
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"invalid argument"
        return 0


def test_dimensions_go_from_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(tensor_maps, "driver", lambda: driver)
    x = torch.empty(2, 6, 10, 128, dtype=torch.bfloat16)
    made = tensor_maps.tensor_map(x, (1, 4, 66, 64))
    address, kind, rank, memory, sizes, strides, sides, steps, *modes = driver.arguments
    assert address.value == made.address
    assert made.address % tensor_maps.ALIGNMENT == 0
    begin = ctypes.addressof(made.memory)
    assert begin <= made.address <= begin + len(made.memory) - tensor_maps.BYTES
    assert (kind, rank, memory.value) == (9, 4, x.data_ptr())
    assert list(sizes) == [128, 10, 6, 2]
    assert list(strides) == [256, 2560, 15360]  # bytes, from the second dimension on
    assert list(sides) == [64, 66, 4, 1]
    assert list(steps) == [1, 1, 1, 1]
    assert modes == [0, 3, 3, 0]


def test_the_stride_of_a_single_image_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(tensor_maps, "driver", lambda: driver)
    x = torch.empty(6, 10, 128, 1, dtype=torch.bfloat16).permute(3, 0, 1, 2)
    assert x.is_contiguous()
    assert x.stride(0) == 1
    tensor_maps.tensor_map(x, (1, 4, 10, 64))
    assert list(driver.arguments[5]) == [256, 2560, 15360]


def test_a_thread_without_a_context_gets_its_device_s(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr("owl_wms.ops.common.driver.driver", lambda: driver)
    ensure_context(1)
    assert driver.context == 141
    ensure_context(0)
    assert driver.context == 141, "a context that is there stays"


@pytest.mark.parametrize(
    ("x", "box"),
    [
        (torch.empty(4, 64), (2, 64)),  # 32-bit
        (torch.empty(64, 4, dtype=torch.float16).t(), (2, 64)),
        (torch.empty(64, dtype=torch.float16), (64,)),
        (torch.empty(4, 68, dtype=torch.float16), (2, 64)),
        (torch.empty(4, 64, dtype=torch.float16), (2, 32)),
        (torch.empty(4, 64, dtype=torch.float16), (1, 2, 64)),
        (torch.empty(512, 64, dtype=torch.float16), (257, 64)),
        (torch.empty(4, 64, dtype=torch.float16), (0, 64)),
    ],
)
def test_other_tensors_and_boxes_are_refused(x: torch.Tensor, box: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no tensor map"):
        tensor_maps.tensor_map(x, box)


def test_a_refusal_by_the_driver_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(status=1)
    monkeypatch.setattr(tensor_maps, "driver", lambda: driver)
    monkeypatch.setattr("owl_wms.ops.common.driver.driver", lambda: driver)
    with pytest.raises(KernelError, match=r"describing \[4, 64\].*invalid argument"):
        tensor_maps.tensor_map(torch.empty(4, 64, dtype=torch.float16), (2, 64))
