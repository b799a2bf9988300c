"""Builds a decoder's programs into a folder that many machines share, so that all others only load them.

It needs an NVIDIA GPU, and ends with a line that says so without one. Run it on one machine of each GPU model, where it
builds, and then on the others, where it finds. TENSORRT_CACHE_KEY signs programs, for readers of another account.

Run: python examples/cluster_cache.py FOLDER [CONFIG CHECKPOINT]
"""

import sys
from pathlib import Path

from owl_wms.configs import load_vae_model
from owl_wms.errors import OwlError
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn

DEMO = [Path(__file__).parent / "demo" / name for name in ("demo_vae.yml", "demo_vae.safetensors")]
BATCH_SIZES = (1, 8)  # of a player, who waits for each frame, and of an evaluation

if len(sys.argv) not in (2, 4):
    sys.exit(__doc__.splitlines()[-1])
config, checkpoint = sys.argv[2:] or DEMO
try:
    model = load_vae_model(config)
    size = getattr(model, "latent_size", None) or sys.exit(f"error: {config} has no latent_size")
    decoder = get_decoder_only(None, config, checkpoint)
    for batch_size in BATCH_SIZES:
        decode = make_batched_decode_fn(decoder, batch_size, config={"cache_dir": sys.argv[1]}, strict=True)
        stats = decode.prepare((model.latent_channels, size, size))
        (program,) = stats.programs
        if program["not_kept"] or not stats.hits + stats.builds:
            sys.exit(f"error: batch {batch_size} is not in the folder: {program['not_kept'] or stats.reason}")
        how = f"built in {stats.build_seconds:.1f} s" if stats.builds else "found"
        print(f"batch {batch_size}: {how}: {decode.settings.cache_directory() / program['entry']}")
except OwlError as error:
    sys.exit(f"error: {error}")
