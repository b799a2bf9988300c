"""Decoder to compiled program: import, fold, rewrite, plan, export, compile, isolate, check, save and load.

Why one folder: nothing outside of it knows TensorRT, and it knows nothing of cache files or callers. Importing this
package touches neither CUDA nor TensorRT.

Usage:
    from owl_wms import trt

    if trt.status().available:                                      # to run cached programs, run_status() suffices
        request = Request(input_shape=(8, 128, 8, 8))               # owl_wms.request
        report = trt.build_program(decoder, request, out_dir)       # in a build process; writes out_dir/program.pt2
        program = trt.load_program((out_dir / "program.pt2").read_bytes(), "cuda")
"""

from __future__ import annotations

from owl_wms.trt.build.parent import build_program
from owl_wms.trt.jit import compile_for_training
from owl_wms.trt.key import key_material
from owl_wms.trt.library.engines import status as run_status
from owl_wms.trt.library.importer import TensorRTStatus, status
from owl_wms.trt.plans import without_library
from owl_wms.trt.run.cuda_graph import GraphedProgram
from owl_wms.trt.run.load import LoadedProgram, load_program
from owl_wms.trt.run.load import prepare as prepare_to_load
from owl_wms.trt.run.step_graph import GraphedStep

__all__ = [
    "GraphedProgram",
    "GraphedStep",
    "LoadedProgram",
    "TensorRTStatus",
    "build_program",
    "compile_for_training",
    "key_material",
    "load_program",
    "prepare_to_load",
    "run_status",
    "status",
    "without_library",
]
