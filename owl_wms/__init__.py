"""Fast, verified VAE decoding for real-time world models, and the world model that uses it.

Importing this package touches neither CUDA, TensorRT nor diffusers.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    # Reaching a model needs torch and the bridge; `owl-wms --help` and configuration readers need neither.
    if name == "accelerate":
        from owl_wms.runtime.accelerate import accelerate

        return accelerate
    if name == "from_pretrained":
        from owl_wms.inference.pretrained import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
