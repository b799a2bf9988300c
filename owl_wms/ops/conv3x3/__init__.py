"""`owl_wms::conv3x3` and its forms: dense 3x3 convolutions on NHWC with all that follows them.

Why it exists: nine tenths of the sana decoder are these, and what a library leaves behind them (bias, ReLU, residual)
is passes over the largest tensors. `how` says who computes: LIBRARY (cuDNN, on a channels_last view, no copy) with what
it cannot fuse as one pass, LIBRARY_FUSED its own convolution + bias + ReLU, RESIDENT our CUDA kernel, NARROW our Triton
kernel for few output channels. `ways(...)` lists what applies to a shape; the fastest is measured when a program is
built, not guessed here, and stays what it was then. RESIDENT_NORM is RESIDENT with an RMS norm over the channels in its
epilogue; every other way of `conv3x3_norm` ends in a pass of `channel_norm`. `conv3x3_shuffled` adds a pixel
shuffle by two onto an enlarged image where the results are stored (RESIDENT's kernel; `fits_shuffled`, or it is its
reference). cuDNN chooses its algorithm by shape
(`owl_wms.cudnn`).

Usage:
    y = conv3x3(x, pack(weight), bias, residual, relu=False, how=LIBRARY)     # [B, H, W, C] -> [B, H, W, O]
    y = conv3x3_norm(x, pack(weight), gain, shift, residual, 1e-5, how=LIBRARY)
    y = conv3x3_shuffled(x, pack(weight), bias, base)          # 4 O output channels, base [B, 2H, 2W, O] -> like base
"""

from __future__ import annotations

from torch import Tensor

from owl_wms import cudnn
from owl_wms.ops import channel_norm
from owl_wms.ops.common.gpu import is_hopper
from owl_wms.ops.common.nvrtc import Kernel
from owl_wms.ops.common.register import define, has_kernel, require
from owl_wms.ops.conv3x3 import resident
from owl_wms.ops.conv3x3.reference import latent_reference, latent_rows, pack, reference, shuffled_reference

__all__ = [
    "LIBRARY", "LIBRARY_FUSED", "NARROW", "RESIDENT", "RESIDENT_NORM",
    "conv3x3", "conv3x3_norm", "conv3x3_shuffled", "fits_shuffled", "latent_conv", "latent_reference", "pack",
    "reference", "shuffled_reference", "variants", "ways",
]  # fmt: skip

LIBRARY, LIBRARY_FUSED, RESIDENT, RESIDENT_NORM, NARROW = -1, -2, -3, -4, 0


def ways(x: Tensor, weight: Tensor, residual: bool, relu: bool, silu: bool = False, norm: bool = False) -> list[int]:
    """Every value of `how` that can compute this shape on `x`'s device; `[LIBRARY]` where there is no kernel."""
    found = [LIBRARY]
    if not has_kernel(x):
        return found
    if relu and not residual:
        found.append(LIBRARY_FUSED)
    if is_hopper(x.device):
        from owl_wms.ops.conv3x3 import kernel

        found += [RESIDENT] if resident.fits(x, weight) else []
        if norm and resident.fits(x, weight) and resident.holds_all_channels(weight):
            found.append(RESIDENT_NORM)
        narrow = weight.shape[0] == kernel.NARROW.channels and kernel.fits(x, weight, kernel.NARROW)
        found += [NARROW] if narrow and not silu else []
    return found


def fits_shuffled(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `conv3x3_shuffled` of these is one kernel on `x`'s device."""
    return has_kernel(x) and is_hopper(x.device) and resident.fits_shuffled(x, weight)


def variants(x: Tensor, silu: bool = False, norm_eps: float | None = None, shuffled: bool = False) -> list[Kernel]:
    """The CUDA kernels that convolutions of tensors like `x` may try, to be compiled beforehand.

    Args:
        silu: whether some are followed by SiLU.
        norm_eps: eps of the norms behind some of them, None without any.
        shuffled: whether some, with a bias, are added to enlarged images.
    """
    if not has_kernel(x) or not is_hopper(x.device):
        return []
    follows = ((True, False), (False, True), (False, False))  # ReLU or a residual or neither
    found = [resident.kernel_of(x.dtype, bias=True, relu=relu, residual=residual) for relu, residual in follows]
    if silu:
        found.append(resident.kernel_of(x.dtype, bias=True, relu=False, residual=False, silu=True))
    if shuffled:
        found.append(resident.shuffled_kernel_of(x.dtype, bias=True))
    if norm_eps is not None:
        found.append(resident.kernel_of(x.dtype, bias=False, relu=False, residual=False))
        found.append(resident.kernel_of(x.dtype, bias=True, relu=False, residual=True, norm_eps=norm_eps))
    return found


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, how: int, silu: bool = False
) -> Tensor:
    if not has_kernel(x):
        return reference(x, weight, bias, residual, relu, silu)
    from owl_wms.ops.conv3x3 import kernel

    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    if how == NARROW:
        return kernel.launch(x, weight, bias, residual, relu, kernel.NARROW)
    if how == RESIDENT:
        return resident.launch(x, weight, bias, residual, relu, silu)
    image, taps = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    if how == LIBRARY_FUSED and relu and residual is None:
        fused = cudnn.convolution_relu(image, taps, None if bias is None else bias.to(x.dtype))
        return fused.permute(0, 2, 3, 1).contiguous()
    y = cudnn.convolution(image, taps).permute(0, 2, 3, 1).contiguous()
    if bias is None and residual is None and not relu and not silu:
        return y
    return kernel.finish_(y, bias, residual, relu, silu)


def _by_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, how: int, silu: bool = False
) -> Tensor:
    return _run(x, weight, bias, residual, relu, LIBRARY, silu)


def _by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, how: int, silu: bool = False
) -> Tensor:
    return reference(x, weight, bias, residual, relu, silu)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, how: int, silu: bool = False
) -> Tensor:
    require(x.shape[-1] == weight.shape[-1], lambda: f"{x.shape[-1]} channels, weights for {weight.shape[-1]}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _run_norm(
    x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, residual: Tensor | None, eps: float, how: int
) -> Tensor:
    if how == RESIDENT_NORM and has_kernel(x):
        residual = None if residual is None else residual.contiguous()
        return resident.launch(x.contiguous(), weight.contiguous(), shift, residual, False, norm=(gain, eps))
    return _norm_by_two(x, weight, gain, shift, residual, eps, how)


def _norm_by_two(
    x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, residual: Tensor | None, eps: float, how: int
) -> Tensor:
    y = conv3x3(x, weight, None, None, False, LIBRARY if how == RESIDENT_NORM else how)
    return channel_norm.channel_norm(y, gain, shift, residual, eps, False)


def _fake_norm(
    x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, residual: Tensor | None, eps: float, how: int
) -> Tensor:
    require(gain.shape[0] == weight.shape[0], lambda: f"{weight.shape[0]} channels, a norm of {gain.shape[0]}")
    return _fake(x, weight, None, residual, False, how)


def _run_shuffled(x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
    if fits_shuffled(x, weight):
        return resident.launch_shuffled(x.contiguous(), weight.contiguous(), bias, base)
    return shuffled_reference(x, weight, bias, base)


def _fake_shuffled(x: Tensor, weight: Tensor, bias: Tensor | None, base: Tensor) -> Tensor:
    batch, height, width, channels = x.shape
    wanted = (batch, 2 * height, 2 * width, weight.shape[0] // 4)
    require(channels == weight.shape[-1], lambda: f"{channels} channels, weights for {weight.shape[-1]}")
    require(base.shape == wanted, lambda: f"a result of {list(wanted)} onto {list(base.shape)}")
    return base.new_empty(base.shape)


def _run_latent(z: Tensor, weight: Tensor, bias: Tensor, repeats: int) -> Tensor:
    rows, shortcut = latent_rows(z, weight, repeats)
    return _run(rows, weight, bias, shortcut, False, LIBRARY)


def _fake_latent(z: Tensor, weight: Tensor, bias: Tensor, repeats: int) -> Tensor:
    batch, _, height, width = z.shape
    return weight.new_empty(batch, height, width, weight.shape[0])


conv3x3 = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, int how, bool silu=False) -> Tensor",
    run=_run,
    fake=_fake,
    simpler=(_by_library, _by_torch),
)
conv3x3_norm = define(
    "conv3x3_norm(Tensor x, Tensor weight, Tensor gain, Tensor shift, Tensor? residual, float eps, int how) -> Tensor",
    run=_run_norm,
    fake=_fake_norm,
    simpler=(_norm_by_two,),
)
conv3x3_shuffled = define(
    "conv3x3_shuffled(Tensor x, Tensor weight, Tensor? bias, Tensor base) -> Tensor",
    run=_run_shuffled,
    fake=_fake_shuffled,
    simpler=(shuffled_reference,),
)
latent_conv = define(
    "latent_conv(Tensor z, Tensor weight, Tensor bias, int repeats) -> Tensor",
    run=_run_latent,
    fake=_fake_latent,
    simpler=(latent_reference,),
)
