"""`import owl_wms` costs nothing: no CUDA context, no TensorRT, no diffusers, no second after torch.

Run: python -m pytest tests/test_lean_import.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, time
import torch
began = time.process_time()  # other programs on the machine do not count
import {module}
seconds = time.process_time() - began
heavy = [name for name in ("torch_tensorrt", "tensorrt", "tensorrt_rtx", "diffusers", "transformers", "av", "aiohttp",
                           "boto3", "wandb") if name in sys.modules]
print(json.dumps({{"seconds": seconds, "heavy": heavy, "cuda": torch.cuda.is_initialized()}}))
"""


@pytest.mark.parametrize("module", ["owl_wms", "owl_wms.utils.owl_vae_bridge", "owl_wms.vae", "owl_wms.models"])
def test_import_is_lean(module: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True, check=True
    )
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["heavy"] == []
    assert seen["cuda"] is False
    assert ran.stderr == "", "importing says nothing"
    if module == "owl_wms":
        assert seen["seconds"] < 1.0
