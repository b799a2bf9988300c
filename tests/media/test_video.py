"""Clips: what is written is read back, nearly; bad clips and frames are refused by name."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from owl_wms.errors import DataError
from owl_wms.media.arrays import save_array
from owl_wms.media.frames import frame_batches
from owl_wms.media.sinks import open_sink
from owl_wms.media.video import MOST_FPS, VideoWriter, read_video


def gradient(frames: int, height: int = 36, width: int = 64) -> torch.Tensor:
    """Smooth frames that a lossy codec keeps: uint8 [N, H, W, 3]."""
    y = torch.linspace(40, 200, height)[None, :, None, None]
    x = torch.linspace(0, 30, width)[None, None, :, None]
    n = torch.arange(frames)[:, None, None, None] * 5
    return (y + x + n).expand(-1, -1, -1, 3).to(torch.uint8)


def test_clip_round_trip(tmp_path: Path) -> None:
    frames = gradient(5)
    path = tmp_path / "deep" / "clip.mp4"
    with VideoWriter(path, fps=np.float32(15)) as clip:  # a number of a table, for example
        clip.write(frames[:2])
        clip.write(frames[2:])
    assert clip.frames == 5
    back = torch.stack(list(read_video(path)))
    assert back.shape == frames.shape
    assert (back.int() - frames.int()).abs().float().mean() < 3
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 15


def test_bad_frames_and_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="are written as"):
        VideoWriter(tmp_path / "clip.gif")
    for fps in (0, 0.0001, 1001, 2**31, 1e300, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="at least 1/1001"):
            VideoWriter(tmp_path / "clip.mp4", fps=fps)
    with pytest.raises(DataError, match="uint8"), VideoWriter(tmp_path / "clip.mp4") as clip:
        clip.write(torch.zeros(1, 3, 36, 64))
    with pytest.raises(DataError, match="even sides"), VideoWriter(tmp_path / "clip.mp4") as clip:
        clip.write(gradient(1, 35, 64))
    with VideoWriter(tmp_path / "clip.mp4") as clip:
        clip.write(gradient(1))
        with pytest.raises(DataError, match="the clip is 36x64, got a frame of 36x32"):
            clip.write(gradient(1, 36, 32))


def test_the_fastest_clip_keeps_its_frames(tmp_path: Path) -> None:
    """Of frames that are alike x264 makes B-frames, and readers left those of a clip of 5,000 per second out."""
    for count in range(1, 6):
        with VideoWriter(tmp_path / "x.mp4", MOST_FPS) as clip:
            clip.write(torch.zeros(count, 16, 16, 3, dtype=torch.uint8))
        assert len(list(read_video(tmp_path / "x.mp4"))) == count


def test_frames_without_pixels_and_pieces_without_frames(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4") as clip:
        clip.write(gradient(0))
        clip.write(gradient(2))
        clip.write(gradient(0))
        with pytest.raises(DataError, match="frames of 0x64 have no pixels"):
            clip.write(gradient(1, 0, 64))
    assert len(list(read_video(tmp_path / "x.mp4"))) == 2
    for dtype in (torch.uint8, torch.float16):
        save_array(tmp_path / "x.pt", torch.zeros(2, 3, 0, 5, dtype=dtype))
        with pytest.raises(DataError, match=r"x\.pt: has no frames, its shape is \[2, 3, 0, 5\]"):
            next(frame_batches(tmp_path / "x.pt", channels=3, size=(4, 4), batch_size=2, resize=True))


def test_unreadable_clips(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"this is not a clip" * 50)
    with pytest.raises(DataError, match=r"noise\.mp4: cannot be read as video at frame 0: Invalid data found"):
        list(read_video(tmp_path / "noise.mp4"))
    with pytest.raises(DataError, match="no such file"):
        list(read_video(tmp_path / "none.mp4"))


def test_batches_from_clips_pictures_and_arrays(tmp_path: Path) -> None:
    from PIL import Image

    frames = gradient(5)
    with VideoWriter(tmp_path / "a.mp4") as clip:
        clip.write(frames)
    (tmp_path / "pictures").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(tmp_path / "pictures" / f"{i:03}.png")
    torch.save(frames.permute(0, 3, 1, 2).contiguous(), tmp_path / "a.pt")
    with open_sink(tmp_path / "decoded.npy", shape=(1, 5), fps=1) as sink:
        sink.write(frames)
    results = {}
    for name in ("a.mp4", "pictures", "a.pt", "decoded.npy"):
        batches = list(frame_batches(tmp_path / name, channels=3, size=(36, 64), batch_size=2))
        assert [len(b) for b in batches] == [2, 2, 1]
        results[name] = torch.cat(batches)
    assert torch.allclose(results["pictures"], results["a.pt"])
    assert torch.equal(results["decoded.npy"], results["a.pt"])
    assert (results["a.mp4"] - results["a.pt"]).abs().mean() < 0.03
    both = torch.cat(
        list(frame_batches(tmp_path / "a.mp4", channels=4, size=(36, 64), batch_size=8, depth=tmp_path / "pictures"))
    )
    assert torch.allclose(both[:, 3], results["pictures"].mean(dim=1), atol=1e-5)


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4") as clip:
        clip.write(gradient(3))
    with VideoWriter(tmp_path / "short.mp4") as clip:
        clip.write(gradient(2))
    (tmp_path / "none").mkdir()

    def batches(name: str, channels: int = 3, size: tuple[int, int] = (36, 64), **more: object) -> list[torch.Tensor]:
        return list(frame_batches(tmp_path / name, channels=channels, size=size, batch_size=2, **more))

    for kwargs, message in (
        ({"name": "a.mp4", "channels": 4}, "takes 4 channels, frame 0 has 3; give the depth clip"),
        ({"name": "a.mp4", "size": (72, 128)}, "takes 72x128, frame 0 is 36x64; --resize"),
        ({"name": "a.mp4", "channels": 4, "depth": tmp_path / "short.mp4"}, "short.mp4: ends at frame 2"),
        ({"name": "none"}, "no pictures"),
        ({"name": "x.doc"}, "must be a folder"),
    ):
        with pytest.raises(DataError, match=message):
            batches(**kwargs)  # type: ignore[arg-type]
    assert batches("a.mp4", size=(72, 128), resize=True)[0].shape == (2, 3, 72, 128)
