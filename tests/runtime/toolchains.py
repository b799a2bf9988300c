"""Small decoders and toolchains for a machine without a GPU: real ExportedPrograms, real cache, faults on order.

Usage:
    decode = VideoDecode(TinyDecoder().eval(), batch_size=4, settings=settings(tmp_path), toolchain=ExportToolchain())
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from owl_wms.cache import Key
from owl_wms.request import Request
from owl_wms.runtime import Stored
from owl_wms.runtime.turns import tracing
from owl_wms.settings import TensorRTConfig


class TinyDecoder(nn.Module):
    """`[B, 4, h, w] -> [B, 3, 2h, 2w]`, weight norm live, a few hundred parameters."""

    latent_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = weight_norm(nn.Conv2d(4, 8, 3, padding=1))
        self.conv_out = weight_norm(nn.Conv2d(8, 3, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(F.silu(F.interpolate(self.conv_in(z), scale_factor=2.0)))


def settings(directory: Path, **changes: Any) -> TensorRTConfig:
    """Settings whose cache is `directory/cache`."""
    return TensorRTConfig(**{"cache_dir": directory / "cache", **changes})


class ExportToolchain(Stored):
    """Builds by torch.export and stores `program.pt2`; everything of TensorRT's path but TensorRT.

    Attributes:
        fail: step name (`ready`, `key_material`, `build`, `load`, `run`) -> exception raised there.
        damage: applied to a program's output before it is returned.
        builds, loads, runs: counts.
        precision: what the report claims.
    """

    name = "export"

    def __init__(
        self, *, fail: dict[str, BaseException] | None = None, precision: str = "bf16", salt: str = ""
    ) -> None:
        self.fail = fail or {}
        self.damage: Any = None
        self.precision = precision
        self.salt = salt
        self.builds = self.loads = self.runs = 0
        self.guard = threading.Lock()

    def _step(self, step: str) -> None:
        if step in self.fail:
            raise self.fail[step]

    def ready(self, request: Request) -> None:
        self._step("ready")

    def key_material(self, decoder: nn.Module, request: Request) -> dict[str, Any]:
        self._step("key_material")
        digest = hashlib.sha256()
        for name, tensor in decoder.state_dict().items():
            digest.update(name.encode() + bytes(tensor.float().contiguous().view(torch.uint8).numpy()))
        return {
            "weights": digest.hexdigest(),
            "input_shape": list(request.input_shape),
            "precision": self.precision,
            "salt": self.salt,
        }

    def build(
        self, decoder: nn.Module, request: Request, key: Key, folder: Path, progress: Any, meanwhile: Any
    ) -> dict[str, Any]:
        with self.guard:
            self.builds += 1
        self._step("build")
        dtype = next(decoder.parameters()).dtype
        with tracing():  # it exports in this process
            exported = torch.export.export(decoder, (torch.zeros(request.input_shape, dtype=dtype),))
            torch.export.save(exported, folder / "program.pt2")
        return {"plan": "export", "precision": self.precision, "dtype": str(dtype)}

    def load(self, data: bytes, request: Request, report: Mapping[str, Any]) -> Any:
        self.loads += 1
        self._step("load")
        module = torch.export.load(io.BytesIO(data)).module()
        dtype = getattr(torch, report["dtype"].removeprefix("torch."))
        running = [0]
        json.dumps(dict(report))  # the report came through the manifest, so it is plain JSON

        def program(z: Tensor) -> Tensor:
            with self.guard:
                running[0] += 1
                alone = running[0] == 1
            try:
                self.runs += 1
                assert alone, "two runs of one program at once"
                assert tuple(z.shape) == request.input_shape
                if self.runs > 1:  # the first is the loader's own smoke run
                    self._step("run")
                frames = module(z.to(dtype))
                return frames if self.damage is None or self.runs == 1 else self.damage(frames)
            finally:
                with self.guard:
                    running[0] -= 1

        return program
