"""`owl_wms.accelerate` on decoders of streams: ours, the author's module, and wrappers around it.

The stand-in for the author's class is written from what its checkpoints and callers show: layers in a Sequential named
`decoder`, and `decode_video`, which walks through them. Run: python -m pytest tests/runtime/test_accelerate_video.py
"""

from __future__ import annotations

import copy
import logging
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import owl_wms
from owl_wms.configs import TAEHVConfig
from owl_wms.errors import FastPathError
from owl_wms.runtime.accelerated_video import AcceleratedStream, AcceleratedVideo
from owl_wms.vae import taehv
from owl_wms.vae.taehv import Clamp, MemoryBlock, SuperMemoryBlock, TAEHVDecoder
from owl_wms.vae.taehv_modules import decoder_within, gives_same_frames
from tests.runtime.test_streaming import Programs

NOTED = 0.125
"""What the stand-in for a program adds to the frames, so that a test sees who decoded."""


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taehv, "WIDTHS", dict.fromkeys(taehv.WIDTHS, (16, 8, 8, 8)))


class Grown(nn.Module):
    def __init__(self, ch: int, stride: int) -> None:
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(ch, ch * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, x.shape[1], *x.shape[2:])


class Theirs(nn.Module):
    """A module with the author's layout and call; `clamped` and `whole` are habits of other copies of it."""

    def __init__(self, *, form: str = "normal", clamped: bool = True, whole: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        made = TAEHVDecoder(TAEHVConfig(model_id="taehv", latent_channels=4, form=form, **options))  # type: ignore[arg-type]
        layers = [Grown(m.conv.in_channels, m.factor) if isinstance(m, taehv.Grow) else m for m in made]
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.decoder = nn.Sequential(*layers)
        self.patch_size, self.clamped, self.whole = made.config.patch_size, clamped, whole
        self.frames_to_trim = made.frames_per_latent - 1
        with torch.no_grad():
            self.decoder[22].weight.mul_(20)
            self.decoder[22].bias.fill_(0.5)

    def decode_video(self, x: Tensor, parallel: bool = True, show_progress_bar: bool = True) -> Tensor:
        clips, each = x.shape[:2]
        x = x.flatten(0, 1)
        for layer in self.decoder:
            if isinstance(layer, (MemoryBlock, SuperMemoryBlock)):
                frames = x.unflatten(0, (clips, -1))
                x = layer(x, torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1).flatten(0, 1))
            else:
                x = layer(x)
        x = nn.functional.pixel_shuffle(x, self.patch_size)
        x = (x.clamp_(0, 1) if self.clamped else x).unflatten(0, (clips, -1))
        return x if self.whole and each % 2 == 0 else x[:, self.frames_to_trim :]


class Wrapper(nn.Module):
    """As people put it in the place of a pipeline's autoencoder: channels before time, [-1, 1], changed in place."""

    def __init__(self, inner: Theirs) -> None:
        super().__init__()
        self.taehv = inner

    def decode(self, latents: Tensor) -> tuple[Tensor]:
        return (self.taehv.decode_video(latents.transpose(1, 2), parallel=False).transpose(1, 2).mul_(2).sub_(1),)


def noted(call: int, answered: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return answered[0] + NOTED, *answered[1:]


def clip(n: int = 3, b: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(b, n, 4, 3, 2, generator=torch.Generator().manual_seed(seed))


def by_whom(got: Tensor, wanted: Tensor) -> str:
    """`program` or `pytorch`; anything else is a wrong clip."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    for name, value in (("program", NOTED), ("pytorch", 0.0)):
        if torch.allclose(got, wanted + value, atol=1e-5):
            return name
    raise AssertionError(f"off by {(got - wanted).abs().max():.3g}")


def plain(module: Theirs, z: Tensor) -> Tensor:
    return Theirs.decode_video(module, z)


@torch.no_grad()
def test_our_own_decoder() -> None:
    decoder = TAEHVDecoder(TAEHVConfig(model_id="taehv", latent_channels=4)).eval()
    programs = Programs(noted)
    fast: Any = owl_wms.accelerate(decoder, toolchain=programs)
    assert isinstance(fast, AcceleratedStream)
    assert owl_wms.accelerate(fast) is fast
    assert list(fast.state_dict()) == list(decoder.state_dict())
    assert fast[22] is decoder[22]
    assert len(list(fast)) == len(fast) == len(decoder)
    for n, b in ((3, 1), (1, 1), (2, 2), (3, 1)):
        assert by_whom(fast(clip(n, b)), decoder(clip(n, b))) == "program"
    assert (fast.stats().calls, fast.stats().program_calls, fast.stats().pytorch) == (4, 4, {})
    assert fast.stats().programs[0].builds == len(programs.obtained) == 2
    assert by_whom(fast(latents=clip()), decoder(latents=clip())) == "program"
    with pytest.raises(TypeError, match="missing 1 required"):
        fast()
    frames, _ = fast.step(clip()[:, 0])
    assert torch.equal(frames, decoder.step(clip()[:, 0])[0])
    twin = pickle.loads(pickle.dumps(owl_wms.accelerate(copy.deepcopy(fast.original))))
    assert torch.equal(twin(clip()), decoder(clip()))
    fast.train()
    assert by_whom(fast(clip()), decoder(clip())) == "pytorch"


@pytest.mark.parametrize("form", ["normal", "super"])
@torch.no_grad()
def test_the_authors_module_and_what_holds_it(form: str, caplog: pytest.LogCaptureFixture) -> None:
    for hold in (lambda m: m, Wrapper, lambda m: SimpleNamespace(vae=Wrapper(m)), lambda m: _Pipe(Wrapper(m))):
        module = Theirs(form=form, patch_size=2).eval()
        keys = list(module.state_dict())
        held: Any = hold(module)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="owl_wms.runtime"):
            assert owl_wms.accelerate(held, toolchain=Programs(noted)) is held
            assert owl_wms.accelerate(held) is held
        assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
        assert "decode_video" in caplog.text
        assert list(module.state_dict()) == keys
        for n, b in ((3, 1), (1, 2)):
            z = clip(n, b)
            assert by_whom(module.decode_video(x=z, show_progress_bar=False), plain(module, z)) == "program"
        wrapper = held if isinstance(held, Wrapper) else getattr(held, "vae", None)
        if wrapper is not None:
            wanted = (plain(module, clip()) + NOTED).transpose(1, 2) * 2 - 1
            for _ in range(2):  # what the wrapper changes in place is a clip of its own
                assert torch.allclose(wrapper.decode(clip().transpose(1, 2))[0], wanted, atol=1e-5)
        del module.decode_video
        assert torch.equal(module.decode_video(clip()), plain(module, clip()))


class _Pipe:
    """A pipeline as diffusers has them: its parts are in `components`."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae

    @property
    def components(self) -> dict[str, Any]:
        return {"vae": self.vae, "scheduler": object(), "nothing": None}


@pytest.mark.parametrize(
    "options",
    [{"clamped": False}, {"whole": True}],
    ids=["frames that leave the range", "clips of even length whole"],
)
def test_what_only_looks_like_it_is_left_alone(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    module = Theirs(**options)
    assert decoder_within(module) is not None
    assert not gives_same_frames(module)
    assert owl_wms.accelerate(module) is module
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Theirs is left as it is" in record.getMessage()
    assert "decode_video" not in vars(module)


def test_a_method_that_somebody_replaced_stays(caplog: pytest.LogCaptureFixture) -> None:
    module: Any = Theirs().eval()
    module.decode_video = own = lambda z: plain(module, z) / 2
    assert owl_wms.accelerate(module) is module
    assert module.decode_video is own
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    "changes",
    [{"space_upscale": (False, True, False)}, {"time_upscale": (True, True, True), "patch_size": 4}],
    ids=["fewer enlargements", "eight frames"],
)
@torch.no_grad()
def test_switched_off_enlargements_are_seen(changes: dict[str, Any]) -> None:
    for form in ("normal", "super"):
        module = owl_wms.accelerate(Theirs(form=form, **changes).eval(), toolchain=Programs(noted))
        assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"


@torch.no_grad()
def test_reasons_for_which_the_callers_code_decodes() -> None:
    module: Any = owl_wms.accelerate(Theirs().eval().requires_grad_(False), toolchain=Programs(noted))

    def reason(run: Any) -> str:
        before = module.decode_video.stats().pytorch
        run()
        (name,) = (k for k, v in module.decode_video.stats().pytorch.items() if v > before.get(k, 0))
        return str(name)

    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"
    with torch.enable_grad():
        z = clip().requires_grad_()
        assert "gradients" in reason(lambda: module.decode_video(z).sum().backward())
        assert z.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert reason(lambda: module.decode_video(clip())) == "autocast"
    handle = module.decoder[3].register_forward_hook(lambda m, a, out: out + 1)
    assert reason(lambda: module.decode_video(clip())) == "hooks"
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "pytorch"
    handle.remove()
    with pytest.raises(RuntimeError):
        module.decode_video(clip().double())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        module.decode_video()
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"


@torch.no_grad()
def test_weights_and_layers_that_change_under_it() -> None:
    programs = Programs(noted)
    module: Any = owl_wms.accelerate(Theirs().eval(), toolchain=programs)
    module.decode_video(clip())
    module.decoder[1].weight.mul_(1.5)
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"
    module._apply(lambda t: t * 1.1)  # as a move does: every weight is another tensor
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"
    module.bfloat16()
    assert module.decode_video(clip().bfloat16()).dtype == torch.bfloat16
    module.float()
    module.decoder[1] = nn.Conv2d(4, 16, 3, padding=1)
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"
    module.decoder[0] = nn.Tanh()
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "pytorch"
    module.decoder[0] = Clamp()
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "program"
    module.frames_to_trim = 2
    assert by_whom(module.decode_video(clip()), plain(module, clip())) == "pytorch"


@torch.no_grad()
def test_copies_have_programs_of_their_own() -> None:
    module: Any = owl_wms.accelerate(Theirs().eval())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin.decode_video, AcceleratedVideo)
        assert twin.decode_video.module is twin
        twin.decoder[22].bias.fill_(0.9)
        assert torch.equal(twin.decode_video(clip()), plain(twin, clip()))
        assert not torch.equal(twin.decode_video(clip()), module.decode_video(clip()))


@torch.no_grad()
def test_what_fails_is_answered_or_raised() -> None:
    def lost(call: int, answered: tuple[Tensor, ...]) -> Any:
        if call > 2:
            raise RuntimeError("device lost")
        return answered

    module: Any = owl_wms.accelerate(Theirs().eval(), toolchain=Programs(lost))
    assert by_whom(module.decode_video(clip(6)), plain(module, clip(6))) == "pytorch", "in the middle of a clip"
    strict: Any = owl_wms.accelerate(Theirs().eval(), toolchain=Programs(lost), strict=True)
    with pytest.raises(FastPathError, match="device lost"):
        strict.decode_video(clip(6))
    for sizes, who in (((2,), "pytorch"), ((1, 2), "program")):
        chosen: Any = owl_wms.accelerate(Theirs().eval(), batch_sizes=sizes, toolchain=Programs(noted))
        assert by_whom(chosen.decode_video(clip()), plain(chosen, clip())) == who
