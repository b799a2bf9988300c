"""The decoder's operations as custom ops, each a CUDA kernel beside a plain PyTorch reference.

Importing this package registers `torch.ops.owl_wms.*`; a saved program that contains them needs that import first.
All tensors are NHWC, `[B, H, W, C]` contiguous: the layout is logical, so no boundary has a reason to copy.

    grouped_conv   3x3 in groups of 16, LeakyReLU on load, bias and LeakyReLU on store, optionally behind a bicubic x2
    up_residual    bicubic x2 plus the pixel-shuffled shortcut
    conv_out       (SiLU,) 3x3 to at most 8 channels, fp32
    resize         bicubic to any size, NHWC fp32 to NCHW; `frames` does the same to uint8 HWC
    stage          a whole decoder stage out of the above and library matrix products
"""

from __future__ import annotations

from owl_wms.ops import conv_out, grouped_conv, resize, stage, up_residual

__all__ = ["conv_out", "grouped_conv", "resize", "stage", "up_residual"]
