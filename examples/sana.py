"""Generates a picture with diffusers' Sana, its decoder accelerated; downloads the model at the first run (some 10 GB).

pip install diffusers transformers accelerate
python examples/sana.py "an owl in the snow" owl.png
"""

import logging
import sys

import torch
from diffusers import SanaPipeline

import owl_wms

MODEL = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"

logging.basicConfig(level="INFO")  # says what was replaced, and which program decodes
prompt, path = sys.argv[1:3] if len(sys.argv) > 2 else ("an owl in the snow", "owl.png")
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = SanaPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16).to(device)
pipe = owl_wms.accelerate(pipe)  # the first picture of a size builds a program; later runs find it in the cache
pipe(prompt=prompt, height=1024, width=1024).images[0].save(path)
print(pipe.vae.decoder.stats())
