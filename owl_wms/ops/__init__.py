"""The decoder's operations as custom ops, each a CUDA kernel beside a plain PyTorch reference.

Importing this package registers `torch.ops.owl_wms.*`; a saved program that contains them needs that import first.
Between operators tensors are contiguous `[B, H, W, C]`, so no copy is needed. At the ends, `latent_conv` and
`code_gain` read `[B, c, h, w]` latents, and `resize` and `shuffle_frames` write `[B, C, H, W]` frames.

    grouped_conv   3x3 in groups of 16, LeakyReLU on load, bias and LeakyReLU on store, optionally behind a bicubic x2
    up_residual    bicubic x2 plus the pixel-shuffled shortcut
    conv_out       (SiLU,) 3x3 to at most 8 channels, fp32
    resize         bicubic to any size, NHWC fp32 to NCHW
    frame_bytes    NCHW frames in [-1, 1] to uint8 NHWC
    stage_tail     a stage of one block from its low-resolution products on, fused (compute capability 9.0)
    stage          a whole decoder stage out of the above and library matrix products

with 8-bit products (`codes` says what a code is):

    linear8        1x1 convolution on codes with LeakyReLU, or added to a residual (CUDA on 9.0, Triton)
    grouped_conv8  the grouped 3x3 with codes for a result (CUDA)
    stage8         a stage out of these

and, for diffusers' AutoencoderDC (Triton where not said otherwise):

    conv3x3           dense 3x3 with bias, ReLU or SiLU and residual, by the library or by ours; `conv3x3_norm` with an
                      RMS norm, `latent_conv` the first, `conv3x3_shuffled` behind a pixel shuffle onto an image
    nearest_up        enlargement by nearest neighbour, 3x3 and shortcut
    pointwise         a 1x1 convolution as one library product; with ReLU, a residual, or into frames
    depthwise_gate    SiLU, depthwise 3x3, SiLU gate (CUDA)
    channel_norm      RMS norm, ReLU, residual
    linear_attention  ReLU linear attention; `multiscale_attention` with its second scale
    shuffle_add       pixel shuffle with its shortcut; `shuffle_frames` to an image

and, for streaming decoders (TAEHV):

    frame_conv        3x3 over a frame and the one before it; `enlarge_conv` behind a nearest enlargement and growth in
                      time, `picture_conv` the last one with clamp and pixel shuffle (CUDA, kernel of conv3x3)
    frame_depthwise   depthwise 7x7 over a frame and the one before it (CUDA)
"""

from __future__ import annotations

from owl_wms.ops import (
    channel_norm,
    codes,
    conv3x3,
    conv_out,
    depthwise_gate,
    frame_bytes,
    frame_conv,
    frame_depthwise,
    grouped_conv,
    grouped_conv8,
    linear8,
    linear_attention,
    nearest_up,
    pointwise,
    resize,
    shuffle_add,
    stage,
    stage8,
    stage_tail,
    up_residual,
)

__all__ = [
    "channel_norm",
    "codes",
    "conv3x3",
    "conv_out",
    "depthwise_gate",
    "frame_conv",
    "frame_depthwise",
    "frame_bytes",
    "grouped_conv",
    "grouped_conv8",
    "linear8",
    "linear_attention",
    "nearest_up",
    "pointwise",
    "resize",
    "shuffle_add",
    "stage",
    "stage8",
    "stage_tail",
    "up_residual",
]
