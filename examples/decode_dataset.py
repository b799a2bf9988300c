"""Decodes a folder of latents with Ray Data, on one worker per GPU of the cluster, or on one CPU.

It needs Ray, folders that every node reaches, and an autoencoder, such as the one in demo/.
Run: pip install 'ray[data]'; python examples/decode_dataset.py LATENTS/ FRAMES/ CONFIG CHECKPOINT
"""

import sys
from pathlib import Path

import torch

from owl_wms.batch import DecodeClips
from owl_wms.media.arrays import load_latents, save_array


def read(row: dict) -> dict:
    return {"path": row["item"], "latents": load_latents(row["item"]).flatten(0, 1).float().numpy()}


def write(row: dict, out: str) -> dict:
    save_array(Path(out, Path(row["path"]).stem + ".npy"), torch.tensor(row["frames"]))
    return {"path": row["path"]}  # without the frames, which would travel to this process


try:
    import ray

    source, out, *files = sys.argv[1:]
    DecodeClips(*files, device="cpu")  # ends here if the files are wrong, and not in every worker
except (ImportError, ValueError) as error:
    sys.exit(f"error: {error} ({__doc__.splitlines()[-1]})")
ray.init(ignore_reinit_error=True)
ray.data.DataContext.get_current().max_errored_blocks = -1  # a bad file does not end the run
paths = sorted(str(path.resolve()) for path in Path(source).glob("*.pt"))
gpus = int(ray.cluster_resources().get("GPU", 0))
workers = {"compute": ray.data.ActorPoolStrategy(size=gpus or 1), "num_gpus": 1 if gpus else None}
clips = ray.data.from_items(paths, override_num_blocks=len(paths) or 1).map(read)
frames = clips.map_batches(DecodeClips, fn_constructor_args=files, batch_size=1, **workers)
done = frames.map(write, fn_kwargs={"out": str(Path(out).resolve())}).count()
sys.exit(0 if done == len(paths) > 0 else f"error: decoded {done} of the {len(paths)} .pt files in {source}")
