"""Our kernels' machine code in the life of a program: stored inside the program's file.

Why it exists: see `owl_wms.ops.common.machine_code`. The file's bytes are hashed by the cache and reloaded bit-equal
before they count, so the code in them needs no trust of its own. Code of other sources or of another GPU has another
name and is never asked for.

Usage:
    with collected(z) as files:                  # for torch.export.save
        program(z)
    adopt(files)                                 # after torch.export.load
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from owl_wms.interrupts import raise_interrupt

FILE = "owl_wms_kernels.json"
NAMESPACE = "owl_wms"
_LOG = logging.getLogger(__name__)


def calls_ours(exported: ExportedProgram) -> bool:
    """Returns whether an operator of `owl_wms.ops` is in the graph."""
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    return any(getattr(target, "namespace", "") == NAMESPACE for target in targets)


@contextlib.contextmanager
def collected(z: Tensor) -> Iterator[dict[str, str]]:
    """Files for `torch.export.save`: after the block, the machine code of the kernels that were launched in it for `z`;
    empty when there were none.
    """
    files: dict[str, str] = {}
    machine_code = _imported("machine_code")
    if machine_code is None:
        yield files
        return
    with machine_code.watched() as used:
        yield files
    if used:
        architecture = importlib.import_module("owl_wms.ops.common.nvrtc").architecture_of
        names = {kernel: architecture(kernel, _index(z)) for kernel in used}
        files[FILE] = machine_code.pack(used, names.__getitem__)


def adopt(files: dict[str, str]) -> int:
    """Take over machine code that came with a verified program; returns how many kernels that was."""
    machine_code = _imported("machine_code")
    return 0 if machine_code is None else int(machine_code.adopt(files.get(FILE, "")))


def refused() -> dict[str, str]:
    """Operator -> why this process computes it without one of its kernels."""
    register = _imported("register")
    return {} if register is None else dict(register.refused())


def _imported(name: str) -> Any:
    """Imports `owl_wms.ops.common.<name>`; None where our operators cannot be imported."""
    try:
        return importlib.import_module(f"owl_wms.ops.common.{name}")
    except Exception as error:
        raise_interrupt(error)
        _LOG.debug("our operators cannot be imported: %s", error)
        return None


def _index(z: Tensor) -> int:
    return torch.cuda.current_device() if z.device.index is None else z.device.index
