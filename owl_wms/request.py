"""`Request`: one program that is wanted, as one frozen object that travels from the decode function to the build
process.

Why one object: the cache key, the build process and the manifest must agree on what was asked for. A setting that
reached the compiler and not the key would let one program be taken for another.

Usage:
    request = Request(input_shape=(8, 128, 8, 8), device="cuda:0", precision="bf16")
    request.key_fields()        # what of it is in the cache key
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from owl_wms.errors import ConfigError
from owl_wms.settings import EIGHT_BITS, PRECISIONS, TensorRTConfig

AUTO_ORDER = ("fp16", "bf16")
"""fp16 is nearer to fp32 than bf16 but can overflow, so it comes first and must prove itself."""
SEEDED = 16
"""Seeded normal latents that 8-bit plans are calibrated on where no file is given."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One program to find or to build.

    Attributes:
        input_shape: static `(B, c, h, w)` of the latents, all >= 1.
        device: where the program is built, measured and run, for example `cuda:1`. Not in the key; the facts of that
            GPU are, so that rank 1 finds what rank 0 built.
        precision: fp16 | bf16 | fp32 | fp8 | int8, or auto (fp16 where it is finite and passes parity, else bf16).
        plans: names of the plans to build and compare; empty means every plan that applies.
        workspace_size: bytes of scratch memory TensorRT may plan with; 0 leaves it to TensorRT.
        min_block_size: fewest operators worth an engine of their own, >= 1.
        timeout_seconds: wall-clock limit of the whole build, isolation included.
        seed: of the latents that parity check and timing use.
        calibration: `.safetensors` file of latents that fp8 and int8 are calibrated on; empty for seeded ones. Not in
            the key; its digest is.
        calibration_digest: of that file when the request was made, filled in where it is empty. The build refuses a
            file that has another one.
        state: shapes of the tensors of a streaming decoder's state, in order; empty for other decoders. The program
            then takes them after the latents, in its own dtype, and returns the next ones after the frames.

    Raises:
        ConfigError: a value out of range.
    """

    input_shape: tuple[int, int, int, int]
    device: str = "cuda:0"
    precision: str = "auto"
    plans: tuple[str, ...] = ()
    workspace_size: int = 0
    min_block_size: int = 5
    timeout_seconds: float = 300.0
    seed: int = 0
    calibration: str = ""
    calibration_digest: str = ""
    state: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__  # the usual way to normalise inside a frozen dataclass
        put(self, "input_shape", tuple(int(size) for size in self.input_shape))
        put(self, "plans", tuple(self.plans))
        put(self, "state", tuple(tuple(int(size) for size in shape) for shape in self.state))
        if len(self.input_shape) != 4 or min(self.input_shape) < 1:
            raise ConfigError(
                f"input_shape must be four sizes >= 1, (B, c, h, w); got {self.input_shape}", key="input_shape"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}", key="precision"
            )
        for name, least in (("workspace_size", 0), ("min_block_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}; got {getattr(self, name)}", key=name)
        if self.precision in EIGHT_BITS and not self.calibration_digest:
            put(self, "calibration_digest", _digest_of(self.calibration))

    @classmethod
    def of(
        cls,
        settings: TensorRTConfig,
        input_shape: tuple[int, ...],
        device: str,
        state: tuple[tuple[int, ...], ...] = (),
    ) -> Request:
        """The request that the settings make for latents of this shape, and for a state of these shapes.

        Reads the calibration file, if there is one.
        """
        return cls(
            input_shape=input_shape,  # type: ignore[arg-type]  # four sizes; anything else is refused above
            device=device,
            precision=settings.precision,
            plans=settings.plans,
            workspace_size=settings.workspace_size,
            calibration="" if settings.calibration is None else str(settings.calibration.absolute()),
            state=state,
        )

    @property
    def device_index(self) -> int | None:
        """Index of the CUDA device; None for another device and for "the current one"."""
        kind, _, index = self.device.partition(":")
        return int(index) if kind == "cuda" and index else None

    def precisions(self) -> tuple[str, ...]:
        """The precisions to try, in order; one unless `auto`."""
        return AUTO_ORDER if self.precision == "auto" else (self.precision,)

    def key_fields(self) -> dict[str, Any]:
        """Returns the fields that the program depends on, by their names in the cache key; JSON-ready.

        The plans and the compile settings are added by `trt.key`, which knows what they stand for.
        """
        return {
            "input_shape": list(self.input_shape),
            "state": [list(shape) for shape in self.state],
            "precision": self.precision,
            "calibration": self.calibration_digest if self.precision in EIGHT_BITS else "",
            "build": {"seed": self.seed, "timeout_seconds": self.timeout_seconds},
        }

    def to_json(self) -> dict[str, Any]:
        """Plain dict that `from_json` turns back into an equal request."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """Inverse of `to_json`."""
        return cls(**data)


def _digest_of(calibration: str) -> str:
    """SHA-256 of the file's bytes, or how many latents are seeded. A file that cannot be read has a value of its own,
    and the build names the reason.
    """
    if not calibration:
        return f"seeded {SEEDED}"
    try:
        return hashlib.sha256(Path(calibration).read_bytes()).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"
