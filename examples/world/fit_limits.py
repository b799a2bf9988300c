"""Gives trained weights limits of frames (`owl_wms/nn/limits.py`), fitted to new episodes of the game.

`by_clock.py` fits them while it trains; this is for weights that were trained before there were limits, as it left
them. All that was in the file stays as it is.

Usage:
    python examples/world/fit_limits.py --weights world.safetensors --config world.yml --out build/limited

Writes to --out: world.safetensors, for a configuration with `frame_limits: true`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from episodes import record
from safetensors.torch import load_file, save_file
from train import FIRST_SEED, make_codec, say

from owl_wms.configs.world import load_world_config, with_files_found
from owl_wms.models.latents import LatentSpace
from owl_wms.nn.limits import FrameLimits
from owl_wms.nn.setting import latent_grid
from owl_wms.vae.eight_bits import packed
from owl_wms.whole import written_whole

FIRST_WORLD = FIRST_SEED + 900_000_000  # far from the worlds of any run
PLAYERS, FRAMES = 64, 8  # worlds of a round, and frames in each: many worlds, as neighbouring frames are alike


@torch.no_grad()
def main() -> None:
    """Parse arguments, play, fit, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True, help="that of the weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=16, help=f"of {PLAYERS} worlds each")
    args = parser.parse_args()
    if not args.weights.is_file():
        parser.error(f"--weights {args.weights}: no such file")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = with_files_found(load_world_config(args.config), args.config)
    encode, _ = make_codec(cfg, device)
    space, parts = LatentSpace.of(cfg.train).to(device), []
    for k in range(args.rounds):
        seed = FIRST_WORLD + k * PLAYERS
        data = record(players=PLAYERS, frames=FRAMES, first_seed=seed, encode=encode, device=device)
        parts.append(space.to_model(data.latents.flatten(0, 1).float()))
        say(f"round {k + 1} of {args.rounds}")
    frames = torch.cat(parts)
    limits = FrameLimits(cfg.model.channels, *latent_grid(cfg.model)).to(device)
    limits.fit(frames)
    found = packed({f"core.limits.{name}": value for name, value in limits.state_dict().items()})
    with written_whole(args.out / "world.safetensors") as draft:  # which may be the weights themselves
        save_file(load_file(args.weights) | found, draft)
    say(f"limits of {len(frames)} frames of {args.rounds * PLAYERS} worlds: {args.out / 'world.safetensors'}")


if __name__ == "__main__":
    main()
