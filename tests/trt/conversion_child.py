"""Child process of test_conversion.py: prints one JSON line per question about real conversion without a GPU.

Usage: python -m tests.trt.conversion_child
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

from tests.trt import cuda_stand_in

cuda_stand_in.install()

import torch  # noqa: E402

from owl_wms.request import Request  # noqa: E402
from owl_wms.trt import plans  # noqa: E402
from owl_wms.trt.graph.export import export_decoder  # noqa: E402
from owl_wms.trt.graph.recording import Recording  # noqa: E402
from owl_wms.trt.graph.shapes import fp32_copy  # noqa: E402
from owl_wms.trt.library import compiler, importer, versions  # noqa: E402
from owl_wms.trt.spec import compile_settings, dtype_of  # noqa: E402
from tests.trt import decoders  # noqa: E402


def say(**answer: object) -> None:
    sys.__stdout__.write(json.dumps(answer) + "\n")
    sys.__stdout__.flush()


def partition(name: str, plan_name: str, precision: str, kept: tuple[str, ...] = (), min_block: int = 5) -> None:
    decoder, shape = decoders.make(name)
    spec = Request(input_shape=shape, precision=precision, min_block_size=min_block)
    plan = plans.PLANS[plan_name]
    module, rewrites = plan.lower(fp32_copy(decoder, "cpu"), spec, precision, Recording.of(decoder, shape))
    z = torch.randn(shape, dtype=dtype_of(precision))
    settings = {**compile_settings(spec, precision), **plan.settings, "dryrun": True}
    _, found = compiler.compile_exported(export_decoder(module, z), z, settings, kept=kept)
    say(
        name=name,
        plan=plan_name,
        precision=precision,
        kept=list(kept),
        engines=found.engines,
        engine_operators=found.engine_operators,
        left=[list(pair) for pair in found.pytorch_operators],
        rewrites=rewrites,
    )


def partition_of_a_step() -> None:
    step, wanted = decoders.make_step()
    spec = dataclasses.replace(wanted, precision="fp16")
    recording = Recording.of(step, spec.input_shape, spec.state)
    module, _ = plans.PLANS["tensorrt"].lower(fp32_copy(step, "cpu"), spec, "fp16", recording)
    z, *state = (torch.randn(shape, dtype=torch.float16) for shape in (spec.input_shape, *spec.state))
    settings = {**compile_settings(spec, "fp16"), "dryrun": True}
    _, found = compiler.compile_exported(export_decoder(module, z, *state), z, settings, state=state)
    left = [list(pair) for pair in found.pytorch_operators]
    say(name="step", engines=found.engines, engine_operators=found.engine_operators, left=left)


def serialized() -> None:
    decoder, shape = decoders.make("tiled")
    spec = Request(input_shape=shape, precision="fp16")
    module, _ = plans.PLANS["tensorrt"].lower(fp32_copy(decoder, "cpu"), spec, "fp16", Recording.of(decoder, shape))
    z = torch.randn(shape, dtype=torch.float16)
    phases: list[str] = []
    begin = time.monotonic()
    with cuda_stand_in.engines_as_bytes(), compiler._builder_progress(lambda phase, step, steps: phases.append(phase)):
        engine = importer.submodule("dynamo").convert_exported_program_to_serialized_trt_engine(
            export_decoder(module, z),
            arg_inputs=[z],
            **versions.accepted({"use_explicit_typing": True, "immutable_weights": True}),
        )
    say(
        name="serialized", engine_bytes=len(bytes(engine)), seconds=time.monotonic() - begin, phases=sorted(set(phases))
    )


def runtime_cache() -> None:
    """Where an engine made inside and outside a compilation would look for kernels, if this release does that."""
    release = versions.of_torch()
    if release is None or not release.runtime_cache:
        return
    settings = importer.submodule("runtime._runtime_config").RuntimeSettings
    with compiler.without_shared_kernels():
        inside = settings().runtime_cache
    say(name="runtime_cache", inside=inside, outside=settings().runtime_cache)


if __name__ == "__main__":
    say(name="status", **{f: getattr(importer.status(), f) for f in ("available", "flavour", "version", "reason")})
    for family in decoders.FAMILIES:
        partition(family, "tensorrt", "fp16")
    partition("sana", "tensorrt-plain", "bf16")
    partition("sana", "tensorrt", "bf16", kept=("up_blocks.1.0.conv_out.conv_depth",), min_block=1)
    partition_of_a_step()
    serialized()
    runtime_cache()
