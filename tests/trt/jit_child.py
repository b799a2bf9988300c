"""Child process of test_jit.py: torch.compile(backend="tensorrt") over our fused form, engines executed by PyTorch.

Usage: python -m tests.trt.jit_child
"""

from __future__ import annotations

import json
import sys

from tests.trt import cuda_stand_in

cuda_stand_in.install()
cuda_stand_in.run_engines_in_pytorch(lambda _subgraph: "")

import torch  # noqa: E402

from owl_wms.trt import jit  # noqa: E402
from tests.ops.decoders import dcae  # noqa: E402


def main() -> None:
    """Prints what became of a decoder that compiles, and of one whose fused form is wrong."""
    jit.TrainingDecoder._require = staticmethod(lambda z: None)  # type: ignore[method-assign]
    decoder, z = dcae(), torch.randn(2, 16, 4, 4)
    wrapped = jit.compile_for_training(decoder)
    frames, want = wrapped(z), decoder(z)
    answer = {
        "plan": wrapped.plan,
        "reason": wrapped.reason,
        "dtype": str(frames.dtype),
        "error": float((frames - want).norm() / want.norm()),
        "relative_error": wrapped.relative_error,
        "timed": sorted(wrapped.latency_ms),
    }
    resize = jit.plans.PLANS["tensorrt+ops"].lower

    def wrong(*arguments: object) -> object:
        module, rewrites = resize(*arguments)  # type: ignore[arg-type]
        module.out_bias += 0.05
        return module, rewrites

    object.__setattr__(jit.plans.PLANS["tensorrt+ops"], "lower", wrong)
    torch._dynamo.reset()
    wrapped = jit.compile_for_training(decoder)
    with torch.no_grad():
        answer["fallback"] = bool(torch.equal(wrapped(z), decoder(z)))
    answer["wrong"] = wrapped.reason
    sys.__stdout__.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
