"""The named ways to lower a decoder.

Why names: which way is fastest depends on decoder, precision and GPU. So every plan that applies is built and timed,
and the name of the one that won stands in the manifest. A plan says beforehand whether it applies and which precisions
it offers; none is ever replaced by another without a word.

Usage:
    check_names(request)                                # in the caller: what can be refused without the decoder
    chosen = select(decoder, request, recording)        # in the build process, once
    for plan in chosen.plans["bf16"]:
        module, rewrites = plan.lower(folded_fp32, request, "bf16", recording)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from owl_wms import fused
from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.trt.check.calibration import calibration_latents
from owl_wms.trt.graph.ordinary import is_ordinary
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import copy_with
from owl_wms.trt.rewrites.apply import apply_rewrites
from owl_wms.trt.spec import dtype_of
from owl_wms.vae.autoencoder_dc import is_sana_decoder

Applies = Callable[[nn.Module, Request, Recording], tuple[bool, str]]
Lower = Callable[[nn.Module, Request, str, Recording], tuple[nn.Module, dict[str, int]]]
FLOATS = ("fp16", "bf16", "fp32")
# wgmma on 8-bit operands through the tensor copy engine: what owl_wms/ops/linear8 is written for.
EIGHT_BIT_CAPABILITY = (9, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One way to lower a decoder.

    Attributes:
        name: stable; part of the cache key and the manifest.
        summary: one sentence for `owl-wms trt`.
        applies: `(decoder, request, recording) -> (yes, why not)`; cheap.
        lower: `(folded fp32 decoder, request, precision, recording) -> (module, {rewrite: places})`; the decoder is not
            changed, the module has the precision's dtype and the decoder's device.
        precisions: those the plan offers.
        settings: compile settings that differ from the request's.
        isolates: whether a failing build may be searched for modules to leave in PyTorch.
        library: whether Torch-TensorRT compiles the lowered module; otherwise it is exported and saved as it is.
        settles_on: compute capabilities of the GPUs on which this plan, where it applies, was the fastest in every
            measurement: once it is right there, no later plan is built unless the request names plans.
    """

    name: str
    summary: str
    applies: Applies
    lower: Lower
    precisions: tuple[str, ...] = FLOATS
    settings: dict[str, Any] = field(default_factory=dict)
    isolates: bool = True
    library: bool = True
    settles_on: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The plans to build.

    Attributes:
        plans: precision -> its plans, in registry order; for each precision of the request, some may have none.
        refused: plan -> why it is not built.
    """

    plans: Mapping[str, tuple[Plan, ...]]
    refused: Mapping[str, str]


def cast_copy(folded: nn.Module, precision: str) -> nn.Module:
    """A copy whose floating-point tensors have the precision's dtype; shares nothing with `folded`."""
    dtype = dtype_of(precision)
    return copy_with(folded, lambda t: t.to(dtype, copy=True) if t.dtype.is_floating_point else t.clone())


def lower_with(*names: str) -> Lower:
    """A `lower` that casts, then applies the rewrites called `names`."""

    def lower(folded: nn.Module, request: Request, precision: str, recording: Recording) -> Any:
        module = cast_copy(folded, precision).eval()
        if not names:
            return module, {}
        if recording.shapes is None:
            reason = "the forward cannot be followed on the meta device, so no shape inside it is known"
            raise FastPathError("export", reason, "name a plan without rewrites (owl-wms trt plans)")
        return module, apply_rewrites(module, recording.shapes, names)

    return lower


def _always(decoder: nn.Module, request: Request, recording: Recording) -> tuple[bool, str]:
    return True, ""


def _only_sana(decoder: nn.Module, request: Request, recording: Recording) -> tuple[bool, str]:
    return is_sana_decoder(decoder), "only for diffusers' AutoencoderDC decoder"


def _fusible(decoder: nn.Module, request: Request, recording: Recording) -> tuple[bool, str]:
    form, why = fused.form_of(decoder)
    return (False, why) if form is None else _ordinary(decoder, recording, form)


def _ordinary(decoder: nn.Module, recording: Recording, form: Any) -> tuple[bool, str]:
    if not hasattr(form, "standard") or is_ordinary(decoder, recording, form.standard):
        return True, ""
    return False, (
        "the decoder's forward differs from that of a decoder built from its configuration (a subclass, a replaced "
        "module, an added operator), or it cannot be recorded"
    )


def _lower_fused(
    folded: nn.Module, request: Request, precision: str, recording: Recording
) -> tuple[nn.Module, dict[str, int]]:
    form, why = fused.form_of(folded)
    if form is None:
        raise FastPathError("export", why, "name another plan (owl-wms trt plans)")
    # From the fp32 decoder: batch norm is folded before anything is rounded.
    return form.fuse(folded, dtype_of(precision), request.input_shape).eval(), {"fuse": 1}


def _eight_bits(decoder: nn.Module, request: Request, recording: Recording) -> tuple[bool, str]:
    form, why = fused.form_of(decoder)
    if form is None or is_sana_decoder(decoder):
        return False, why or "8-bit products need our fused form of a DCAE or distilled decoder"
    from owl_wms.fused.dcae8 import supports8

    yes, why = supports8(decoder)
    if yes and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(request.device_index)
        if capability < EIGHT_BIT_CAPABILITY:
            has = ".".join(map(str, capability))
            return False, f"8-bit products need compute capability 9.0 (H100, H200); this GPU has {has}"
    return _ordinary(decoder, recording, form) if yes else (False, why)


def _lower_eight_bits(
    folded: nn.Module, request: Request, precision: str, recording: Recording
) -> tuple[nn.Module, dict[str, int]]:
    from owl_wms.fused.dcae8 import fuse8
    from owl_wms.ops.codes import FORMATS

    z = calibration_latents(request, next(folded.parameters()).device)
    return fuse8(folded, dtype_of(precision), FORMATS[precision], z, request.input_shape), {"fuse8": 1}


_REWRITES = (
    "replace_bicubic", "replace_landscape_operations", "replace_attention_operations", "replace_sana_operations",
)  # fmt: skip
PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            name="tensorrt+ops",
            summary="our fused kernels where they apply, TensorRT for the rest",
            applies=_fusible,
            lower=_lower_fused,
            precisions=("fp16", "bf16"),
            settings={"min_block_size": 1},
            isolates=False,
            settles_on=((9, 0),),  # benchmarks/results: H100 and H200, every decoder family that it applies to
        ),
        Plan(
            name="ops",
            summary="our fused kernels and PyTorch's for the rest, without TensorRT; where that is not installed",
            applies=_fusible,
            lower=_lower_fused,
            precisions=("fp16", "bf16"),
            isolates=False,
            library=False,
        ),
        Plan(
            name="tensorrt",
            summary="TensorRT after every rewrite: resizes as matrix products, attention and norms without transposes",
            applies=_always,
            lower=lower_with(*_REWRITES),
        ),
        Plan(
            name="tensorrt-plain",
            summary="TensorRT on diffusers' own graph, no rewrites: what the rewrites are compared with",
            applies=_only_sana,
            lower=lower_with(),
        ),
        Plan(
            name="tensorrt+ops8",
            summary="as tensorrt+ops, with 8-bit products in the wide stages, calibrated; only when asked for",
            applies=_eight_bits,
            lower=_lower_eight_bits,
            precisions=("fp8", "int8"),
            settings={"min_block_size": 1},
            isolates=False,
        ),
    )
}
"""Name -> plan, in the order in which they are built: what has always won comes first, for a build that runs out of
time keeps what it has.
"""


def named(request: Request) -> list[Plan]:
    """The plans that the request names, or all of them, in registry order."""
    return [plan for plan in PLANS.values() if not request.plans or plan.name in request.plans]


def check_names(request: Request) -> None:
    """Refuse what no decoder could make possible, before a process is started for it.

    Raises:
        FastPathError: stage "build"; a plan that does not exist, or a precision that none of the named plans offers.
    """
    for name in request.plans:
        if name not in PLANS:
            raise FastPathError("build", f"no plan is called {name!r}", f"known: {', '.join(PLANS)}")
    if not any(precision in plan.precisions for plan in named(request) for precision in request.precisions()):
        raise _no_plan(request, {plan.name: _offers(plan) for plan in named(request)})


def without_library(request: Request) -> bool:
    """Returns whether a plan that needs no Torch-TensorRT is among those that the request allows."""
    return any(not plan.library and set(plan.precisions) & set(request.precisions()) for plan in named(request))


def select(
    decoder: nn.Module, request: Request, recording: Recording, missing: FastPathError | None = None
) -> Selection:
    """Ask each named plan once whether it applies.

    Args:
        decoder: weight norm live or folded, any dtype and device.
        request: its plans and precisions are what is chosen from.
        recording: of the decoder as its caller runs it.
        missing: why Torch-TensorRT cannot be used here, and the plans that need it are refused; None where it can be.
            Then those that do not need it are built only when they are named, for each has a twin that is faster. For a
            step both are built: our operators leave TensorRT views of its state, and engines of those cost time.

    Raises:
        FastPathError: stage "build", as `check_names`, and when no plan applies ("import" where TensorRT is missing);
            the message says why each was left out.
    """
    check_names(request)
    refused: dict[str, str] = {}
    chosen = []
    for plan in named(request):
        if not set(plan.precisions) & set(request.precisions()):
            refused[plan.name] = _offers(plan)
            continue
        if plan.library and missing is not None:
            yes, why = False, missing.reason
        elif not (plan.library or missing or request.plans or request.state):
            yes, why = False, "built only without Torch-TensorRT, or when it is named"
        else:
            yes, why = plan.applies(decoder, request, recording)
        if yes:
            chosen.append(plan)
        else:
            refused[plan.name] = why
    if not chosen:
        failure = _no_plan(request, refused)
        raise failure if missing is None else FastPathError("import", failure.reason, missing.remedy)
    plans = {at: tuple(plan for plan in chosen if at in plan.precisions) for at in request.precisions()}
    return Selection(plans=plans, refused=refused)


def _offers(plan: Plan) -> str:
    return f"offers {', '.join(plan.precisions)}"


def _no_plan(request: Request, refused: Mapping[str, str]) -> FastPathError:
    why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return FastPathError(
        "build",
        f"no plan offers precision {request.precision!r} for this decoder ({why})",
        "choose another precision or plan (owl-wms trt plans)",
    )
