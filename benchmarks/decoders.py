"""Makes the decoders that are measured: name -> module with seeded random weights, and its floating-point work.

Random weights are what can be shared: upstream's checkpoints are not public. Speed does not depend on them; error does
a little, which is why the demo decoder, trained, stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from owl_wms.configs import load_vae_config
from owl_wms.fused.dcae8 import LEAST_CHANNELS
from owl_wms.vae import build_decoder, load_decoder
from owl_wms.vae.dcae import DCAEDecoder
from owl_wms.vae.distill import DistillDecoder

ROOT = Path(__file__).resolve().parents[1]
VAE_CONFIGS = ROOT / "configs" / "vae"
SMALL = ROOT / "benchmarks" / "small.yml"
DEMO = ROOT / "examples" / "demo"

# AutoencoderDC f64c128 (mit-han-lab/dc-ae-f64c128-mix-1.0), decoder side: 412.3 M parameters, 22.4 TFLOP a batch of 8.
SANA_DECODER = {
    "in_channels": 3,
    "latent_channels": 128,
    "attention_head_dim": 32,
    "block_type": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 4,
    "block_out_channels": (128, 256, 512, 512, 1024, 1024, 2048),
    "layers_per_block": (0, 5, 10, 2, 2, 2, 2),
    "qkv_multiscales": ((),) * 7,
    "norm_type": ("batch_norm",) * 3 + ("rms_norm",) * 4,
    "act_fn": ("relu",) * 3 + ("silu",) * 4,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One decoder: how to make it (fp32, CPU, weight norm live where it has any) and its latent shape [c, h, w]."""

    name: str
    make: Callable[[], nn.Module]
    latent_shape: tuple[int, int, int] = (128, 8, 8)


def _random(config: str, variant: str | None) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build_decoder(load_vae_config(VAE_CONFIGS / config).model, variant=variant).eval()

    return make


def _sana() -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_dc import Decoder

    torch.manual_seed(0)
    return Decoder(**SANA_DECODER).eval()


def _demo() -> nn.Module:
    return load_decoder(None, DEMO / "demo_vae.yml", DEMO / "demo_vae.safetensors").eval()


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(name="dist", make=_random("dec_dist.yml", "tiled")),
        Subject(name="base", make=_random("base.yml", "tiled")),
        Subject(name="dist_learned", make=_random("dec_dist.yml", "learned")),
        Subject(name="base_learned", make=_random("base.yml", "learned")),
        Subject(name="distill_vae", make=_random("cod_64x_c64_depth_distill_dec.yml", None), latent_shape=(64, 8, 8)),
        Subject(name="sana", make=_sana),
        Subject(name="demo", make=_demo),
        Subject(name="small", make=_random(str(SMALL), "tiled"), latent_shape=(16, 8, 8)),
    )
}


def subject(name: str) -> Subject:
    """Returns the subject called `name`. Raises KeyError listing the known names."""
    if name not in SUBJECTS:
        raise KeyError(f"no decoder is called {name!r}; known: {', '.join(SUBJECTS)}")
    return SUBJECTS[name]


def gigaflop(decoder: nn.Module, z_BCHW: Tensor) -> float:
    """Multiply-adds times two of one call of `decoder`, counted by torch's own counter, in 1e9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(z_BCHW)
    return counter.get_total_flops() / 1e9


def saved_gigaflop(decoder: nn.Module, batch: int, size: int) -> float:
    """What our fused forms leave out of `gigaflop`, in 1e9: the first product of a stage runs before the enlargement.

    Args:
        decoder: any of the subjects, on any device; only those of upstream's kinds save something.
        batch: of the latents.
        size: their height and width.
    """
    saved = 0.0
    for scale, blocks in _stages(decoder):
        size *= scale
        saved += _gigaflop(blocks[0].conv1, batch * size**2) * (1 - scale**-2)
    return saved


def eight_bit_gigaflop(decoder: nn.Module, batch: int, size: int) -> float:
    """How much of `gigaflop` our 8-bit forms compute on codes, at twice the rate of 16 bits, in 1e9: the 1x1
    convolutions of wide stages, without the first one of each. Arguments as in `saved_gigaflop`.
    """
    found = 0.0
    for scale, blocks in _stages(decoder):
        size *= scale
        if blocks[0].conv3.out_channels >= LEAST_CHANNELS:
            products = [conv for block in blocks for conv in (block.conv1, block.conv3)][1:]
            found += sum(_gigaflop(conv, batch * size**2) for conv in products)
    return found


def _stages(decoder: nn.Module) -> list[tuple[int, list[Any]]]:
    """Factor of enlargement and residual blocks of each stage; none where the decoder is not of upstream's kinds."""
    if isinstance(decoder, DCAEDecoder):
        return [(2, list(block.blocks)) for block in decoder.blocks]  # type: ignore[union-attr, misc, arg-type]
    if isinstance(decoder, DistillDecoder):
        pairs: list[Any] = list(zip(decoder.blocks[::2], decoder.blocks[1::2], strict=True))
        return [(up.stride, [block]) for up, block in pairs]
    return []


def _gigaflop(conv: Any, pixels: int) -> float:
    """Multiply-adds times two of a 1x1 convolution, in 1e9."""
    products: int = pixels * conv.in_channels * conv.out_channels
    return 2 * products / 1e9
