"""Decodes a folder of latents on a Ray cluster, in the way of Ray Data; `owl-wms decode-dataset` adds resuming to it.

Run: python examples/decode_dataset.py LATENTS/ FRAMES/ dec.yml dec.pt
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray

from owl_wms.batch import DecodeClips
from owl_wms.media.arrays import load_latents


def read(row: dict[str, Any]) -> dict[str, Any]:
    """Path -> name and latents [n, c, h, w]."""
    return {"name": Path(row["item"]).stem, "latents": load_latents(row["item"])[0].float().numpy()}


def main(source: str, out: str, config: str, checkpoint: str) -> None:
    """Decodes each file of `source` to a `.npy` in `out`; one actor per GPU, or two on CPUs."""
    ray.init(ignore_reinit_error=True)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    paths = sorted(str(path.resolve()) for path in Path(source).glob("*.pt"))
    frames = (
        ray.data.from_items(paths)
        .map(read)
        .map_batches(DecodeClips, fn_constructor_kwargs={"vae_config": config, "checkpoint": checkpoint}, batch_size=1,
                     num_gpus=1 if gpus else None, compute=ray.data.ActorPoolStrategy(size=gpus or 1))
    )  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    for row in frames.iter_rows():
        np.save(Path(out) / f"{row['name']}.npy", row["frames"])


if __name__ == "__main__":
    main(*sys.argv[1:])
