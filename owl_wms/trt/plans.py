"""The named ways to lower a decoder.

Why names: which way is fastest depends on decoder, precision and GPU, so the plans that apply are built and timed,
and the name of the one that won stands in the manifest. A plan says beforehand whether it applies and which precisions
it offers; none is ever silently replaced.

Usage:
    for plan in candidates(decoder, spec, "bf16"):
        module, rewrites = plan.lower(folded_fp32, spec, "bf16")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from owl_wms.errors import FastPathError
from owl_wms.trt.check.calibration import calibration_latents
from owl_wms.trt.graph.ordinary import is_ordinary
from owl_wms.trt.graph.shapes import copy_with
from owl_wms.trt.rewrites.apply import apply_rewrites
from owl_wms.trt.spec import BuildSpec, dtype_of
from owl_wms.vae.autoencoder_dc import is_sana_decoder

Applies = Callable[[nn.Module, BuildSpec], tuple[bool, str]]
Lower = Callable[[nn.Module, BuildSpec, str], tuple[nn.Module, dict[str, int]]]
FLOATS = ("fp16", "bf16", "fp32")
# wgmma on 8-bit operands through the tensor copy engine: what owl_wms/ops/linear8 is written for.
EIGHT_BIT_CAPABILITY = (9, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to lower a decoder.

    Attributes:
        name: stable; part of the cache key and the manifest.
        summary: one sentence for `owl-wms trt`.
        applies: `(decoder, spec) -> (yes, why not)`; cheap, no CUDA.
        lower: `(folded fp32 decoder, spec, precision) -> (module, {rewrite: places})`; the input is not changed, the
            result has the precision's dtype and the decoder's device.
        precisions: those the plan offers.
        settings: compile settings that differ from the spec's.
        isolates: whether a failing build may be searched for modules to keep in PyTorch.
    """

    name: str
    summary: str
    applies: Applies
    lower: Lower
    precisions: tuple[str, ...] = FLOATS
    settings: dict[str, Any] = field(default_factory=dict)
    isolates: bool = True


def lower_with(*names: str) -> Lower:
    """A `lower` that casts, then applies the rewrites called `names`."""

    def lower(folded: nn.Module, spec: BuildSpec, precision: str) -> tuple[nn.Module, dict[str, int]]:
        module = cast_copy(folded, precision).eval()
        return module, apply_rewrites(module, spec.input_shape, names)

    return lower


def cast_copy(folded: nn.Module, precision: str) -> nn.Module:
    """A copy whose floating-point tensors have the precision's dtype; shares nothing with `folded`."""
    dtype = dtype_of(precision)
    return copy_with(folded, lambda t: t.to(dtype, copy=True) if t.dtype.is_floating_point else t.clone())


def _always(decoder: nn.Module, spec: BuildSpec) -> tuple[bool, str]:
    return True, ""


def _only_sana(decoder: nn.Module, spec: BuildSpec) -> tuple[bool, str]:
    return is_sana_decoder(decoder), "only for diffusers' AutoencoderDC decoder"


def _grouped(decoder: nn.Module, spec: BuildSpec) -> tuple[bool, str]:
    narrow = any(
        isinstance(m, nn.Conv2d) and m.groups > 1 and m.in_channels // m.groups == 16 and m.kernel_size != (1, 1)
        for m in decoder.modules()
    )
    return narrow, "needs 3x3 convolutions in groups of 16 channels"


def fused_ops() -> ModuleType | None:
    """`owl_wms.fused.dcae`, or None where it cannot be imported (no Triton); imported on demand because it loads
    kernels.
    """
    try:
        return importlib.import_module("owl_wms.fused.dcae")
    except Exception:  # a missing or broken dependency: the plan then does not apply
        return None


def fused_sana_ops() -> ModuleType | None:
    """`owl_wms.fused.sana`, likewise."""
    try:
        return importlib.import_module("owl_wms.fused.sana")
    except Exception:  # as above
        return None


def _fusible_sana(decoder: nn.Module, spec: BuildSpec) -> tuple[bool, str]:
    module = fused_sana_ops()
    if module is None:
        return False, "our fused operators cannot be imported"
    return module.supports(decoder)


def _lower_sana(hybrid: bool) -> Lower:
    def lower(folded: nn.Module, spec: BuildSpec, precision: str) -> tuple[nn.Module, dict[str, int]]:
        module = fused_sana_ops()
        if module is None:
            raise FastPathError("export", "our fused operators cannot be imported", "install triton")
        if precision not in ("fp16", "bf16"):
            raise FastPathError("export", f"the fused sana decoder has no {precision} form", "choose fp16 or bf16")
        # From the fp32 decoder: batch norm is folded before anything is rounded.
        return module.fuse(folded, dtype_of(precision), spec.input_shape, hybrid=hybrid), {"fuse": 1}

    return lower


def _fusible(decoder: nn.Module, spec: BuildSpec) -> tuple[bool, str]:
    if is_sana_decoder(decoder):
        return _fusible_sana(decoder, spec)
    module = fused_ops()
    if module is None:
        return False, "our fused operators cannot be imported"
    yes, why = module.supports(decoder)
    return _ordinary(decoder, spec) if yes else (False, str(why))


def _ordinary(decoder: Any, spec: BuildSpec) -> tuple[bool, str]:
    return is_ordinary(decoder, spec.input_shape), "it does not do what its configuration says, or does more"


def _lower_fused(folded: nn.Module, spec: BuildSpec, precision: str) -> tuple[nn.Module, dict[str, int]]:
    if is_sana_decoder(folded):
        return _lower_sana(False)(folded, spec, precision)
    module = fused_ops()
    if module is None:
        raise FastPathError("export", "our fused operators cannot be imported", "install triton")
    cast = cast_copy(folded, precision).eval()
    return module.fuse(cast, dtype_of(precision), spec.input_shape).eval(), {"fuse": 1}


def _eight_bits(decoder: nn.Module, spec: BuildSpec) -> tuple[bool, str]:
    module = fused_ops()
    if module is None or is_sana_decoder(decoder):
        return False, "8-bit products need our fused form of a DCAE or distilled decoder"
    from owl_wms.fused.dcae8 import supports8

    yes, why = supports8(decoder)
    if yes and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(spec.device_index)
        if capability < EIGHT_BIT_CAPABILITY:
            has = ".".join(map(str, capability))
            return False, f"8-bit products need compute capability 9.0 (H100, H200); this GPU has {has}"
    return _ordinary(decoder, spec) if yes else (False, why)


def _lower_eight_bits(folded: nn.Module, spec: BuildSpec, precision: str) -> tuple[nn.Module, dict[str, int]]:
    from owl_wms.fused.dcae8 import fuse8
    from owl_wms.ops.codes import FORMATS

    z = calibration_latents(spec, next(folded.parameters()).device)
    return fuse8(folded, dtype_of(precision), FORMATS[precision], z, spec.input_shape), {"fuse8": 1}


_DCAE = ("replace_bicubic", "replace_landscape_operations")
_SANA = ("replace_attention_operations", "replace_sana_operations")
PLANS: dict[str, Plan] = {}


def register(plan: Plan) -> Plan:
    """Add a plan. Raises FastPathError when its name is taken."""
    if plan.name in PLANS:
        raise FastPathError("build", f"a plan is called {plan.name!r} already", "choose another name")
    PLANS[plan.name] = plan
    return plan


# In the order in which they are built: what has always won comes first, for a build that runs out of time keeps what it
# has.
register(
    Plan(
        name="tensorrt+ops",
        summary="our fused kernels where they apply, TensorRT for the rest",
        applies=_fusible,
        lower=_lower_fused,
        precisions=("fp16", "bf16"),
        settings={"min_block_size": 1},
        isolates=False,
    )
)


register(
    Plan(
        name="tensorrt",
        summary="TensorRT after every rewrite: resizes as matrix products, attention and norms without transposes",
        applies=_always,
        lower=lower_with(*_DCAE, *_SANA),
    )
)


register(
    Plan(
        name="tensorrt-plain",
        summary="TensorRT on diffusers' own graph, no rewrites: what the rewrites are compared with",
        applies=_only_sana,
        lower=lower_with(),
    )
)


register(
    Plan(
        name="tensorrt+merged",
        summary="as tensorrt, with groups of 16 channels merged in pairs",
        applies=_grouped,
        lower=lower_with(*_DCAE, "merge_groups"),
    )
)


register(
    Plan(
        name="tensorrt+ops8",
        summary="as tensorrt+ops, with 8-bit products in the wide stages, calibrated; only when asked for",
        applies=_eight_bits,
        lower=_lower_eight_bits,
        precisions=("fp8", "int8"),
        settings={"min_block_size": 1},
        isolates=False,
    )
)


register(
    Plan(
        name="tensorrt+vit",
        summary="sana: our fused kernels for the EfficientViT blocks, TensorRT for the convolutions after them",
        applies=_fusible_sana,
        lower=_lower_sana(True),
        precisions=("fp16", "bf16"),
        isolates=False,
    )
)


def require_unaltered(decoder: nn.Module) -> None:
    """Plans take a decoder's weights and put other modules in place of its own, so what somebody hung onto one of those
    would not be called, or only at times.

    Raises:
        FastPathError: stage "export"; a module has a forward hook, or a forward that is not its class's.
    """
    for name, module in decoder.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked or "forward" in vars(module):
            what = "a forward hook" if hooked else "a forward of its own"
            where = f"its module {name}" if name else "the decoder"
            raise FastPathError(
                "export", f"{where} has {what}, which a compiled decoder would not call", "remove it to be compiled"
            )


def candidates(decoder: nn.Module, spec: BuildSpec, precision: str) -> list[Plan]:
    """The plans to build at `precision`, in registry order.

    Raises:
        FastPathError: stage "build" for a plan name that does not exist, or when no plan that applies offers the
            precision; the message says why each one was left out. Stage "export" as `require_unaltered`.
    """
    require_unaltered(decoder)
    for name in spec.plans:
        if name not in PLANS:
            raise FastPathError("build", f"no plan is called {name!r}", f"known: {', '.join(PLANS)}")
    chosen, refused = [], []
    for plan in PLANS.values():
        if spec.plans and plan.name not in spec.plans:
            continue
        if precision not in plan.precisions:
            refused.append(f"{plan.name} offers {', '.join(plan.precisions)}")
            continue
        yes, why = plan.applies(decoder, spec)
        if yes:
            chosen.append(plan)
        else:
            refused.append(f"{plan.name}: {why}")
    if not chosen:
        raise FastPathError(
            "build",
            f"no plan offers precision {precision!r} for this decoder ({'; '.join(refused)})",
            "choose another precision",
        )
    return chosen
