"""Decoded clips to files, beside the run that made them.

Usage:
    path = write_clip(Path("samples/step_10_0"), video, None, fps=60)     # step_10_0.mp4, or .pt without an encoder
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from owl_wms.media.whole import written_whole
from owl_wms.ops.frame_bytes import frame_bytes

_log = logging.getLogger(__name__)


def write_clip(stem: Path, video: Tensor, audio: Tensor | None, *, fps: int) -> Path:
    """One clip as H.264, or as a tensor file when PyAV is not installed.

    Args:
        stem: path without suffix; its folder is created.
        video: [n, C, H, W] with red, green, blue first, nominally in [-1, 1]; further channels are left out.
        audio: [samples, 2] in [-1, 1], or None; kept in a `.pt` beside the video.
        fps: frames a second.

    Returns:
        The video file: `.mp4`, or `.pt` (uint8 [n, H, W, 3]).
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    frames = frame_bytes(video[:, :3]).cpu()
    if audio is not None:
        torch.save(audio.float().cpu(), stem.with_name(f"{stem.name}_audio.pt"))
    try:
        import av
    except ImportError:
        _log.warning("PyAV is not installed (pip install 'owl_wms[media]'): writing %s.pt instead of a video", stem)
        path = stem.with_name(stem.name + ".pt")
        with written_whole(path) as draft:
            torch.save(frames, draft)
        return path
    path = stem.with_name(stem.name + ".mp4")
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2  # H.264's 4:2:0 wants even sides
    with written_whole(path) as draft, av.open(str(draft), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames[:, :height, :width].contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
