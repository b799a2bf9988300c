"""Folding: the same numbers, no parametrizations, the original untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from owl_wms.configs import load_vae_config
from owl_wms.vae import build_decoder, fold_weight_norm
from tests.vae.helpers import VAE_CONFIGS, effective, randomize, relative_error, small_dcae


@pytest.mark.parametrize("variant", ["tiled", "learned"])
@torch.no_grad()
def test_fold_is_exact_in_fp32_and_leaves_the_original_alone(variant: str) -> None:
    decoder = randomize(build_decoder(small_dcae(sample_size=[36, 64]), variant))
    z = torch.randn(2, 8, 4, 4)
    live, before = decoder(z), list(decoder.state_dict())
    folded = fold_weight_norm(decoder)
    assert relative_error(folded(z), live) < 1e-6
    assert list(decoder.state_dict()) == before
    assert torch.equal(decoder(z), live)
    assert not any(parametrize.is_parametrized(m) for m in folded.modules())
    for name, weight in effective(decoder).items():
        assert relative_error(folded.state_dict()[name], weight) < 1e-6
    with torch.no_grad():
        folded.conv_out.proj.weight.zero_()
    assert torch.equal(decoder(z), live)


@torch.no_grad()
def test_fold_twice_and_config_survive() -> None:
    decoder = randomize(build_decoder(small_dcae()))
    once = fold_weight_norm(decoder)
    twice = fold_weight_norm(once)
    assert twice is not once
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))
    assert once.config == decoder.config
    assert (once.latent_channels, once.out_channels, once.training) == (8, 3, False)


@torch.no_grad()
def test_bf16_weights_are_folded_in_fp32() -> None:
    decoder = randomize(build_decoder(small_dcae())).bfloat16()
    folded = fold_weight_norm(decoder)
    want = effective(decoder.float())
    assert folded.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(folded.blocks[0].blocks[0].conv2.weight, want["blocks.0.blocks.0.conv2.weight"].bfloat16())


def test_counts_of_folded_decoders_and_conv1d() -> None:
    for name, parameters, convs in (("base", 235_641_856, 77), ("dec_dist", 25_092_768, 24)):
        with torch.device("meta"):
            decoder = build_decoder(load_vae_config(VAE_CONFIGS / f"{name}.yml").model)
        assert sum(parametrize.is_parametrized(m) for m in decoder.modules()) == convs
        assert sum(p.numel() for p in fold_weight_norm(decoder).parameters()) == parameters
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1, groups=2))
    x = torch.randn(1, 4, 20)
    folded = fold_weight_norm(conv)
    assert type(folded) is nn.Conv1d
    assert torch.equal(folded(x), conv(x))


class Doubling(nn.Conv2d):
    """Does more with its weight than a convolution does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "conv",
    [
        weight_norm(Doubling(3, 4, 3)),
        weight_norm(nn.Conv2d(3, 4, 3), dim=1),
        weight_norm(nn.Conv2d(3, 4, 3), dim=None),
        spectral_norm(weight_norm(nn.Conv2d(3, 4, 3))),
        spectral_norm(nn.Conv2d(3, 4, 3)),
        weight_norm(nn.Linear(6, 4)),
    ],
    ids=["subclass", "another dimension", "no dimension", "two", "another norm", "linear"],
)
def test_what_is_not_an_ordinary_weight_norm_is_left_as_it_is(conv: nn.Module) -> None:
    module = nn.Sequential(conv).eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    folded = fold_weight_norm(module)
    assert torch.equal(folded(x), module(x))
    assert parametrize.is_parametrized(folded[0])


def test_hooks_of_a_folded_convolution_stay() -> None:
    conv = weight_norm(nn.Conv2d(3, 4, 3)).requires_grad_(False)
    module = nn.Sequential(conv).eval()
    conv.register_forward_hook(lambda module, inputs, output: output + 1)
    conv.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    x = torch.randn(2, 3, 6, 6)
    folded = fold_weight_norm(module)
    assert torch.equal(folded(x), module(x))
    assert not parametrize.is_parametrized(folded[0])
    folded[0]._forward_hooks.clear()
    assert len(conv._forward_hooks) == 1, "the copy's list of hooks is its own"
