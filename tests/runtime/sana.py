"""Tiny AutoencoderDC and Sana pipelines of diffusers with random weights: real classes, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LATENTS = 4


def autoencoder(**changes: Any) -> Any:
    """diffusers' AutoencoderDC in the form of the Sana pipelines, four latent channels, 2 pixels per latent, in eval
    mode, every norm away from its neutral values.
    """
    from diffusers import AutoencoderDC

    torch.manual_seed(1)
    values: dict[str, Any] = {
        "latent_channels": LATENTS,
        "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    }
    model = AutoencoderDC(**{**values, **changes}).eval()
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "RMSNorm" and isinstance(module.weight, nn.Parameter):
                module.weight.normal_(1, 0.3)
    return model


class Tokenizer:
    """As much of a tokenizer as the pipeline asks for, so that no vocabulary is needed."""

    padding_side = "right"
    model_max_length = 16

    def __call__(self, text: Any, max_length: int = 16, **_: Any) -> Any:
        from transformers import BatchEncoding

        rows = [
            [len(word) % 8 for word in one.split()][:max_length] for one in ([text] if isinstance(text, str) else text)
        ]
        padded = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return BatchEncoding({"input_ids": padded, "attention_mask": (padded > 0).long()})

    def encode(self, text: str) -> list[int]:
        return [len(word) % 8 for word in text.split()]


def pipeline() -> Any:
    """diffusers' SanaPipeline with a tiny Gemma 2 and a tiny transformer; 64-pixel images."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=LATENTS,
        out_channels=LATENTS,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    ).eval()
    text_encoder = Gemma2Model(
        Gemma2Config(
            head_dim=16,
            hidden_size=8,
            intermediate_size=8,
            max_position_embeddings=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=8,
        )
    ).eval()
    pipe = SanaPipeline(
        tokenizer=Tokenizer(),
        text_encoder=text_encoder,
        vae=autoencoder(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    pipe.set_progress_bar_config(disable=None)
    return pipe


def picture(pipe: Any, batch: int = 1, **arguments: Any) -> torch.Tensor:
    """The images of a fixed prompt and seed, `[batch, 3, 64, 64]`."""
    result = pipe(
        prompt="an owl in the snow",
        num_images_per_prompt=batch,
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=1,
        guidance_scale=1.0,
        height=64,
        width=64,
        max_sequence_length=16,
        complex_human_instruction=None,
        use_resolution_binning=False,
        output_type="pt",
        **arguments,
    )
    images: torch.Tensor = result.images
    return images
