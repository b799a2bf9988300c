"""The streaming decoders that `benchmarks.taehv` measures, and what it compares their frames by."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmarks.taehv_steps import Step
from owl_wms import cudnn
from owl_wms.configs import TAEHVConfig
from owl_wms.state import State, zeros
from owl_wms.vae import build_decoder
from owl_wms.vae.taehv import TAEHVDecoder

# name -> configuration, latent height and width, milliseconds wanted (issue: streaming TAEHV)
FORMS: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "hunyuan1.5 720p": ({"latent_channels": 32, "patch_size": 2}, 45, 80, 0.90),
    "wan2.1 480x832": ({"latent_channels": 16}, 60, 104, 1.35),
    "hunyuan1.5 super 720p": ({"latent_channels": 32, "patch_size": 2, "form": "super"}, 45, 80, 2.0),
}
TOY_FORMS: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "normal": ({"latent_channels": 16, "patch_size": 2}, 2, 3, 0.90),
    "super": ({"latent_channels": 16, "form": "super"}, 2, 3, 2.0),
}
CHAIN = 32  # consecutive steps over which errors are compared
MOST_ERROR = 1.2  # times that of eager fp16


@dataclasses.dataclass(frozen=True)
class Bench:
    """Holds where it runs and what is measured."""

    device: str = "cuda"
    half: torch.dtype = torch.float16
    forms: dict[str, tuple[dict[str, Any], int, int, float]] = dataclasses.field(default_factory=lambda: FORMS)
    rounds: int = 60
    power_seconds: float = 0.8


TOY = Bench("cpu", torch.bfloat16, TOY_FORMS, 2)


def make(config: dict[str, Any], bench: Bench) -> TAEHVDecoder:
    """Returns a decoder with random weights, fp32, whose frames spread over [0, 1]."""
    torch.manual_seed(0)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", **config)).to(bench.device).eval().requires_grad_(False)
    assert isinstance(decoder, TAEHVDecoder)
    for name, parameter in decoder.named_parameters():
        parameter.normal_(std=0.1 if name.endswith("bias") else (2 / parameter[0].numel()) ** 0.5)
    last: Any = decoder[22]
    last.weight.mul_(1e-4)
    last.bias.fill_(0.5)
    spread = decoder(torch.randn(1, 2, decoder.latent_channels, 8, 8, device=bench.device)).std()
    last.weight.mul_(0.15 / spread)
    return decoder


def chained(step: Step, latents: Tensor, state: State) -> list[Tensor]:
    """Frames of every step, in fp32."""
    frames = []
    for latent in latents:
        decoded, state = step(latent, state)
        frames.append(decoded.float().clone())
    return frames


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative error of every step."""
    return [
        float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)) for a, b in zip(got, wanted, strict=True)
    ]


class Example:
    """A decoder of one form, its latents and states, and the frames that fp32 makes of them.

    Args:
        name: of the form.
        shape: of the latents, where not the form's own.
        steps: how many latents.
    """

    def __init__(self, name: str, bench: Bench, shape: tuple[int, int, int] | None = None, steps: int = CHAIN) -> None:
        config, height, width, self.wanted_ms = bench.forms[name]
        self.name, self.decoder = name, make(config, bench)
        streams, height, width = shape or (1, height, width)
        self.shape = (streams, self.decoder.latent_channels, height, width)
        latents = torch.randn(steps, *self.shape, device=bench.device)
        start = zeros(self.decoder.state_specs(self.shape), bench.device)
        with cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            self.truth = chained(self.decoder.step, latents, start)
        self.latents, self.start = latents.to(bench.half), tuple(tensor.to(bench.half) for tensor in start)

    def errors(self, step: Step) -> list[float]:
        """Relative error of every step from the beginning of a stream."""
        return errors(chained(step, self.latents, self.start), self.truth)
