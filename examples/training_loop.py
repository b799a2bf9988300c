"""Decodes evaluation pictures inside a training loop, while a small model learns to take noise out of latents.

It needs the demo's weights from this checkout, and no GPU. FOLDER gets a picture every 20 steps.

Run: python examples/training_loop.py [FOLDER]
"""

import sys
from pathlib import Path

import torch

from owl_wms.errors import OwlError
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld
from owl_wms.media.pictures import contact_sheet, save_picture
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from owl_wms.vae import load_encoder

FILES = [Path(__file__).parent / "demo" / name for name in ("demo_vae.yml", "demo_vae.safetensors")]

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/training_loop")
clean = load_encoder(None, *FILES)(render(GameWorld(seed=28))).detach()  # [1, 128, 8, 8]
# jit compiles in this process and stores nothing; uint8 gives [b, n, H, W, C], as loggers and video writers take it.
decode = make_batched_decode_fn(get_decoder_only(None, *FILES), batch_size=1, jit=True, output="uint8")
model = torch.nn.Conv2d(128, 128, 3, padding=1)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(1, 41):
    found = model(clean + 0.5 * torch.randn_like(clean))
    loss = (found - clean).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:  # if compiling or running fails, PyTorch decodes after one warning, and the run goes on
        frames = decode(found[None])[0].cpu()
        print(f"step {step}: loss {loss.item():.3f}, decoded by {decode.stats().backend}: {decode.stats().reason}")
        try:
            save_picture(folder / f"step_{step}.png", contact_sheet({f"step {step}": frames[..., :3]}))
        except OwlError as error:
            sys.exit(f"error: {error}")
