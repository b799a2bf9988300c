"""Describes how a GPU is served: by which kernels, plan and precision, and whether that was ever run on such a device.

Why: "supported" can mean measured, executed or merely compiled, and a user of a GPU that we never had must see which.
"""

from __future__ import annotations

import re

from owl_wms.ops.common.gpu import HOPPER, OLDEST, SHARED_LIMITS, Capability
from owl_wms.request import AUTO_ORDER
from owl_wms.trt.plans import EIGHT_BIT_CAPABILITY, PLANS

# Where the tests and benchmarks of this repository were executed; docs/gpus.md has the kernels one by one.
EXECUTED: dict[Capability, str] = {
    (9, 0): "executed and measured on H100 and H200",
    (8, 0): "executed on an H200, whose driver translated it; not on such a device",
    (8, 9): "executed on an H200, whose driver translated it; not on such a device",
}
COMPILED: frozenset[Capability] = frozenset({(8, 6), (10, 0), (12, 0)})


def capability_of(text: str | int) -> Capability | None:
    """`(9, 0)` out of `9.0`; None for a text that says why it is unknown."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(text))
    return (int(found[1]), int(found[2])) if found else None


def our_kernels(capability: Capability | None) -> bool:
    """Returns whether our kernels run on a GPU of this compute capability."""
    return capability is not None and capability >= OLDEST


def support(capability: Capability | None, library: bool, precision: str) -> dict[str, str]:
    """Describe what would be used.

    Args:
        capability: of the GPU; None without one.
        library: whether Torch-TensorRT can be used.
        precision: of the settings.

    Returns:
        `kernels`, `plan`, `precision`, `tested`, each one line.
    """
    if capability is None:
        return dict.fromkeys(("kernels", "plan", "precision", "tested"), "-")
    name = ".".join(map(str, capability))
    if capability == HOPPER:
        kernels = f"{name}: with warpgroup products and the tensor memory accelerator"
    elif our_kernels(capability):
        kernels = f"{name}: the forms for {'.'.join(map(str, OLDEST))} and newer"
        if capability not in SHARED_LIMITS:
            kernels += f", within {min(SHARED_LIMITS.values()) >> 10} KB of shared memory"
    else:
        kernels = f"none: they need compute capability {'.'.join(map(str, OLDEST))}; this GPU has {name}"
    ours, others = PLANS["tensorrt+ops"].name, PLANS["tensorrt"].name
    if library:
        plan = f"{ours} where the decoder has a fused form, else {others}" if our_kernels(capability) else others
    elif our_kernels(capability):
        plan = f"{PLANS['ops'].name} where the decoder has a fused form, else PyTorch decodes"
    else:
        plan = "PyTorch decodes"
    wanted = ", then ".join(AUTO_ORDER) if precision == "auto" else precision
    if precision in ("fp8", "int8") and capability < EIGHT_BIT_CAPABILITY:
        wanted = f"{precision} is not possible: 8-bit products need compute capability 9.0; this GPU has {name}"
    tested = EXECUTED.get(capability, "")
    if not tested:
        tested = (
            "compiled in our tests, never run" if capability in COMPILED else "neither compiled nor run in our tests"
        )
    return {"kernels": kernels, "plan": plan, "precision": wanted, "tested": tested}
