"""Writing the program that won, and proving that what was written computes the same.

Usage:
    report |= save(candidate, Path("out"), request, journal, device)       # out/program.pt2
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt.build import attempts
from owl_wms.trt.build.candidate import Candidate
from owl_wms.trt.build.journal import BuildJournal
from owl_wms.trt.check import output
from owl_wms.trt.check.parity import example
from owl_wms.trt.library import compiler, jit_kernels
from owl_wms.trt.run import calls, kernels
from owl_wms.trt.run.load import load_calls, load_exported
from owl_wms.trt.spec import dtype_of

PROGRAM_NAME = "program.pt2"


def save(
    best: Candidate, out_dir: Path, request: Request, journal: BuildJournal, device: torch.device
) -> dict[str, Any]:
    """Write, reload from bytes and compare; the numbers for the report. `best.program` is gone afterwards.

    Raises:
        FastPathError: stage "save", "load" or "parity".
    """
    z, *state = example(request.input_shape, request.state, dtype_of(best.precision), device, request.seed)
    with kernels.collected(z) as files, jit_kernels.collected(best.program, files):
        wanted = attempts.run(best.program, z, *state)
    found = output.RecordedOutput.of(wanted, best.parity, seed=request.seed)
    files[output.FILE] = found.pack()
    path = out_dir / PROGRAM_NAME
    journal.stage("save", plan=best.plan)
    begin = time.monotonic()
    try:
        if best.exported is None:
            compiler.save_program(best.program, path, z, files, state)
        else:
            torch.export.save(best.exported, path, extra_files=files)
    except Exception as error:
        remedy = "report this with the decoder's configuration"
        raise FastPathError("save", attempts.reason_of(error), remedy) from error
    save_seconds = time.monotonic() - begin
    library = best.exported is None
    best.program = best.exported = None
    attempts.release()
    journal.stage("reload", plan=best.plan)
    begin = time.monotonic()
    data = path.read_bytes()
    loaded, exported = load_exported(data, device, library=library)
    load_seconds = time.monotonic() - begin
    wanted = output.joined(wanted)
    if not torch.equal(output.joined(attempts.run(loaded, z, *state)), wanted):
        reason = "the saved program gives other frames than the program it was saved from"
        raise FastPathError("parity", reason, "report this with the decoder's configuration")
    del loaded
    journal.stage("call list", plan=best.plan)
    key = best.key("calls")
    no_calls = journal.attempt(key) or ""
    if not no_calls:
        try:
            path.write_bytes(_with_calls(data, exported, (z, *state), wanted))
        except Exception as error:  # a program without a call list is as right, and slower to load
            no_calls = attempts.reason_of(error)
            path.write_bytes(data)
            attempts.check_context(device)
        journal.outcome(key, no_calls)
    return {
        "save_seconds": round(save_seconds, 3),
        "load_seconds": round(load_seconds, 3),
        "kernel_bytes": len(files.get(kernels.FILE, "")) + len(files.get(jit_kernels.FILE, "")),
        "program_bytes": path.stat().st_size,
        "reload_bit_equal": True,
        "no_call_list": no_calls,
        "output_sha256": found.sha256,
        "output_shape": list(wanted.shape),
        "output_dtype": str(wanted.dtype).removeprefix("torch."),
    }


def _with_calls(data: bytes, exported: ExportedProgram, inputs: tuple[Tensor, ...], wanted: Tensor) -> bytes:
    """Returns the file with its call list. Raises ValueError, or whatever reading it raises, if that is not right."""
    device = inputs[0].device
    listed = calls.with_calls(data, exported, device)
    program = load_calls(listed, device)
    if program is None or not torch.equal(output.joined(attempts.run(program, *inputs)), wanted):
        raise ValueError("its call list gives other frames")
    return listed
