"""The soak: many decodes over many shapes on a GPU, with builds and evictions between; memory flat, no wrong frame.

Usage:
    pytest tests/faults/test_gpu.py -m gpu --full-counts -s     # 100,000 decodes; 2,000 without; -s shows how far it is
"""

from __future__ import annotations

import datetime
import random
import time
from pathlib import Path

import psutil
import pytest
import torch

from owl_wms.cache import CacheStore
from owl_wms.runtime import VideoDecode
from owl_wms.settings import TensorRTConfig
from tests.faults.conftest import Fault, SmallDecoder
from tests.faults.ledger import write_row

SHAPES = [(4, height, width) for height in (2, 3, 4, 6, 8) for width in (2, 5)]
FRAMES = 4


@pytest.mark.gpu
@pytest.mark.timeout(3600)
def test_soak(fault: Fault, tmp_path: Path) -> None:
    decodes, chance = 100_000 if fault.full else 2_000, random.Random(1)
    torch.manual_seed(0)
    decoder = SmallDecoder().eval().cuda().half()
    decoder.latent_channels = 4
    # One plan: what is under load here is the runtime, not the choice.
    settings = TensorRTConfig(cache_dir=tmp_path / "cache", precision="fp16", plans=("tensorrt",))
    decode = VideoDecode(decoder, batch_size=FRAMES, settings=settings)
    latents = {shape: torch.randn(1, FRAMES, *shape, device="cuda", dtype=torch.float16) for shape in SHAPES}
    with torch.no_grad():
        references = {shape: decoder(z[0])[None].float() for shape, z in latents.items()}
    began = time.monotonic()
    for shape in SHAPES:
        decode.prepare(shape)
    assert decode.stats().backend != "pytorch", decode.stats().reason
    print(f"{len(SHAPES)} shapes built in {time.monotonic() - began:.0f} s", flush=True)

    def state() -> tuple[int, int, int]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return psutil.Process().memory_info().rss, total - free, psutil.Process().num_fds()

    settle, wrong, sampled, evicted, rebuilt = decodes // 10, 0, 0, 0, 0
    first = None
    for turn in range(decodes):
        if turn == settle:
            first = state()
        if turn % max(1, decodes // 20) == 0:
            print(f"{turn} decodes, {time.monotonic() - began:.0f} s, {wrong} wrong, {state()}", flush=True)
        shape = SHAPES[chance.randrange(len(SHAPES))]
        frames = decode(latents[shape])
        if turn % 97 == 0:
            sampled += 1
            wrong += not torch.allclose(frames.float(), references[shape], atol=2e-2, rtol=2e-2)
        if turn in (decodes // 4, decodes // 2, 3 * decodes // 4):
            # Everything goes, then a new decode function has to build one shape again while the old one keeps decoding.
            evicted += len(CacheStore(tmp_path / "cache").prune(0).removed)
            again = VideoDecode(decoder, batch_size=FRAMES, settings=settings)
            wrong += not torch.allclose(again(latents[shape]).float(), references[shape], atol=2e-2, rtol=2e-2)
            rebuilt += again.stats().builds
            del again
    assert first is not None
    last = state()
    host, device, files = ((b - a) for a, b in zip(first, last, strict=True))
    assert wrong == 0
    assert evicted > 0
    assert rebuilt > 0
    assert decode.stats().fallbacks == 0
    assert host < 512 * 2**20
    assert device < 256 * 2**20
    assert files <= 2
    seconds = time.monotonic() - began
    told = (
        f"{decodes} decodes over {len(SHAPES)} shapes in {seconds:.0f} s, {evicted} evictions, {rebuilt} rebuilds: "
        f"host {host / 2**20:+.1f} MiB, device {device / 2**20:+.1f} MiB, {files:+d} descriptors, "
        f"0 of {sampled} samples wrong ({torch.cuda.get_device_name()}, {datetime.date.today().isoformat()})"
    )
    fault.record("soak", told)
    if fault.full:
        # This run has a GPU and usually not the rest of the suite: this row says for itself when and where it was made.
        write_row("soak", told)
