"""The output of a program at build time, stored in the program's file. A process that loads the file decodes the same
latents and compares the two outputs.

Why it exists: the hash of a file says that its bytes are those that were checked, not that this process computes with
them what the checking one did. A library may choose another algorithm, a driver may compile an engine anew, a GPU may
be faulty: cuDNN was seen to give wrong channels in some processes and not in others (docs/log.md). If the output is
bit-identical or within the limits of the parity check, the program is used; otherwise PyTorch decodes.

Usage:
    files[FILE] = RecordedOutput.of(program(z), parity, seed=0).pack()      # z = parity.latents(shape, 1.0, ...)
    RecordedOutput.unpack(files[FILE]).compare(loaded(z))                   # "", or how it differs; FastPathError
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from owl_wms.errors import FastPathError

FILE = "owl_wms_output.json"
# 8 frames of 4 channels at 360x640 have 7.4 million values, so 1 in 1,800 is sampled. A wrong 64x64 tile of one channel
# then contains two samples. A wrong channel inside the network changes all of them.
SAMPLES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedOutput:
    """An output in short: a digest and a sample.

    Attributes:
        sha256: of its bytes.
        shape: of the output.
        sample: fp32, up to `SAMPLES` of its values, spread over it.
        relative, absolute: limits on the difference of a right output: L2 over L2 of the sample, and the largest
            difference where its magnitude is at most 1.
        seed: of the latents, of scale 1 (`parity.latents`).
    """

    sha256: str
    shape: tuple[int, ...]
    sample: Tensor
    relative: float
    absolute: float
    seed: int

    @classmethod
    def of(cls, output: Tensor | tuple[Tensor, ...], parity: dict[str, Any], *, seed: int) -> RecordedOutput:
        """Records `output`. `parity` is the result of `Reference.check` for this program, whose limits hold here."""
        output = joined(output)
        row: dict[str, Any] = next((row for row in parity.get("scales", ()) if row["scale"] == 1), {})
        relative, absolute = row.get("relative_limit"), row.get("absolute_limit")
        return cls(
            sha256=output_digest(output),
            shape=tuple(output.shape),
            sample=sample_of(output),
            # Without limits, the same bits are all that will do; without an absolute one (eager overflowed), any.
            relative=0.0 if relative is None else relative,
            absolute=torch.finfo(torch.float32).max if absolute is None else absolute,
            seed=seed,
        )

    def pack(self) -> str:
        """JSON text."""
        told = {name: getattr(self, name) for name in ("sha256", "shape", "relative", "absolute", "seed")}
        sample = base64.b64encode(self.sample.numpy().astype("<f4").tobytes()).decode()
        return json.dumps({**told, "sample": sample})

    @classmethod
    def unpack(cls, text: str) -> RecordedOutput:
        """Inverse of `pack`. Raises whatever a text that `pack` did not write makes it raise."""
        told = json.loads(text)
        sample = torch.frombuffer(bytearray(base64.b64decode(told["sample"])), dtype=torch.float32)
        return cls(**{**told, "shape": tuple(told["shape"]), "sample": sample})

    def compare(self, output: Tensor | tuple[Tensor, ...]) -> str:
        """Compares the output of the loaded program with it.

        Returns:
            Empty for the same bits, else how far off the output is.

        Raises:
            FastPathError: stage "parity", if it is further off than the limits.
        """
        output = joined(output)
        if tuple(output.shape) != self.shape:
            raise _otherwise(f"its frames are {list(output.shape)}, not {list(self.shape)}")
        if output_digest(output) == self.sha256:
            return ""
        difference = (sample_of(output) - self.sample).double()
        relative = (difference.norm() / self.sample.double().norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
        absolute = torch.where(self.sample.abs() <= 1, difference.abs(), 0.0).max().item()
        if relative <= self.relative and absolute <= self.absolute:  # neither for a NaN
            return f"other bits, relative distance {relative:.1e}"
        raise _otherwise(
            f"relative distance {relative:.2e} (at most {self.relative:.2e}), "
            f"largest {absolute:.2e} (at most {self.absolute:.2e})"
        )


def _otherwise(problem: str) -> FastPathError:
    return FastPathError(
        "parity",
        f"the program does not repeat the output of its build: {problem}",
        "its file is intact, so suspect this GPU, its driver or libraries: compare with another machine",
    )


def joined(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Returns the one output, or frames and state of a step end to end."""
    return output if isinstance(output, Tensor) else torch.cat([tensor.reshape(-1) for tensor in output])


def sample_of(output: Tensor) -> Tensor:
    """fp32 on the CPU: values of `output` at steps of the golden ratio, which no row length divides."""
    flat = output.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    step = max(1, int(flat.numel() * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, flat.numel()) != 1:
        step += 1
    index = torch.arange(count, dtype=torch.int64, device="cpu") * step % flat.numel()
    return flat[index.to(flat.device)].float().cpu()


def output_digest(x: Tensor) -> str:
    """SHA-256 of an output's bytes, by which another process can tell that it computes the same."""
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
