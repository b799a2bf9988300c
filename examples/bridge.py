"""Decodes latents to frames through the bridge and compares the frames with the original ones.

It needs the demo's weights from this checkout, and no GPU. FOLDER gets `frames.png` (two frames of the game above their
decoded form) and `latents.pt`, which `decode_dataset.py` can decode.

Run: python examples/bridge.py [FOLDER]
"""

import sys
from pathlib import Path

import torch

from owl_wms.errors import OwlError
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld
from owl_wms.media.arrays import save_array
from owl_wms.media.metrics import psnr
from owl_wms.media.pictures import contact_sheet, save_picture, to_bytes
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from owl_wms.vae import load_encoder

FILES = [Path(__file__).parent / "demo" / name for name in ("demo_vae.yml", "demo_vae.safetensors")]

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/bridge")
source = render(GameWorld(seed=18, batch=2))  # float [2, 4, 360, 640] in [-1, 1]: red, green, blue, depth
with torch.inference_mode():
    latents = load_encoder(None, *FILES)(source)  # [2, 128, 8, 8]
decode = make_batched_decode_fn(get_decoder_only(None, *FILES), batch_size=2)
frames = decode(latents[None])[0]  # one clip of two frames: bf16 [2, 4, 360, 640], where the latents are
print(f"{psnr(frames[:, :3], source[:, :3]).mean():.1f} dB")
print(f"decoded by {decode.stats().backend}: {decode.stats().reason}")
try:
    save_array(folder / "latents.pt", latents)
    rows = {"source": to_bytes(source[:, :3]), "decoded": to_bytes(frames[:, :3])}
    save_picture(folder / "frames.png", contact_sheet(rows))
except OwlError as error:
    sys.exit(f"error: {error}")
