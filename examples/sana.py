"""Accelerates the decoder of a diffusers pipeline with one line, and compares its picture with the plain pipeline's.

It needs `pip install diffusers transformers`, and no GPU. MODEL is a folder or a hub id of a Sana pipeline, such as
Efficient-Large-Model/Sana_1600M_1024px_diffusers (10 GB); without it a tiny one with random weights draws noise.

Run: python examples/sana.py [OUT.png [MODEL]]
"""

import sys

import torch

import owl_wms

try:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(sys.argv) > 2:
        pipe = SanaPipeline.from_pretrained(sys.argv[2], torch_dtype=torch.bfloat16)
        request = {"prompt": "an owl in the snow"}
    else:
        layers = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (128, 128)}
        layers |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
        both = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in layers.items()}
        vae = AutoencoderDC(latent_channels=4, decoder_act_fns="silu", **both).eval()
        core = SanaTransformer2DModel(4, 4, 1, 8, num_layers=1, cross_attention_dim=8, caption_channels=8)
        pipe = SanaPipeline(None, None, vae, core, FlowMatchEulerDiscreteScheduler())
        words = torch.randn(1, 4, 8, device=device)
        request = {"prompt_embeds": words, "prompt_attention_mask": torch.ones_like(words[..., 0]), "guidance_scale": 1}
        request |= {"height": 64, "width": 64, "num_inference_steps": 2, "use_resolution_binning": False}
except (ImportError, OSError, ValueError) as error:
    sys.exit(f"error: {error} (needed: diffusers, transformers, and MODEL as a folder or hub id)")

pipe.to(device)
plain = pipe(**request, generator=torch.Generator().manual_seed(0), output_type="np").images
owl_wms.accelerate(pipe)  # in place; the first picture of a size builds a program, or finds it in the cache
fast = pipe(**request, generator=torch.Generator().manual_seed(0), output_type="np").images
pipe.numpy_to_pil(fast)[0].save(sys.argv[1] if len(sys.argv) > 1 else "owl.png")
print(f"largest difference of a pixel: {abs(fast - plain).max() * 255:.2f} of 255\n{pipe.vae.decoder.stats()}")
