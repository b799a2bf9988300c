"""CUDA C++ kernels compiled at run time, with nothing but what `pip install torch` brings.

Why it exists: the kernels under `owl_wms.ops` are one .cu file each; a wheel per CUDA version, or a toolkit on the
user's machine, would be the alternative. NVRTC (shipped with torch's CUDA wheels) turns a file into machine code in
about half a second, once a process and variant; libcuda launches it on torch's current stream, so streams, graphs
and devices behave as for torch's own kernels. Compile before capturing a graph: run the program once.

Usage:
    kernel = Kernel("grouped_conv", entry="grouped_conv", defines=("UP2",), shared_bytes=110_592)
    kernel.launch(tensor.device, grid=1024, block=288, arguments=(out, x, weight, bias, 64, 64, 192, 64))
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from owl_wms.ops.common import gpu, machine_code
from owl_wms.ops.common.driver import KernelError, KernelRefused, check_driver, driver, ensure_context
from owl_wms.ops.common.tensor_maps import TensorMap

ROOT = Path(__file__).parents[1]
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of cuda.h
STREAM_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING of cuda.h
DEFAULT_SHARED_BYTES = 48 * 1024

_lock = threading.Lock()
_functions: dict[tuple[Kernel, int, str], ctypes.c_void_p] = {}
_refused: dict[tuple[Kernel, int, str], str] = {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One variant of one .cu file.

    Args:
        op: folder under `owl_wms/ops` that holds `kernel.cu`.
        entry: name of the `extern "C"` function.
        defines: preprocessor symbols, `NAME` or `NAME=VALUE`, that select the variant.
        shared_bytes: dynamic shared memory of a block.
        headers: further files under `owl_wms/ops`, put between `common/device.cuh` and the kernel in this order.
        suffix: "a" compiles for one architecture's own instructions (`sm_90a`), which no other architecture runs.
    """

    op: str
    entry: str
    defines: tuple[str, ...] = ()
    shared_bytes: int = 0
    headers: tuple[str, ...] = ()
    suffix: str = ""

    def source(self) -> str:
        """The full text that is compiled: shared device code, then the kernel."""
        files = ("common/device.cuh", *self.headers, f"{self.op}/kernel.cu")
        return "".join((ROOT / file).read_text("utf-8") for file in files)

    def launch(
        self, device: torch.device, *, grid: int, block: int, arguments: Sequence[Tensor | TensorMap | int | None]
    ) -> None:
        """Enqueue on torch's current stream of `device`; tensors are passed as pointers, ints as 32-bit integers,
        tensor maps as they are.

        Raises:
            KernelRefused: this compiler, driver or GPU cannot have it; nothing was launched.
            KernelError: compilation, loading or launching failed otherwise.
        """
        if machine_code.noted(self):
            return
        values: list[Any] = []  # keeps what `places` points to
        places: list[int] = []
        for argument in arguments:
            if isinstance(argument, TensorMap):
                places.append(argument.address)
                continue
            if isinstance(argument, int):
                values.append(ctypes.c_int(argument))
            else:
                values.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
            places.append(ctypes.addressof(values[-1]))
        pointers = (ctypes.c_void_p * len(places))(*places)
        with torch.cuda.device(device):
            ensure_context(torch.cuda.current_device())
            function = _function(self, torch.cuda.current_device())
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            status = driver().cuLaunchKernel(
                function, grid, 1, 1, block, 1, 1, self.shared_bytes, stream, pointers, ctypes.c_void_p(None)
            )
            check_driver(status, f"launching {self}")


def new_stream() -> int:
    """A new CUDA stream of the current device, apart from torch's pool and not ordered with the legacy default stream.

    Raises:
        KernelError: the driver made none.
    """
    ensure_context(torch.cuda.current_device())
    stream = ctypes.c_void_p()
    check_driver(driver().cuStreamCreate(ctypes.byref(stream), STREAM_NON_BLOCKING), "making a stream")
    return stream.value or 0


def _function(kernel: Kernel, index: int) -> ctypes.c_void_p:
    key = (kernel, index, architecture_of(kernel, index))
    found = _functions.get(key)
    if found is not None:
        return found
    if key in _refused:  # compiling it takes half a second, and waiting for the stream would break a capture
        raise KernelRefused(_refused[key])
    with _lock:
        if key not in _functions:
            try:
                _functions[key] = _loaded(kernel, key[-1])
            except KernelRefused as error:
                _refused[key] = str(error)
                raise
    return _functions[key]


def _loaded(kernel: Kernel, architecture: str) -> ctypes.c_void_p:
    """The function on the current device, compiled if need be. Raises KernelError."""
    torch.cuda.current_stream().synchronize()  # also makes the device's primary context current in this thread
    image = compile_kernel(kernel, architecture)
    library, module, function = driver(), ctypes.c_void_p(), ctypes.c_void_p()
    check_driver(library.cuModuleLoadData(ctypes.byref(module), image), f"loading {kernel}")
    check_driver(
        library.cuModuleGetFunction(ctypes.byref(function), module, kernel.entry.encode()), f"finding {kernel}"
    )
    if kernel.shared_bytes > DEFAULT_SHARED_BYTES:
        status = library.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, kernel.shared_bytes)
        check_driver(status, f"reserving {kernel.shared_bytes} bytes of shared memory for {kernel}")
    return function


def architecture_of(kernel: Kernel, index: int) -> str:
    """Returns the target that `kernel` is compiled for on CUDA device `index`, for example `sm_90`."""
    return gpu.architecture(torch.device("cuda", index), kernel.suffix)


def compile_ahead(kernels: Collection[Kernel], index: int) -> None:
    """Compile for CUDA device `index` in threads of their own; a launch that needs one meanwhile waits for it."""
    machine_code.ahead(
        [functools.partial(compile_kernel, kernel, architecture_of(kernel, index)) for kernel in kernels]
    )


def compile_kernel(kernel: Kernel, architecture: str) -> bytes:
    """Machine code for `sm_90` and the like, or intermediate code for `compute_80`; once per process and kernel.

    Needs no GPU.

    Raises:
        KernelRefused: it does not compile, and the message has the compiler's log; or there is no compiler.
        KernelError: the compiler failed otherwise.
    """
    return machine_code.once(kernel, architecture, lambda: _compile(kernel, architecture))


def _compile(kernel: Kernel, architecture: str) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    name = f"{kernel.op}.cu".encode()
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), kernel.source().encode(), name, 0, None, None), "create"
    )
    try:
        options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{define}" for define in kernel.defines)]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            raise KernelRefused(f"{kernel} does not compile for {architecture}:\n{_compiler_log(program)}")
        size_of, read = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            if architecture.startswith("sm_")
            else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        size = ctypes.c_size_t()
        _check_nvrtc(size_of(program, ctypes.byref(size)), "size")
        image = ctypes.create_string_buffer(size.value)
        _check_nvrtc(read(program, image), "read")
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _compiler_log(program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _nvrtc().nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _nvrtc().nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def nvrtc_library_names() -> list[str]:
    """Lists places of libnvrtc: torch's CUDA wheels in both of their layouts, then the loader's own search path."""
    major = (torch.version.cuda or "13").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or []]
    files = [
        root / folder / "lib" / f"libnvrtc.so.{major}" for root in roots for folder in (f"cu{major}", "cuda_nvrtc")
    ]
    return [*(str(file) for file in files if file.exists()), f"libnvrtc.so.{major}", "libnvrtc.so"]


@functools.lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    for name in nvrtc_library_names():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelRefused("libnvrtc was not found (it comes with torch's CUDA wheels): pip install nvidia-cuda-nvrtc")


def _check_nvrtc(status: int, step: str) -> None:
    if status:
        raise KernelError(f"NVRTC failed to {step} a program: error {status}")
