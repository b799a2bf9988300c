"""The fused TAEHV is the decoder, step by step, and the two exchange their states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from owl_wms.configs import TAEHVConfig
from owl_wms.fused.taehv import fuse, supports
from owl_wms.vae import build_decoder
from owl_wms.vae.taehv import TAEHVDecoder

FORMS: dict[str, dict[str, Any]] = {
    "wan": {"latent_channels": 16},
    "hunyuan": {"latent_channels": 32, "patch_size": 2},
    "ltx": {"latent_channels": 128, "patch_size": 4, "time_upscale": (True, True, True)},
    "preview": {"latent_channels": 16, "time_upscale": (False, False, True), "space_upscale": (True, False, False)},
    "still": {"latent_channels": 16, "time_upscale": (False, False, False), "space_upscale": (False, True, True)},
    "super": {"latent_channels": 32, "patch_size": 2, "form": "super"},
    "super ltx": {"latent_channels": 128, "patch_size": 4, "form": "super", "time_upscale": (True, True, True)},
}


def make(form: str) -> TAEHVDecoder:
    torch.manual_seed(3)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", **FORMS[form])).eval().requires_grad_(False)
    assert isinstance(decoder, TAEHVDecoder)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            # As large as keeps signals alive through forty layers: no term may be too small to be missed.
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
        decoder[22].weight.mul_(1e-4)
        decoder[22].bias.fill_(0.5)
        # Now that nothing is clamped: frames that vary by 0.15, whatever the depth of the network made of them.
        spread = decoder(torch.randn(1, 2, decoder.latent_channels, 3, 5)).std()
        decoder[22].weight.mul_(0.15 / spread)
    return decoder


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_steps_are_the_decoders(form: str) -> None:
    decoder = make(form)
    fused = fuse(decoder, torch.float32)
    state, own = (), ()
    for i in range(3):
        latent = torch.randn(2, decoder.latent_channels, 3, 5)
        wanted, state = decoder.step(latent, state)
        got, own = fused.step(latent, own)
        assert got.shape == wanted.shape
        assert float(wanted.std()) > 0.02, "frames that are all alike compare nothing"
        assert float((got - wanted).abs().max()) < 2e-5
        for a, b, spec in zip(own, state, fused.state_specs((2, decoder.latent_channels, 3, 5)), strict=True):
            assert a.shape == b.shape == spec.shape
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
        if i == 1:  # a program fails here, PyTorch goes on, and back
            state, own = own, state
    pictures, _ = fused.step_bytes(latent, own)
    frames, _ = fused.step(latent, own)
    assert pictures.dtype == torch.uint8
    assert float((pictures.permute(0, 1, 4, 2, 3) - frames * 255).abs().max()) <= 0.501


@torch.no_grad()
def test_it_exports_as_a_step() -> None:
    fused = fuse(make("hunyuan"), torch.float32)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused = fused

        def forward(self, latent: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            frames, following = self.fused.step(latent, state)
            return frames, *following

    latent = torch.randn(1, 32, 3, 5)
    _, state = fused.step(latent)
    exported = torch.export.export(Step(), (latent, *state))
    got, wanted = exported.module()(latent, *state), Step()(latent, *state)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    names = {str(node.target) for node in exported.graph.nodes}
    assert {"owl_wms.frame_conv.default", "owl_wms.enlarge_conv.default", "owl_wms.picture_conv.default"} <= names


def test_what_has_no_fused_form_is_said() -> None:
    assert supports(torch.nn.Linear(1, 1)) == (False, "no fused form of Linear; only TAEHVDecoder has one")
    with torch.device("meta"):
        wide = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=16, patch_size=8))
        flat = build_decoder(
            TAEHVConfig(model_id="taehv", latent_channels=16, form="super", space_upscale=(True, True, False))
        )
    assert "192 channels" in supports(wide)[1]
    assert "doubles height" in supports(flat)[1]
    with pytest.raises(ValueError, match="192 channels"):
        fuse(wide, torch.float16)
