"""Decodes or encodes a whole dataset, on one process, on launcher ranks or on Ray, exactly once in effect.

`clips` computes. `items` lists inputs and cuts them into blocks. `ledger` records what is finished. `worker` processes
a block; it is the same under every engine. `local`, `ranks` and `on_ray` only hand out blocks.

Usage:
    decode = DecodeClips("dec.yml", "dec.pt")
    frames = decode({"latents": latents})["frames"]      # [k, n, c, h, w] -> uint8 [k, n, H, W, C]
"""

from owl_wms.batch.clips import DecodeClips, EncodeClips
from owl_wms.batch.job import Job, prepare
from owl_wms.batch.worker import BlockWorker, Outcome

__all__ = ["BlockWorker", "DecodeClips", "EncodeClips", "Job", "Outcome", "prepare"]
