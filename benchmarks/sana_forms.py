"""Makes what the benchmarks of AutoencoderDC decode with: random weights, latents, the fp32 decoder's frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import SANA_DECODER
from owl_wms.trt.check.parity import reference_arithmetic

# dc-ae-f32c32-sana-1.0, decoder side: 8.4 TFLOP for 1024x1024 pixels.
F32C32: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "block_type": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "layers_per_block": (3,) * 6,
    "qkv_multiscales": ((),) * 3 + ((5,),) * 3,
    "norm_type": "rms_norm",
    "act_fn": "silu",
    "upsample_block_type": "interpolate",
}
FORMS: dict[str, dict[str, Any]] = {"f32c32": F32C32, "f64c128": SANA_DECODER}
PIXELS = {"f32c32": 32, "f64c128": 64}  # of a latent's side


def make(form: str) -> nn.Module:
    """Returns the decoder in fp32 on the GPU, in eval mode, with seeded random weights."""
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    torch.manual_seed(0)
    with torch.device("cuda"):
        decoder: nn.Module = Decoder(**FORMS[form]).eval().requires_grad_(False)
    return decoder


def latents(form: str, batch: int, side: int) -> Tensor:
    """Seeded normal latents in bf16."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (batch, FORMS[form]["latent_channels"], side, side)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


def reference(decoder: nn.Module, z: Tensor) -> Tensor:
    """Returns the fp32 decoder's frames, one image at a time."""
    with torch.no_grad(), reference_arithmetic():
        return torch.cat([decoder(one.float()) for one in z.split(1)])
