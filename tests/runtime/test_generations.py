"""Weights that change: no frame, program or cache entry of one state of the weights is ever taken for another's."""

from __future__ import annotations

import gc
import hashlib
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from owl_wms.errors import ConfigError
from owl_wms.runtime import AudioDecode, VideoDecode
from owl_wms.runtime import decode as decode_module
from owl_wms.runtime.stamp import WeightsStamp
from owl_wms.vae import fold_weight_norm
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

SECONDS = 60.0
LATENTS = (1, 2, 4, 3, 3)
STEP = 10.0
"""What is added to every pixel of a frame: more than any other difference."""


def brighten(decoder: nn.Module, by: float = STEP) -> None:
    """Update a weight as an optimizer does, in place."""
    with torch.no_grad():
        decoder.conv_out.bias.add_(by)  # type: ignore[union-attr, operator]


def assert_right(decoder: nn.Module, decode: VideoDecode, latents: torch.Tensor) -> None:
    """The decode function answers as the caller's module does now."""
    with torch.no_grad():
        torch.testing.assert_close(decode(latents)[0].float(), decoder(latents[0]), rtol=2e-2, atol=5e-2)


def begin(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_decode_overtaken_by_new_weights_leaves_no_program_of_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = TinyDecoder().eval()
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    latents = torch.randn(LATENTS)
    decode.prepare((4, 5, 5))
    checking, go = threading.Event(), threading.Event()
    check_video = decode_module.check_video

    def slow_check(*arguments: Any) -> None:
        check_video(*arguments)
        if threading.current_thread() is slow:
            checking.set()
            assert go.wait(SECONDS)

    monkeypatch.setattr(decode_module, "check_video", slow_check)
    slow = threading.Thread(target=lambda: decode(latents))
    slow.start()
    assert checking.wait(SECONDS)  # it knows the old weights and has no program yet
    brighten(decoder)
    assert_right(decoder, decode, torch.randn(1, 2, 4, 5, 5))
    go.set()
    slow.join(SECONDS)
    assert_right(decoder, decode, latents)
    assert decode.stats().backend == "export"
    assert_right(decoder, decode, torch.randn(1, 0, 4, 3, 3))


def test_threads_and_updates_at_random_end_with_the_new_weights(tmp_path: Path) -> None:
    decoder = TinyDecoder().eval().requires_grad_(False)
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    latents = torch.randn(LATENTS)
    for _ in range(6):
        barrier = threading.Barrier(5)

        def work(update: bool, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(SECONDS)
            if update:
                brighten(decoder)
            decode(latents)

        threads = [begin(lambda update=update: work(update)) for update in (False, False, True, False, False)]
        [thread.join(SECONDS) for thread in threads]
        assert_right(decoder, decode, latents)


def test_a_build_in_flight_serves_only_the_decode_that_began_it(tmp_path: Path) -> None:
    decoder = TinyDecoder().eval()
    building, go = threading.Event(), threading.Event()

    class Slow(ExportToolchain):
        def build(self, *arguments: Any) -> dict[str, Any]:
            building.set()
            assert go.wait(SECONDS)
            return super().build(*arguments)

    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=Slow())
    latents = torch.randn(LATENTS)
    answers: list[torch.Tensor] = []
    first = begin(lambda: answers.append(decode(latents)))
    assert building.wait(SECONDS)
    with torch.no_grad():
        before = decoder(latents[0])
    brighten(decoder)
    second = begin(lambda: answers.append(decode(latents)))
    go.set()
    first.join(SECONDS)
    second.join(SECONDS)
    assert_right(decoder, decode, latents)
    steps = sorted(round(float((answer[0].float() - before).mean()) / STEP) for answer in answers)
    assert steps == [0, 1], "each of the two was answered by the weights of its own beginning"


@pytest.mark.parametrize("use_cache", [True, False])
def test_weights_that_change_during_a_build_file_nothing_under_the_old_key(tmp_path: Path, use_cache: bool) -> None:
    decoder = fold_weight_norm(TinyDecoder()).eval()  # nothing to fold, so the caller's own tensors are built from

    class Overtaken(ExportToolchain):
        """The first build reads weights that are newer than its key."""

        def build(self, *arguments: Any) -> dict[str, Any]:
            if self.builds == 0:
                brighten(decoder)
            return super().build(*arguments)

    toolchain = Overtaken()
    decode = VideoDecode(
        decoder, batch_size=2, settings=settings(tmp_path, use_cache=use_cache), toolchain=toolchain, check="off"
    )
    latents = torch.randn(LATENTS)
    assert_right(decoder, decode, latents)
    assert "changed while it was built" in decode.stats().reason
    assert_right(decoder, decode, latents)
    assert decode.stats().backend == "export"
    brighten(decoder, -STEP)  # the very bytes that the first key was computed from
    other = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    assert_right(decoder, other, latents)


def test_a_build_that_failed_on_other_weights_is_not_held_against_its_key(tmp_path: Path) -> None:
    decoder = fold_weight_norm(TinyDecoder()).eval()

    class Diverged(ExportToolchain):
        def build(self, *arguments: Any) -> dict[str, Any]:
            brighten(decoder, float("nan"))
            raise RuntimeError("parity: not finite")

    sound = decoder.conv_out.bias.detach().clone()  # type: ignore[union-attr, operator]
    latents = torch.randn(LATENTS)
    VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=Diverged())(latents)
    with torch.no_grad():
        decoder.conv_out.bias.copy_(sound)  # type: ignore[union-attr, operator]
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    assert_right(decoder, decode, latents)
    assert decode.stats().builds == 1


def test_new_weights_at_the_address_of_freed_ones_are_noticed() -> None:
    """What an allocator does after two `load_state_dict(assign=True)`, here with a buffer of our own."""
    decoder = TinyDecoder().eval()
    memory = np.zeros(3, dtype=np.float32)

    def put(values: torch.Tensor) -> None:
        decoder.conv_out.bias = nn.Parameter(values, requires_grad=False)

    put(torch.from_numpy(memory))
    decode = VideoDecode(decoder, batch_size=2)
    latents = torch.randn(LATENTS)
    assert_right(decoder, decode, latents)
    put(torch.ones(3))
    memory += STEP
    put(torch.from_numpy(memory))
    assert_right(decoder, decode, latents)


def test_audio_weights_at_the_address_of_freed_ones_are_noticed() -> None:
    decoder = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 2, 1)).eval()
    memory = np.zeros(2, dtype=np.float32)
    decoder.bias = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    decode = AudioDecode(decoder, batch_size=2)
    latents = torch.randn(1, 5, 4)
    decode(latents)
    decoder.bias = None
    memory += STEP
    decoder.bias = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    with torch.no_grad():
        expected = decoder(latents.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(decode(latents).float(), expected, rtol=1e-2, atol=5e-2)


def test_a_stamp_keeps_no_weight_alive() -> None:
    decoder = fold_weight_norm(TinyDecoder()).eval()
    decode = VideoDecode(decoder, batch_size=2)
    decode(torch.randn(LATENTS))
    gone = decode_module.EagerDecoder(decoder).stamp._storages[0]
    assert not gone.expired()
    del decode
    for module in (decoder.conv_in, decoder.conv_out):
        module.to_empty(device="meta")  # type: ignore[union-attr]
    assert gone.expired()


def test_a_module_that_is_exchanged_added_or_left_out_is_noticed() -> None:
    decoder = TinyDecoder().eval()
    changes = {
        "exchanged": lambda: setattr(decoder, "conv_out", nn.Conv2d(8, 3, 1)),
        "added": lambda: decoder.add_module("more", nn.Identity()),
        "left out": lambda: delattr(decoder, "more"),
        "a parameter replaced": lambda: setattr(decoder.conv_out, "bias", nn.Parameter(torch.zeros(3))),
        "a parameter taken away": lambda: setattr(decoder.conv_out, "bias", None),
        "a hook": lambda: decoder.conv_in.register_forward_hook(lambda module, inputs, output: output * 2),
        "a hook before": lambda: decoder.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
        "hooks gone": lambda: (decoder.conv_in._forward_hooks.clear(), decoder._forward_pre_hooks.clear()),
        "a forward of its own": lambda: setattr(decoder, "forward", lambda z: z),
        "another one": lambda: setattr(decoder, "forward", lambda z: z + 1),
    }
    for name, change in changes.items():
        stamp = WeightsStamp(decoder)
        assert stamp.matches(decoder), name
        change()
        assert not stamp.matches(decoder), name


def doubled(decoder: nn.Module) -> None:
    decoder.conv_out.register_forward_hook(lambda module, inputs, output: output * 2)


def shifted(decoder: nn.Module) -> None:
    decoder.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def replaced(decoder: nn.Module) -> None:
    decoder.forward = types.MethodType(lambda self, z: 3 * TinyDecoder.forward(self, z), decoder)  # type: ignore


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("change", [doubled, shifted, replaced])
@pytest.mark.parametrize("before", [True, False])
def test_what_a_caller_adds_to_a_decoder_is_in_its_frames(
    tmp_path: Path, enabled: bool, change: Callable[[nn.Module], None], before: bool
) -> None:
    decoder, latents = TinyDecoder().eval().requires_grad_(False), torch.randn(LATENTS)
    chosen = settings(tmp_path, enabled=enabled, use_cache=False)
    decode = VideoDecode(decoder, batch_size=4, settings=chosen, toolchain=ExportToolchain())
    if before:
        change(decoder)
    plain = decode(latents)
    if not before:
        change(decoder)
    with torch.no_grad():
        wanted = decoder(latents.flatten(0, 1)).reshape(*LATENTS[:2], 3, *plain.shape[-2:])
    torch.testing.assert_close(decode(latents).float(), wanted, rtol=1e-2, atol=2e-2)


class Guarded(TinyDecoder):
    """Cannot be copied, as anything that holds a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_decoder_that_cannot_be_copied_decodes_as_it_is(tmp_path: Path, enabled: bool) -> None:
    decoder, latents = Guarded().eval().requires_grad_(False), torch.randn(LATENTS)
    chosen = settings(tmp_path, enabled=enabled)
    frames = VideoDecode(decoder, batch_size=4, settings=chosen, toolchain=ExportToolchain())(latents)
    wanted = decoder(latents.flatten(0, 1)).reshape(frames.shape)
    torch.testing.assert_close(frames.float(), wanted, rtol=1e-2, atol=2e-2)
    with pytest.raises(ConfigError, match=r"train mode.*call decoder.eval\(\)"):
        VideoDecode(decoder.train(), batch_size=4, settings=chosen)(latents)


def test_hooks_belong_to_whoever_they_belong_to(tmp_path: Path) -> None:
    # A hook that is a method of something that cannot be copied, on a convolution that is folded.
    owner = Guarded()
    owner.seen = []

    def look(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        with owner.lock:
            owner.seen.append(output.shape)

    decoder = TinyDecoder().eval()
    decoder.conv_in.register_forward_hook(look)
    VideoDecode(decoder, batch_size=4, settings=settings(tmp_path, enabled=False))(torch.randn(LATENTS))
    assert len(owner.seen) == 1
    assert len(decoder.conv_in._forward_hooks) == 1


def test_weights_without_values_are_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="meta device"):
        VideoDecode(TinyDecoder().to("meta"), batch_size=2)(torch.randn(LATENTS))


def test_the_build_is_told_which_calibration_file_was_meant(tmp_path: Path) -> None:
    told = []
    path = tmp_path / "latents.safetensors"
    path.write_bytes(b"latents")

    class Calibrated(ExportToolchain):
        def build(self, decoder: nn.Module, request: Any, *rest: Any) -> dict[str, Any]:
            told.append((request.calibration_digest, request.key_fields()["calibration"]))
            return super().build(decoder, request, *rest)

    asked = settings(tmp_path, precision="int8", calibration=path)
    VideoDecode(TinyDecoder().eval(), batch_size=2, settings=asked, toolchain=Calibrated())(torch.randn(LATENTS))
    digest = hashlib.sha256(b"latents").hexdigest()
    assert told == [(digest, digest)]


class Circle:
    """A program that refers to itself, as a graph module of torch.fx does."""

    def __init__(self, program: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.program, self.itself = program, self

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.program(z)


def test_programs_of_old_weights_leave_no_memory_behind(tmp_path: Path) -> None:
    class Circles(ExportToolchain):
        def load(self, *arguments: Any) -> Any:
            made = Circle(super().load(*arguments))
            loaded.append(weakref.ref(made))
            return made

    loaded: list[weakref.ref[Circle]] = []
    decoder, latents = TinyDecoder().eval(), torch.randn(LATENTS)
    decode = VideoDecode(decoder, batch_size=2, settings=settings(tmp_path), toolchain=Circles())
    gc.disable()
    try:
        for _ in range(3):
            decode(latents)
            brighten(decoder)
        assert_right(decoder, decode, latents)
    finally:
        gc.enable()
    assert [program() is None for program in loaded] == [True, True, True, False]
