"""Decoded clips to files, beside the run that made them.

Usage:
    path = write_clip(Path("samples/step_10_0"), pieces, None, fps=60)     # step_10_0.mp4, or .pt without an encoder
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from owl_wms.media.arrays import save_array
from owl_wms.media.video import VideoWriter
from owl_wms.whole import make_folder, written_whole

_log = logging.getLogger(__name__)


def write_clip(stem: Path, pieces: Iterable[Tensor], audio: Tensor | None, *, fps: int) -> Path:
    """Writes one clip as H.264, or as a tensor file when PyAV is not installed.

    Args:
        stem: path without suffix; its folder is created.
        pieces: uint8 [k, H, W, C] on the CPU, red, green, blue first, as `decode_stream` yields them; further channels
            are left out.
        audio: [samples, 2] in [-1, 1], or None; stored in a `.pt` beside the video.
        fps: frames per second.

    Returns:
        The video file: `.mp4`, or `.pt` (uint8 [n, H, W, 3]).
    """
    make_folder(stem.parent)
    if audio is not None:
        save_array(stem.with_name(f"{stem.name}_audio.pt"), audio.float())
    if importlib.util.find_spec("av") is None:
        _log.warning("PyAV is not installed (pip install av): writing %s.pt instead of a video", stem)
        path = stem.with_name(stem.name + ".pt")
        with written_whole(path) as draft:
            torch.save(torch.cat([frames[..., :3].clone() for frames in pieces]), draft)
        return path
    path = stem.with_name(stem.name + ".mp4")
    with VideoWriter(path, fps) as clip:
        for frames in pieces:
            # H.264's 4:2:0 wants even sides.
            clip.write(frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2])
    return path
