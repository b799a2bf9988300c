"""Two ranks on two GPUs: each decodes on its own, one builds, the other waits and loads, both give the same frames."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
rank = int(os.environ["LOCAL_RANK"])
decoder = get_decoder_only(None, "examples/demo/demo_vae.yml", "examples/demo/demo_vae.safetensors")
# Upstream sets the device after loading: the decoder must be on its own GPU all the same.
assert next(decoder.parameters()).device == torch.device("cuda", rank)
torch.cuda.set_device(rank)
dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
decode = make_batched_decode_fn(decoder, 4, strict=True)
latents = torch.randn(1, 6, 128, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
frames = decode(latents)
assert frames.device == torch.device("cuda", rank)
both = [torch.empty_like(frames) for _ in range(2)]
dist.all_gather(both, frames)
stats = decode.stats()
answer = {"rank": rank, "builds": stats.builds, "hits": stats.hits, "backend": stats.backend,
          "equal": torch.equal(*both), "elsewhere": torch.cuda.memory_allocated(1 - rank)}
with open(os.path.join(sys.argv[1], f"rank{rank}.json"), "w") as file:
    json.dump(answer, file)
dist.destroy_process_group()
"""


@pytest.mark.gpu
@pytest.mark.timeout(280)
def test_one_rank_builds_and_both_decode_on_their_own_gpu(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TENSORRT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert sorted((answer["builds"], answer["hits"]) for answer in answers) == [(0, 1), (1, 0)]
    for answer in answers:
        assert answer["backend"] == "tensorrt"
        assert answer["equal"]
        assert answer["elsewhere"] == 0, "memory on the other rank's GPU"
