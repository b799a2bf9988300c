"""Measures what a decode pays for asking whether the decoder has changed: microseconds of processor time per call.

Run: python benchmarks/stamp.py      # exits 1 if an unchanged decoder is taken for a changed one
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from owl_wms.configs import load_vae_model
from owl_wms.runtime.stamp import WeightsStamp
from owl_wms.vae import build_decoder, fold_weight_norm

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vae" / "base.yml"


def microseconds(call: Callable[[], object], number: int = 100, repeats: int = 30) -> float:
    """Least processor time per call over `repeats` series of `number` calls."""
    best = float("inf")
    for _ in range(repeats):
        begun = time.process_time()
        for _ in range(number):
            call()
        best = min(best, (time.process_time() - begun) / number)
    return best * 1e6


def main() -> None:
    narrow = load_vae_model(CONFIG).model_copy(update={"ch_0": 16, "ch_max": 128, "latent_channels": 16})
    live = build_decoder(narrow).eval()
    forms: dict[str, nn.Module] = {"weight norm live": live, "weight norm folded": fold_weight_norm(live)}
    unchanged = True
    for name, decoder in forms.items():
        stamp = WeightsStamp(decoder)
        tensors = len(list(decoder.parameters())) + len(list(decoder.buffers()))
        cost = microseconds(lambda stamp=stamp, decoder=decoder: stamp.matches(decoder))
        print(f"{name:20} {len(list(decoder.modules())):4} modules {tensors:4} tensors {cost:6.1f} us per call")
        unchanged &= stamp.matches(decoder)
    raise SystemExit(0 if unchanged else 1)


if __name__ == "__main__":
    main()
