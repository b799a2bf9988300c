"""Compiles every kernel for every GPU family that it is meant for, and lists registers, shared memory and spills.

Needs no GPU: NVRTC compiles, and cuobjdump (it comes with Triton) reads what the machine code asks for.

Run: python -m benchmarks.architectures          # writes docs/gpus.md
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton

from owl_wms.cli._support import support
from owl_wms.ops import frame_depthwise, grouped_conv8, linear8
from owl_wms.ops.common.gpu import HOPPER, OLDEST, SHARED_LIMITS, Capability
from owl_wms.ops.common.nvrtc import Kernel, KernelError, compile_kernel
from owl_wms.ops.frame_conv import kernel as frame_conv
from owl_wms.trt.plans import EIGHT_BIT_CAPABILITY
from tests.ops.common.test_nvrtc import FAMILIES, variants

GPUS: dict[Capability, str] = {
    (9, 0): "H100, H200, GH200",
    (8, 0): "A100, A30",
    (8, 6): "RTX 30 series, A10, A40, A6000",
    (8, 9): "RTX 40 series, L4, L40S",
    (10, 0): "B200, GB200",
    (12, 0): "RTX 50 series, RTX PRO Blackwell",
}
"""Names by compute capability (https://developer.nvidia.com/cuda-gpus)."""
OUT = Path(__file__).parents[1] / "docs" / "gpus.md"
TIMED = Path(__file__).parent / "results" / "older_h200_202611.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def others() -> list[Kernel]:
    """Returns a variant or two of each kernel that has a compile test of its own, in bf16."""
    found = [frame_depthwise.kernel_of(torch.bfloat16)]
    found += [grouped_conv8.kernel_of(codes) for codes in (torch.int8, torch.float8_e4m3fn)]
    for shape in ((512, 1024, False, True, 0), (1024, 512, True, True, 0), (1024, 512, True, False, 1024)):
        plan = linear8.plan_of(*shape)
        found += [] if plan is None else [plan.kernel(torch.int8, torch.bfloat16)]
    for variant in (
        {"columns": 128, "bias": True, "relu": 1, "past": True},
        {"columns": 64, "taps": 4, "relu": 1},
        {"columns": 64, "bias": True, "hold": True, "frames": 2, "patch": 4},
    ):
        found.append(frame_conv.kernel_of(torch.bfloat16, **variant))  # type: ignore[arg-type]
    return found


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


def overview() -> list[str]:
    """Returns the lines of the table that says which GPU gets what, from what `owl-wms doctor` says of each."""
    lines = ["| your GPU | compute capability | our kernels | 8-bit plans | tried |", "|---|---|---|---|---|"]
    for capability, names in GPUS.items():
        said = support(capability, False, "auto")
        kernels = "all, in their fastest form" if capability == HOPPER else "all, some in a simpler form"
        eight = "no" if capability < EIGHT_BIT_CAPABILITY else "yes" if capability == HOPPER else "allowed, never run"
        lines.append(f"| {names} | {'.'.join(map(str, capability))} | {kernels} | {eight} | {said['tested']} |")
    below = f"below {'.'.join(map(str, OLDEST))}"
    older = "none: TensorRT if it takes the card, else PyTorch"
    lines.append(f"| V100, T4, RTX 20 series and older | {below} | {older} | no | no |")
    return [*lines, "| none | | none: PyTorch decodes on the CPU | no | every test without a GPU |"]


def timed() -> list[str]:
    """Returns what the older kernels took on a newer GPU, from the stored result."""
    result = json.loads(TIMED.read_text(encoding="utf-8"))
    eager = {row["decoder"]: row["figures"] for row in result["rows"] if row["candidate"] == "eager bf16"}
    gpu = result["machine"]["gpu"]
    lines = [
        f"Timed as what it is on one {gpu}, bf16, batch 8 (`python -m benchmarks.decoder",
        "--precision --older 8.0 8.9`). The products of cuBLAS in it are that GPU's own, so an A100 has other figures.",
        "",
        "| decoder | kernels of | ms | times `torch.compile` in the same run | error, eager's | W |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        of, found = row["candidate"].partition(" as ")[2], row["figures"]
        if of:
            cells = f"{found['median_ms']:.2f} | {found['over_compiled']:.2f} | {found['relative_l2']:.1e}"
            beside = f"{eager[row['decoder']]['relative_l2']:.1e} | {found['watts']:.0f}"
            lines.append(f"| {row['decoder']} | {of} | {cells}, {beside} |")
    return lines


def names_of(kernel: Kernel) -> str:
    """Returns the first two cells of a kernel's row: its variant, and the shared memory that it reserves."""
    return f"| {kernel.op} {' '.join(kernel.defines)} | {kernel.shared_bytes} |"


def main() -> None:
    """Write the page."""
    names = {
        f"sm_{major}{minor}": limit for (major, minor), limit in SHARED_LIMITS.items() if (major, minor) in FAMILIES
    }
    lines = [
        "# Kernels and GPU families",
        "",
        *overview(),
        "",
        "TensorRT is optional, and adds plans of its own where it is installed. `owl-wms doctor` prints the row of the",
        "machine that it runs on, also for a GPU that is not listed.",
        "",
        "## Registers of every kernel",
        "",
        "Registers per thread of each kernel variant as NVRTC compiles it (`python -m benchmarks.architectures`; no",
        "GPU is needed). A dash: the kernel uses Hopper's own instructions, and another takes its place elsewhere.",
        "Executed: sm_90, and the sm_80 and sm_89 code on an H200, translated by its driver (`make test-gpu`). The",
        "others only compile here. Which torch and TensorRT were tried with them: [version sets](versions.md).",
        "",
        *timed(),
        "",
        f"| kernel | shared memory, bytes | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for kernel in [*variants(), *others()]:
        cells = (cell(kernel, name, limit) for name, limit in names.items())
        lines.append(f"{names_of(kernel)} {' | '.join(cells)} |")
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
