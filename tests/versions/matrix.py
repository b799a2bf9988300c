"""Builds every decoder family with the installed versions, without a GPU, and prints one JSON object.

Converters, partitioner, saving and loading are real. PyTorch runs the engines of the plan `tensorrt`, and the reference
implementations run for our operators, so the frames say nothing about a GPU. Without Torch-TensorRT only the plan `ops`
is built.

Run: python -m tests.versions.matrix
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from owl_wms import env
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt.build.child import DECODER_NAME
from owl_wms.trt.build.parent import BOOTSTRAP, Build, write_decoder
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.library import versions
from tests.trt import decoders

STAND_IN = BOOTSTRAP.replace("owl_wms.trt.build.child", "tests.trt.build_child")
SECONDS = 300.0


def built(family: str, plan: str, precision: str, out: Path) -> dict[str, Any]:
    """One row: the operators that a build of `family` by `plan` left in PyTorch, and whether the saved program repeats
    what the built one computes.
    """
    decoder, shape = decoders.make(family)
    row: dict[str, Any] = {"family": family, "plan": plan, "precision": precision}
    with tempfile.TemporaryDirectory(prefix="owl_versions_") as name:
        directory = Path(name)
        write_decoder(decoder, directory / DECODER_NAME)
        build = Build(
            directory=directory,
            request=Request(input_shape=shape, device="cpu", precision=precision, plans=(plan,)),
            graph=Recording.of(decoder, shape).digest(),
            out_dir=out,
            deadline=time.monotonic() + SECONDS,
            bootstrap=STAND_IN if plan == "tensorrt" else BOOTSTRAP,
        )
        try:
            report = build.run()
        except FastPathError as error:
            return {**row, "failed": str(error)}
    return {
        **row,
        "engines": report["engines"],
        "left": sorted(operator for operator, _ in report["pytorch_operators"]) if plan == "tensorrt" else None,
        "parity": report["parity"]["passed"],
        "reload_bit_equal": report["reload_bit_equal"],
    }


def main() -> None:
    """Print the rows; the exit status is 1 if one of them is not sound."""
    engines = [("tensorrt", "fp16"), ("tensorrt", "bf16")] if versions.installed() else []
    plans = [*engines, ("ops", "bf16")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="owl_versions_") as out:
        for family in decoders.FAMILIES:
            rows += [built(family, plan, precision, Path(out)) for plan, precision in plans]
    machine = env.describe_machine()
    names = ("python", "torch", "triton", "torch_tensorrt", "tensorrt", "nvrtc")
    print(json.dumps({"versions": {name: machine[name] for name in names}, "rows": rows}))
    sound = all(row.get("parity") and row.get("reload_bit_equal") for row in rows)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
