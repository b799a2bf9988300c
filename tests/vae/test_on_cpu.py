"""A decoder laid out for a CPU gives the frames of the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from owl_wms.vae import build_decoder
from owl_wms.vae.on_cpu import ConvolvedUpsample, enlarged, quick_on_cpu
from tests.vae.helpers import relative_error, small_dcae


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 16, 5, 9), (1, 8, 2, 1), (1, 4, 32, 16)])
def test_the_enlargement_is_bicubic(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(x, scale_factor=2, mode="bicubic")
    for laid_out in (x, x.to(memory_format=torch.channels_last)):
        assert (enlarged(laid_out) - wanted).abs().max() < 1e-5
    rounded = F.interpolate(x.bfloat16(), scale_factor=2, mode="bicubic").float()
    assert relative_error(enlarged(x.bfloat16()).float(), wanted) <= 2 * relative_error(rounded, wanted) + 1e-3


@torch.no_grad()
def test_frames_and_weights_are_the_decoders() -> None:
    torch.manual_seed(0)
    decoder = build_decoder(small_dcae()).eval()
    quick = quick_on_cpu(copy.deepcopy(decoder))
    assert any(isinstance(module, ConvolvedUpsample) for module in quick.modules())
    assert list(quick.state_dict()) == list(decoder.state_dict())
    z = torch.randn(2, decoder.config.latent_channels, 2, 2)  # type: ignore[union-attr,arg-type]
    assert relative_error(quick(z), decoder(z)) < 1e-5


def test_no_part_of_an_eval_decoder_is_in_train_mode() -> None:
    assert not any(part.training for part in quick_on_cpu(build_decoder(small_dcae()).eval()).modules())
