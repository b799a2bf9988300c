"""Every decoder family at small width, with seeded random weights, for the tests of owl_wms.trt.

Usage:
    decoder, latent_shape = make("tiled")
"""

from __future__ import annotations

import torch
from torch import nn

from owl_wms.configs.vae import DCAEConfig, DistillVAEConfig, TAEHVConfig
from owl_wms.request import Request
from owl_wms.trt import plans
from owl_wms.trt.graph.recording import Recording
from owl_wms.vae import build_decoder
from owl_wms.vae.stepping import Stepping

FAMILIES = ("tiled", "learned", "square", "distill", "sana")


def dcae_config(**changes: object) -> DCAEConfig:
    """A DCAE of three stages, 32 to 128 channels, 8 latent channels."""
    values: dict[str, object] = {
        "model_id": "dcae",
        "sample_size": (45, 80),
        "channels": 3,
        "latent_channels": 8,
        "ch_0": 16,
        "ch_max": 64,
        "encoder_blocks_per_stage": (1, 1),
        "decoder_blocks_per_stage": (1, 1),
        "use_middle_block": True,
        "skip_logvar": True,
    }
    return DCAEConfig(**{**values, **changes})


def make(name: str) -> tuple[nn.Module, tuple[int, int, int, int]]:
    """`(decoder in eval mode, float32, weight norm live; latent shape)`. Raises KeyError for an unknown family."""
    torch.manual_seed(7)
    if name == "sana":
        from diffusers.models.autoencoders.autoencoder_dc import Decoder

        decoder = Decoder(
            in_channels=3,
            latent_channels=8,
            attention_head_dim=8,
            block_type=["ResBlock", "EfficientViTBlock"],
            block_out_channels=[16, 32],
            layers_per_block=[1, 1],
            qkv_multiscales=[[], [5]],
            norm_type=["batch_norm", "rms_norm"],
            act_fn=["relu", "silu"],
        )
        return decoder.eval(), (2, 8, 4, 4)
    if name == "distill":
        config = DistillVAEConfig(
            model_id="distill_vae",
            sample_size=(45, 80),
            channels=3,
            latent_channels=8,
            ch_0=8,
            ch_max=128,
            encoder_blocks_per_stage=(1,) * 5,
            decoder_blocks_per_stage=(1,) * 5,
        )
        return build_decoder(config).eval(), (1, 8, 1, 1)
    configs = {
        "tiled": (dcae_config(), "tiled"),
        "learned": (dcae_config(), "learned"),
        "square": (dcae_config(sample_size=16, use_middle_block=False), "tiled"),
    }
    config, variant = configs[name]
    return build_decoder(config, variant=variant).eval(), (2, 8, 4, 4)


def selected(decoder: nn.Module, request: Request) -> plans.Selection:
    """The plans that the build process would choose for this decoder."""
    return plans.select(decoder, request, Recording.of(decoder, request.input_shape))


def plan_names(decoder: nn.Module, request: Request, precision: str) -> list[str]:
    """Their names at one precision."""
    return [plan.name for plan in selected(decoder, request).plans[precision]]


def make_step() -> tuple[Stepping, Request]:
    """The step of a TAEHV decoder in eval mode, float32, at the smallest latents, and a request for it on the CPU."""
    torch.manual_seed(7)
    decoder = build_decoder(TAEHVConfig(model_id="taehv", latent_channels=4, patch_size=2)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.1 if parameter.dim() == 1 else (2 / parameter[0].numel()) ** 0.5)
        last = decoder.get_submodule("22")
        last.weight.mul_(0.01)  # type: ignore[operator, union-attr]
        last.bias.fill_(0.5)  # type: ignore[operator, union-attr]
    step = Stepping(decoder)
    shape = (1, 4, 2, 1)
    state = tuple(spec.shape for spec in step.state_specs(shape))
    return step, Request(input_shape=shape, device="cpu", precision="bf16", state=state)
