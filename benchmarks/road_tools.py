"""Gives the parts of `benchmarks.road` what they share: the decoder, its shapes, the cache's entries, memory.

Imports stand in the functions: a part that times a start must not find modules that it did not ask for.

Usage:
    decoder = decoder_of(settings)
    wait(settings)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def decoder_of(s: dict[str, Any]) -> Any:
    """Returns the decoder as the command line makes it."""
    import torch

    from owl_wms.utils.owl_vae_bridge import get_decoder_only
    from owl_wms.vae.on_cpu import channels_last_on_cpu

    decoder = get_decoder_only(None, s["config"], s["checkpoint"], device=s["device"], dtype=dtype_of(s))
    return channels_last_on_cpu(decoder, torch.device(s["device"]))


def entries() -> list[Any]:
    """Returns the entries of the cache."""
    from owl_wms import env
    from owl_wms.runtime.programs import store_of
    from owl_wms.settings import TensorRTConfig

    return list(store_of(TensorRTConfig.resolve()).entries(env.describe_machine()))


def dtype_of(s: dict[str, Any]) -> Any:
    """Returns bf16 on a GPU, fp32 on a CPU."""
    import torch

    return torch.bfloat16 if s["device"] == "cuda" else torch.float32


def latent_shape(s: dict[str, Any]) -> tuple[int, int, int]:
    """Returns [c, h, w] of the decoder."""
    from benchmarks.decoders import subject

    return subject(s["decoder"]).latent_shape


def wait(s: dict[str, Any]) -> None:
    """Waits for the GPU."""
    import torch

    if s["device"] == "cuda":
        torch.cuda.synchronize()


def resident_mib() -> float:
    """Returns the memory of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024
