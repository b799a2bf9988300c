"""What a program is asked to be: shape, precision, plans and every compile setting, in one frozen, JSON-ready object.

Why it exists: the cache key, the child process and the manifest must agree on what was asked for; a setting that is
passed to the compiler but missing from the key would let one program be taken for another.

Usage:
    spec = BuildSpec(input_shape=(8, 128, 8, 8), precision="bf16")
    spec.compile_settings("bf16")        # exactly what torch_tensorrt.compile receives
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from owl_wms.errors import ConfigError
from owl_wms.settings import PRECISIONS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Precision -> dtype of the module's activations; fp8 and int8 plans compute inside a bf16 program."""
AUTO_ORDER = ("fp16", "bf16")
"""fp16 is nearer to fp32 than bf16 but can overflow, so it comes first and must prove itself."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildSpec:
    """One program to build.

    Attributes:
        input_shape: static `(B, c, h, w)` of the latents, all >= 1.
        precision: fp16 | bf16 | fp32 | fp8 | int8, or auto (fp16 where it is finite and passes parity, else bf16).
        plans: names of the plans to build and compare; empty means every plan that applies.
        device_index: CUDA device the program is built and measured on.
        workspace_size: bytes of scratch memory TensorRT may plan with; 0 leaves it to TensorRT.
        min_block_size: fewest operators worth an engine of their own, >= 1.
        optimization_level: TensorRT builder level 0-5, or None for its default.
        timeout_seconds: wall-clock limit of the whole build, isolation included.
        isolation_seconds: share of it that the search for a failing operator may take.
        isolation_tries: most builds that search may make.
        seed: of the latents that parity and timing use.
        calibration: `.safetensors` file of latents that fp8 and int8 are calibrated on; empty for seeded ones.
        calibration_digest: what the key says of them (`key_material(...)["calibration"]`); the build refuses a file of
            which it is not true. Empty: what is true of the file when `build_program` begins.
    """

    input_shape: tuple[int, int, int, int]
    precision: str = "auto"
    plans: tuple[str, ...] = ()
    device_index: int = 0
    workspace_size: int = 0
    min_block_size: int = 5
    optimization_level: int | None = None
    timeout_seconds: float = 300.0
    isolation_seconds: float = 60.0
    isolation_tries: int = 16
    seed: int = 0
    calibration: str = ""
    calibration_digest: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", tuple(int(size) for size in self.input_shape))
        object.__setattr__(self, "plans", tuple(self.plans))
        if len(self.input_shape) != 4 or min(self.input_shape) < 1:
            raise ConfigError(
                f"input_shape must be four sizes >= 1, (B, c, h, w); got {self.input_shape}", key="input_shape"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}", key="precision"
            )
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise ConfigError(
                f"optimization_level must be 0..5 or None; got {self.optimization_level}", key="optimization_level"
            )
        for name, least in (("workspace_size", 0), ("min_block_size", 1), ("device_index", 0), ("isolation_tries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}; got {getattr(self, name)}", key=name)

    def wanted_precisions(self) -> tuple[str, ...]:
        """The precisions to try, in order; one unless `auto`."""
        return AUTO_ORDER if self.precision == "auto" else (self.precision,)

    def compile_settings(self, precision: str) -> dict[str, Any]:
        """Every keyword `torch_tensorrt.compile` gets at `precision`, JSON-ready.

        Precision itself is not among them: it is the module's dtype (`enabled_precisions` is ignored from 2.13 on).
            Torch-TensorRT's engine
        cache stays off, its key leaves out weights and operator arguments. TF32 is refused where fp32 was asked for.
        """
        settings: dict[str, Any] = {
            "use_explicit_typing": True,
            "immutable_weights": True,
            "cache_built_engines": False,
            "reuse_cached_engines": False,
            "pass_through_build_failures": True,
            "require_full_compilation": False,
            "use_python_runtime": False,
            "truncate_double": False,
            "disable_tf32": precision == "fp32",
            "min_block_size": self.min_block_size,
            "workspace_size": self.workspace_size,
        }
        if self.optimization_level is not None:
            settings["optimization_level"] = self.optimization_level
        return settings

    def to_json(self) -> dict[str, Any]:
        """Plain dict that `from_json` turns back into an equal spec."""
        return {**dataclasses.asdict(self), "input_shape": list(self.input_shape), "plans": list(self.plans)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BuildSpec:
        """Inverse of `to_json`."""
        return cls(**{**data, "input_shape": tuple(data["input_shape"]), "plans": tuple(data["plans"])})


def dtype_of(precision: str) -> torch.dtype:
    """Dtype of a program's input and output at `precision`; quantised precisions keep bf16 at their borders."""
    return DTYPES.get(precision, torch.bfloat16)
