"""The JIT form for trainers: `torch.compile(backend="tensorrt")` with the same rewrites, precision and guards.

Why it exists: a trainer that samples a few images an hour wants no cache directory, and its decoder may change. The
price is a compilation in every process and no isolation: the build happens inside the trainer. A failure to compile or
to run, or a program that misses parity, ends in the eager decoder, with one warning.

Usage:
    decode = compile_for_training(decoder, precision="bf16")
    x = decode(z)          # first call of a shape compiles and checks; no gradients flow
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError, FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.request import Request
from owl_wms.timing import interleaved
from owl_wms.trt import plans
from owl_wms.trt.check.parity import Reference
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import fp32_copy, module_dtype
from owl_wms.trt.library import importer
from owl_wms.trt.library.compiler import without_shared_kernels
from owl_wms.trt.spec import DTYPES, compile_settings

_LOG = logging.getLogger(__name__)
JIT_SCALES = (1.0,)


class TrainingDecoder(nn.Module):
    """A decoder that runs compiled where it can: `[B, c, h, w] -> [B, C, H, W]` in the original's dtype, without
    gradients.

    Attributes:
        decoder: the original, untouched; it decodes after any failure.
        reason: why it is eager; empty while the compiled form is used or untried.
        plan: the plan asked for, then the one that was compiled; empty before the first is chosen.
        relative_error: of the last shape compiled, against the fp32 decoder; NaN before.
        latency_ms: of the last shape compiled, `{"pytorch": ..., "compiled": ...}` per call; empty before.
    """

    def __init__(self, decoder: nn.Module, precision: str, plan: str, workspace_size: int, strict: bool) -> None:
        super().__init__()
        # Kept out of the submodules: an optimizer or a checkpoint over this wrapper sees the decoder once.
        self.decoder = decoder
        self.precision = precision
        self.plan = plan
        self.workspace_size = workspace_size
        self.strict = strict
        self.reason = ""
        self.relative_error = math.nan
        self.latency_ms: dict[str, float] = {}
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._process = os.getpid()
        self._lock = threading.Lock()

    @uncompiled
    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:
        frames: Tensor
        if self.reason:
            frames = self.decoder(z)
            return frames
        try:
            shape = tuple(z.shape)
            # Torch-TensorRT builds for the current device, and a caller's autocast would change what is traced and run.
            on_device = torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()
            with torch.autocast(z.device.type, enabled=False), on_device:
                with self._lock:
                    if shape not in self._compiled:
                        self._compiled[shape] = self._compile(z)
                frames = self._compiled[shape](z.to(DTYPES[self.precision])).to(module_dtype(self.decoder))
                return frames
        except Exception as error:
            raise_interrupt(error)
            self._give_up(error)
            frames = self.decoder(z)
            return frames

    @staticmethod
    def _require(z: Tensor) -> None:
        if z.device.type != "cuda":
            raise FastPathError(
                "build", f"TensorRT needs CUDA latents; got {z.device}", "move decoder and latents to a GPU"
            )
        importer.require()

    def _compile(self, z: Tensor) -> Any:
        self._require(z)
        request = Request(
            input_shape=tuple(z.shape),  # type: ignore[arg-type]
            device=str(z.device),
            precision=self.precision,
            plans=(self.plan,) if self.plan else (),
            workspace_size=self.workspace_size,
        )
        recording = Recording.of(self.decoder, request.input_shape)
        fp32 = fp32_copy(self.decoder, z.device)
        # Not timed here: the first plan that applies was the fastest in every measurement.
        plan = plans.select(fp32, request, recording).plans[self.precision][0]
        module, _ = plan.lower(fp32, request, self.precision, recording)
        settings = {**compile_settings(request, self.precision), **plan.settings}
        # Dynamo's default is to swallow a failed build; here it must surface, so that the reason is told.
        compiled = torch.compile(module, backend="tensorrt", dynamic=False, options=settings)
        eager = plans.cast_copy(fp32, self.precision)
        reference = Reference.measure(
            fp32, eager, tuple(z.shape), DTYPES[self.precision], z.device, request.seed, scales=JIT_SCALES
        )
        with without_shared_kernels():
            checked = reference.check(compiled)
        if not checked["passed"]:
            raise FastPathError("parity", checked["reason"], "use another precision")
        self.plan, self.relative_error = plan.name, checked["relative_error"]
        z = reference.inputs[0]
        self.latency_ms = interleaved({"pytorch": eager, "compiled": compiled}, z, rounds=5, budget_seconds=1.0)
        _LOG.info(
            "decoding %s takes %.2f ms by plan %s, %.2f ms with PyTorch; relative error %.1e",
            list(z.shape),
            self.latency_ms["compiled"],
            plan.name,
            self.latency_ms["pytorch"],
            self.relative_error,
        )
        return compiled

    def _give_up(self, error: Exception) -> None:
        if self.strict:
            raise error
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        self.reason = str(error) if isinstance(error, FastPathError) else f"{type(error).__name__}: {first}"
        if os.getpid() == self._process:  # destroying an engine in a forked child, which has no GPU, aborts it
            self._compiled.clear()
        _LOG.warning("decoding with PyTorch from now on: %s", self.reason)


def compile_for_training(
    decoder: nn.Module,
    *,
    precision: str = "bf16",
    plan: str = "",
    workspace_size: int = 0,
    strict: bool = False,
) -> TrainingDecoder:
    """Wrap `decoder` for use inside a training loop.

    Args:
        decoder: any float dtype and device; held as the fallback. Weights are read when a shape is first compiled;
            after changing them, wrap again.
        precision: fp16, bf16 or fp32; `auto` is not offered, since two builds inside a trainer cost more than they
            save.
        plan: name of a registered plan; empty for the first that applies, our fused form where the decoder has one.
        workspace_size: bytes of TensorRT scratch memory, 0 for its own choice.
        strict: raise instead of falling back.

    Raises:
        ConfigError: a precision that is not one of the three.
    """
    if precision not in DTYPES:
        raise ConfigError(
            f"precision must be one of {', '.join(DTYPES)} for training; got {precision!r}", key="precision"
        )
    return TrainingDecoder(decoder, precision, plan, workspace_size, strict)
