"""What surrounds a decode: the state of the process, a caller that is compiled, a decoder that is not one of ours."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from owl_wms.runtime import VideoDecode
from owl_wms.settings import TensorRTConfig
from tests.faults.conftest import Fault
from tests.faults.test_runtime import PlainToolchain, decode_with, reference
from tests.process_state import STATES, set_in_process

LATENTS = (1, 6, 4, 3, 5)


def draw() -> Tensor:
    return torch.randn(LATENTS, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32, device="cpu")


def test_the_state_of_the_process(fault: Fault, tmp_path: Path) -> None:
    first, decoder = decode_with(tmp_path)
    latents = draw()
    wanted = first(latents)
    torch.testing.assert_close(wanted.float(), reference(decoder, latents), rtol=1e-2, atol=1e-2)
    for state in STATES:
        with set_in_process(state):
            settings = TensorRTConfig(cache_dir=tmp_path / "cache", precision="fp32")
            decode = VideoDecode(decoder, batch_size=4, settings=settings, toolchain=PlainToolchain())
            assert torch.equal(decode(latents), wanted), state
            counts = decode.stats()
            assert (counts.hits, counts.builds, counts.fallbacks, counts.failures) == (1, 0, 0, {}), state
    fault.record("process-state", f"{len(STATES)} states: the cached program, the same frames")


class Doubling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Decoder(nn.Module):
    """`[B, 4, h, w] -> [B, 3, h, w]` around one convolution of a test's choice."""

    latent_channels = 4

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = conv, nn.Conv2d(8, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.last(self.conv(z).relu())


def hold_a_lock(decoder: Decoder) -> None:
    decoder.lock = threading.Lock()  # type: ignore[assignment]


def hook(decoder: Decoder) -> None:
    decoder.conv.register_forward_hook(lambda module, inputs, output: output + 1)


def hook_before(decoder: Decoder) -> None:
    decoder.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def give_it_a_forward(decoder: Decoder) -> None:
    decoder.forward = types.MethodType(lambda self, z: 3 * Decoder.forward(self, z), decoder)  # type: ignore


def switch_to_training(decoder: Decoder) -> None:
    decoder.train()


def exchange_a_module(decoder: Decoder) -> None:
    decoder.last = nn.Conv2d(8, 3, 1).requires_grad_(False)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 8, 3, padding=1),
    "weight norm": lambda: weight_norm(nn.Conv2d(4, 8, 3, padding=1)),
    "weight norm over another dimension": lambda: weight_norm(nn.Conv2d(4, 8, 3, padding=1), dim=1),
    "weight norm over all": lambda: weight_norm(nn.Conv2d(4, 8, 3, padding=1), dim=None),
    "weight norm of a subclass": lambda: weight_norm(Doubling(4, 8, 3, padding=1)),
    "two norms": lambda: spectral_norm(weight_norm(nn.Conv2d(4, 8, 3, padding=1))),
    "the old weight norm": lambda: nn.utils.weight_norm(nn.Conv2d(4, 8, 3, padding=1)),
}
CHANGES = (hook, hook_before, give_it_a_forward, switch_to_training, exchange_a_module, hold_a_lock)
WRAPPERS: tuple[Callable[[nn.Module], nn.Module], ...] = (
    lambda decoder: decoder,
    lambda decoder: nn.DataParallel(decoder),
    lambda decoder: torch.compile(decoder, backend="eager"),  # type: ignore[return-value]
    lambda decoder: decoder.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
)


def test_decoders_of_others(fault: Fault, tmp_path: Path) -> None:
    latents, checked = draw(), 0

    def check(decoder: Decoder, decode: VideoDecode, name: str) -> None:
        nonlocal checked
        with torch.no_grad():
            wanted = decoder(latents.flatten(0, 1)).reshape(*LATENTS[:2], 3, *LATENTS[3:])
        torch.testing.assert_close(decode(latents).float(), wanted, rtol=1e-2, atol=2e-2, msg=lambda m: f"{name}: {m}")
        checked += 1

    for name, make in CONVOLUTIONS.items():
        for change in CHANGES:
            for before in (True, False):
                torch.manual_seed(4)
                decoder = Decoder(make()).eval().requires_grad_(False)
                if before:
                    change(decoder)
                settings = TensorRTConfig(cache_dir=tmp_path, precision="fp32", use_cache=False)
                decode = VideoDecode(decoder, batch_size=4, settings=settings, toolchain=PlainToolchain())
                check(decoder, decode, f"{name}, {change.__name__} before")
                if not before:
                    change(decoder)
                    check(decoder, decode, f"{name}, {change.__name__} after")
    for wrap in WRAPPERS:
        decoder = Decoder(CONVOLUTIONS["weight norm"]()).eval().requires_grad_(False)
        settings = TensorRTConfig(cache_dir=tmp_path, precision="fp32", use_cache=False)
        wrapped: Any = wrap(copy.deepcopy(decoder))
        check(decoder, VideoDecode(wrapped, batch_size=4, settings=settings, toolchain=PlainToolchain()), "wrapped")
    fault.record(
        "odd-decoders", f"{checked} decodes of {len(CONVOLUTIONS)} kinds, {len(CHANGES)} changes: all as PyTorch"
    )


def test_a_compiled_caller(fault: Fault, tmp_path: Path) -> None:
    torch._dynamo.reset()
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Tensor]:
        traced.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    decode, decoder = decode_with(tmp_path)
    latents, rounds = draw(), 20
    step = torch.compile(lambda z: decode(z * 1.0), backend=backend)
    for _ in range(rounds):
        torch.testing.assert_close(step(latents).float(), reference(decoder, latents), rtol=1e-2, atol=2e-2)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(1.01)
    assert len(traced) == 1, traced
    fault.record("compiled-caller", f"{rounds} calls, each with new weights: only the caller's own operator was traced")
