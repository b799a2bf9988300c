"""A decoder laid out for a CPU gives the frames of the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from owl_wms.vae import build_decoder
from owl_wms.vae.landscape import SquareToLandscape
from owl_wms.vae.on_cpu import ConvolvedUpsample, FormatKeepingShortcut, PlanarLandscape, enlarged, quick_on_cpu
from owl_wms.vae.shortcuts import ChannelToSpace
from tests.process_state import STATES, set_in_process
from tests.vae.helpers import relative_error, small_dcae


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 16, 5, 9), (1, 8, 2, 1), (1, 4, 32, 16)])
def test_the_enlargement_is_bicubic(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(x, scale_factor=2, mode="bicubic")
    for laid_out in (x, x.to(memory_format=torch.channels_last)):
        assert (enlarged(laid_out) - wanted).abs().max() < 1e-5
    rounded = F.interpolate(x.bfloat16(), scale_factor=2, mode="bicubic").float()
    assert relative_error(enlarged(x.bfloat16()).float(), wanted) <= 2 * relative_error(rounded, wanted) + 1e-3


@pytest.mark.parametrize("state", STATES)
def test_nothing_set_for_all_of_torch_reaches_it(state: str) -> None:
    x = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted = enlarged(x)
    with set_in_process(state):
        assert torch.equal(enlarged(x), wanted)


@torch.no_grad()
def test_frames_and_weights_are_the_decoders() -> None:
    torch.manual_seed(0)
    decoder = build_decoder(small_dcae(sample_size=[36, 64])).eval()
    quick = quick_on_cpu(copy.deepcopy(decoder))
    found = {type(module) for module in quick.modules()}
    assert found >= {ConvolvedUpsample, FormatKeepingShortcut, PlanarLandscape}
    assert list(quick.state_dict()) == list(decoder.state_dict())
    z = torch.randn(2, decoder.config.latent_channels, 2, 2)  # type: ignore[union-attr,arg-type]
    assert relative_error(quick(z), decoder(z)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 16), (32, 16)])
def test_a_shortcut_keeps_its_values_and_channels_last(c_in: int, c_out: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, c_in, 3, 5).to(dtype, memory_format=torch.channels_last)
    original = ChannelToSpace(c_in, c_out)
    got = FormatKeepingShortcut(original)(x)
    assert torch.equal(got, original(x))
    assert got.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("size", [(9, 16), None])
def test_the_last_resize_keeps_its_values(size: tuple[int, int] | None) -> None:
    original = SquareToLandscape(4, 4, size=size).eval()
    x = torch.randn(1, 4, 16, 16)
    got = PlanarLandscape(original)(x.to(memory_format=torch.channels_last))
    assert relative_error(got, original(x)) < 1e-5
    half = PlanarLandscape(copy.deepcopy(original).bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), original(x)) < 2e-2


def test_a_subclass_is_left_as_it_is() -> None:
    class Other(ChannelToSpace):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    holder = torch.nn.Sequential(Other(16, 16))
    assert type(quick_on_cpu(holder)[0]) is Other  # type: ignore[index]


def test_no_part_of_an_eval_decoder_is_in_train_mode() -> None:
    assert not any(part.training for part in quick_on_cpu(build_decoder(small_dcae()).eval()).modules())
