"""Prepares a decoder at start-up, before the first request, and reads from `stats` what decodes and why.

It needs the demo's weights from this checkout, and no GPU. On a GPU the first start builds a program, which takes
seconds to two minutes; later starts load it from the cache.

Run: python examples/prepare.py
"""

import logging
from pathlib import Path

import torch

from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn

FILES = [Path(__file__).parent / "demo" / name for name in ("demo_vae.yml", "demo_vae.safetensors")]
SHAPE = (128, 8, 8)  # channels, height and width of one latent

logging.basicConfig()  # a build or a run that fails is one warning, with its reason and a remedy
decoder = get_decoder_only(None, *FILES)
decode = make_batched_decode_fn(decoder, batch_size=2, timing=True)

stats = decode.prepare(SHAPE)  # with strict=True above, it raises instead of leaving the work to PyTorch
print(f"ready: {stats.backend}, {stats.reason}")
print(f"programs: {stats.hits} found, {stats.builds} built in {stats.build_seconds:.1f} s, failures {stats.failures}")

frames = decode(torch.randn(1, 3, *SHAPE))  # the first request: a batch of two frames, and one of one
stats = decode.stats()
print(f"{stats.frames} frames: {stats.chunks_program} batches by a program, {stats.chunks_pytorch} by PyTorch")
print(f"milliseconds per batch: {stats.latency_ms}")
