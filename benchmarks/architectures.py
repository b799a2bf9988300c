"""Compiles every kernel for every GPU family that it is meant for, and lists registers, shared memory and spills.

Needs no GPU: NVRTC compiles, and cuobjdump (it comes with Triton) reads what the machine code asks for.

Run: python -m benchmarks.architectures          # writes docs/gpus.md
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from owl_wms.ops.common.gpu import SHARED_LIMITS
from owl_wms.ops.common.nvrtc import Kernel, KernelError, compile_kernel
from tests.ops.common.test_nvrtc import FAMILIES, variants

OUT = Path(__file__).parents[1] / "docs" / "gpus.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def usage(image: bytes) -> str:
    """Registers of a thread, and bytes that spill into local memory where any do."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = USAGE.search(text.stdout)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text.stdout[:200]!r}")
    registers, stack, _, local = map(int, found.groups())
    return f"{registers}" + (f", {stack + local} B stack" if stack + local else "")


def cell(kernel: Kernel, architecture: str, limit: int) -> str:
    """Returns a table's cell for one kernel on one architecture."""
    if kernel.suffix and architecture != "sm_90":
        return "-"
    if kernel.shared_bytes > limit:
        return "too much shared memory"
    try:
        return usage(compile_kernel(kernel, architecture + kernel.suffix))
    except KernelError:
        return "does not compile"


def main() -> None:
    """Write the table."""
    names = {
        f"sm_{major}{minor}": limit for (major, minor), limit in SHARED_LIMITS.items() if (major, minor) in FAMILIES
    }
    lines = [
        "# Kernels and GPU families",
        "",
        "Registers per thread of each kernel variant as NVRTC compiles it (`python -m benchmarks.architectures`; no",
        "GPU is needed). A dash: the kernel uses Hopper's own instructions, and another takes its place elsewhere.",
        "Executed: sm_90, and the sm_80 and sm_89 code on an H200, translated by its driver (`make test-gpu`). The",
        "others only compile here.",
        "",
        f"| kernel | shared memory, bytes | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for kernel in variants():
        cells = (cell(kernel, name, limit) for name, limit in names.items())
        lines.append(f"| {kernel.op} {' '.join(kernel.defines)} | {kernel.shared_bytes} | {' | '.join(cells)} |")
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
