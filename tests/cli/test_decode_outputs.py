"""What `owl-wms decode` writes: every form holds the decode function's bytes, whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from owl_wms import runtime
from owl_wms.configs import load_vae_config
from owl_wms.errors import DataError
from owl_wms.media import sinks, video
from owl_wms.media.latents import LatentFile
from owl_wms.media.video import read_video
from owl_wms.timing import Spent
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from owl_wms.vae import build_autoencoder
from tests.cli.runner import call


def bytes_of(place: Path, latents: str = "latents.pt") -> np.ndarray:
    """What the decode function gives: uint8 [b, n, H, W, C]."""
    source = LatentFile(place / latents)
    decoder = get_decoder_only(None, place / "vae.yml", place / "vae.safetensors", device="cpu", dtype=torch.float32)
    decode = make_batched_decode_fn(decoder.to(memory_format=torch.channels_last), 8, output="uint8")
    return decode(source.read(0, source.shape[0] * source.shape[1])[None]).reshape(*source.shape[:2], 36, 64, 4).numpy()


def command(place: Path, *more: str) -> list[str]:
    arguments = [str(place / "latents.pt"), "--vae-config", str(place / "vae.yml"), "--device", "cpu"]
    return [
        *(sys.executable, "-m", "owl_wms", "decode", *arguments),
        *("--checkpoint", str(place / "vae.safetensors"), *more),
    ]


def test_an_array_holds_the_bytes_of_the_decode_function(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "decode", "latents.pt", "--out", str(place / "a.npy")) == 0
    assert np.array_equal(np.load(place / "a.npy"), bytes_of(place))
    assert call(place, "decode", "latents.pt", "--out", str(place / "a.npy"), "--each") == 0
    for clip in range(2):
        assert np.array_equal(np.load(place / f"a_{clip}.npy"), bytes_of(place)[clip])
    torch.save(torch.randn(11, 16, 8, 8), place / "one.pt")
    capsys.readouterr()
    assert call(place, "decode", "one.pt", "--out", str(place / "one[red].npy"), "--batch-size", "3") == 0
    assert np.load(place / "one[red].npy").shape == (11, 36, 64, 4)
    assert "one[red].npy: 11 frames" in capsys.readouterr().err, "the name is no markup"
    assert [p.name for p in place.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(("form", "limit"), [("png", 0), ("jpg", 12)])
def test_pictures(place: Path, form: str, limit: float) -> None:
    out = place / "pictures"
    assert call(place, "decode", "latents.pt", "--out", str(out), "--format", form) == 0
    assert [p.name for p in sorted(out.iterdir())] == [f"{i:06}.{form}" for i in range(10)]
    want = bytes_of(place).reshape(10, 36, 64, 4)[..., :3]
    got = np.stack([np.array(Image.open(p)) for p in sorted(out.iterdir())])
    assert np.abs(got.astype(int) - want).mean() <= limit
    # An earlier decode is replaced when asked; what is no picture of ours never is.
    assert call(place, "decode", "latents.pt", "--out", str(out)) == 2
    assert call(place, "decode", "latents.pt", "--out", str(out), "--overwrite", "--format", "png") == 0
    assert {p.suffix for p in out.iterdir()} == {".png"}
    (out / "thesis.txt").write_text("kept")
    assert call(place, "decode", "latents.pt", "--out", str(out), "--overwrite") == 2
    assert (out / "thesis.txt").read_text() == "kept"


def test_the_folder_one_is_in_takes_pictures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    assert call(place, "decode", "latents.pt", "--out", ".") == 0
    assert len(list(Path().iterdir())) == 10
    assert call(place, "decode", "latents.pt", "--out", ".", "--each") == 0
    assert [len(list(Path(name).iterdir())) for name in ("_0", "_1")] == [5, 5]


def test_existing_outputs_are_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("o.mp4", "o_depth.mp4", "o_1.mp4", "s.png", "z.npy"):
        (place / name).write_text("kept")
    for arguments in (
        ("decode", "latents.pt", "--out", str(place / "o.mp4")),
        ("decode", "latents.pt", "--out", str(place / "o.mp4"), "--each"),
        ("decode", "latents.pt", "--out", str(place / "new.mp4"), "--png", str(place / "s.png")),
        ("encode", "clip.mp4", "--out", str(place / "z.npy")),
    ):
        capsys.readouterr()
        assert call(place, *arguments) == 2
        assert "exists; --overwrite replaces it" in capsys.readouterr().err.replace("\n", " ")
    assert {(place / name).read_text() for name in ("o.mp4", "o_1.mp4", "s.png", "z.npy")} == {"kept"}
    assert not (place / "new.mp4").exists()
    assert call(place, "decode", "latents.pt", "--out", str(place / "o.mp4"), "--overwrite", "--depth") == 0
    assert len(list(read_video(place / "o_depth.mp4"))) == 10


def test_a_file_that_is_read_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(place / "z.npy", np.zeros((2, 16, 8, 8), np.float32))
    (place / "link.npy").symlink_to("z.npy")
    weights = place / "vae.safetensors"
    before = {path: path.read_bytes() for path in (place / "z.npy", weights)}
    for arguments in (
        ("decode", "z.npy", "--out", str(place / "z.npy")),
        ("decode", "z.npy", "--out", str(place / "new" / ".." / "link.npy")),
        ("encode", "z.npy", "--out", str(place / "z.npy")),
        ("encode", "clip.mp4", "--depth", str(place / "depth.mp4"), "--out", str(weights)),
    ):
        capsys.readouterr()
        assert call(place, *arguments, "--overwrite") == 2, arguments
        assert "is a file that this command reads" in capsys.readouterr().err.replace("\n", " "), arguments
    assert {path: path.read_bytes() for path in before} == before


def test_names_and_forms_that_do_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--out", "x.gif"), "must end in .mp4"),
        (("--out", "x.png"), "pictures go to a folder"),
        (("--out", str(place)), "is no picture of an earlier decode"),
        (("--out", "."), "is no picture of an earlier decode"),
        (("--out", "x.mp4", "--format", "png"), "does not fit"),
        (("--out", "x", "--format", "bmp"), "--format must be one of"),
        (("--out", "x.npy", "--depth"), "--depth goes with a clip"),
        (("--out", "x.mp4", "--encoder", "mpeg1"), "--encoder must be"),
        (("--out", "x.mp4", "--preset", "p1"), "--preset of libx264"),
        (("--out", "x.mp4", "--crf", "99"), "--crf must be"),
    ):
        capsys.readouterr()
        assert call(place, "decode", "latents.pt", *arguments) == 2, arguments
        assert message in capsys.readouterr().err.replace("\n", " "), arguments


def test_pictures_take_three_channels_and_arrays_any_number(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "gray.yml").write_text((place / "vae.yml").read_text().replace("channels: 4\n", "channels: 1\n", 1))
    autoencoder = build_autoencoder(load_vae_config(place / "gray.yml").model, "tiled")
    save_file(autoencoder.state_dict(), place / "gray.safetensors")
    gray = {"config": "gray.yml", "weights": "gray.safetensors"}
    for more in (("x",), ("x.mp4",), ("x.y4m",), ("x.npy", "--png", str(place / "s.png"))):
        assert call(place, "decode", "latents.pt", "--out", str(place / more[0]), *more[1:], **gray) == 2
        assert "gray.yml: decodes 1 channel, a picture has red" in capsys.readouterr().err.replace("\n", " ")
        assert not (place / more[0]).exists()
    assert call(place, "decode", "latents.pt", "--out", str(place / "x.npy"), **gray) == 0
    assert np.load(place / "x.npy").shape == (2, 5, 36, 64, 1)


@pytest.mark.parametrize("encoder", ["libx264", "auto"])
def test_quality_and_preset_reach_the_encoder(place: Path, encoder: str) -> None:
    sizes = []
    for crf, preset in (("0", "ultrafast"), ("45", "slow")):
        out = place / f"{crf}.mp4"
        more = ("--out", str(out), "--crf", crf, "--preset", preset, "--encoder", encoder)
        assert call(place, "decode", "latents.pt", *more) == 0
        sizes.append(out.stat().st_size)
    assert sizes[0] > 3 * sizes[1]


class WithoutChip:
    """PyAV on a GPU that encodes no video, such as an H200: NVENC is there, and opening it fails."""

    def __init__(self, failure: Exception) -> None:
        context = SimpleNamespace(open=raising(failure))
        self.CodecContext = SimpleNamespace(create=lambda *_: context)

    def __getattr__(self, name: str) -> Any:
        return getattr(av, name)


def raising(failure: Exception) -> Any:
    def call() -> None:
        raise failure

    return call


@pytest.mark.parametrize("kind", [av.error.ExternalError, av.error.PermissionError, av.error.NotImplementedError])
def test_a_gpu_without_an_encoder_is_said_in_one_line(
    place: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video, "pyav", lambda _: WithoutChip(kind(1, "no capable devices found")))
    more = ("--out", str(place / "x.mp4"), "--encoder", "h264_nvenc")
    capsys.readouterr()
    assert call(place, "decode", "latents.pt", *more) == 2
    said = capsys.readouterr().err
    assert said == "error: --encoder h264_nvenc: cannot be opened on this machine; use libx264\n"
    assert not (place / "x.mp4").exists()
    assert video.choose_encoder("auto") == ("libx264", "veryfast")


def test_y4m_on_standard_output_is_read_back(place: Path) -> None:
    ran = subprocess.run(command(place, "--out", "-", "--fps", "24"), capture_output=True, check=True)
    with av.open(io.BytesIO(ran.stdout)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    want = bytes_of(place).reshape(10, 36, 64, 4)[..., :3]
    assert frames.shape == want.shape
    # Colour is stored for 2x2 pixels, so neighbours of noise mix; their brightness does not.
    assert abs(frames.mean(axis=(1, 2, 3)) - want.mean(axis=(1, 2, 3))).max() < 4
    assert b"10 frames" in ran.stderr
    assert b"decoded by" in ran.stderr


@pytest.mark.parametrize(("height", "matrix"), [(718, 5), (720, 1)])
def test_y4m_has_the_colours_that_readers_of_its_size_suppose(tmp_path: Path, height: int, matrix: int) -> None:
    """FFmpeg makes a clip without tags of it, and players take those of 720 lines and more for BT.709."""
    colour = torch.tensor([200, 30, 60], dtype=torch.uint8)
    with sinks.open_sink(tmp_path / "x.y4m", shape=(1, 1), fps=1) as sink:
        sink.write(colour.expand(1, height, 16, 3).contiguous())
    with av.open(str(tmp_path / "x.y4m")) as container:
        frame = next(container.decode(video=0)).reformat(format="rgb24", src_colorspace=matrix)
    assert abs(frame.to_ndarray()[height // 2, 8].astype(int) - colour.numpy()).max() <= 3


def test_raw_on_standard_output_is_the_bytes(place: Path) -> None:
    ran = subprocess.run(command(place, "--out", "-", "--format", "raw"), capture_output=True, check=True)
    assert ran.stdout == bytes_of(place).tobytes()


def test_a_pipe_that_closes_is_one_line(place: Path) -> None:
    for form in ("y4m", "raw"):
        child = subprocess.Popen(
            command(place, "--out", "-", "--format", form), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.close()
        error = child.stderr.read().decode() if child.stderr else ""
        assert child.wait(60) == 2
        assert "standard output: cannot be written: Broken pipe" in error.replace("\n", " ")
        assert "Traceback" not in error
        assert "Exception" not in error


def test_a_closed_standard_output_is_one_line(place: Path) -> None:
    ran = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command(place, "--out", "-")], stderr=subprocess.PIPE, check=False
    )
    assert (ran.returncode, ran.stderr) == (2, b"error: --out -: standard output is closed\n")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
def test_the_pipe_of_the_documentation(place: Path) -> None:
    out = place / "out.mkv"
    decoding = subprocess.Popen(command(place, "--out", "-"), stdout=subprocess.PIPE)
    subprocess.run(["ffmpeg", "-v", "error", "-i", "-", str(out)], stdin=decoding.stdout, check=True)
    assert decoding.wait(60) == 0
    assert len(list(read_video(out))) == 10


@pytest.mark.parametrize("name", ["o.mp4", "o.npy", "o.y4m", "folder"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_decode_leaves_no_half_file(place: Path, name: str, how: signal.Signals) -> None:
    torch.save(torch.randn(1, 20_000, 16, 8, 8), place / "latents.pt")
    child = subprocess.Popen(
        command(place, "--out", str(place / name)),
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    ending = time.monotonic() + 60
    while not any(p.name.startswith(f".{Path(name).stem}.") for p in place.iterdir()):  # its draft
        assert child.poll() is None
        assert time.monotonic() < ending
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(how)
    assert child.wait(60) != 0
    assert not (place / name).exists()
    drafts = [p.name for p in place.iterdir() if p.name.startswith(".")]
    assert drafts == [] or how == signal.SIGKILL


def limited(limit: int) -> Any:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_an_interrupt_removes_half_files_before_it_waits_for_the_decode(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def pieces(*_: Any, **__: Any) -> Iterator[torch.Tensor]:
        try:
            yield torch.zeros(1, 36, 64, 4, dtype=torch.uint8)
        finally:
            order.append("decode")

    class Interrupted(sinks.Sink):
        def write(self, frames: torch.Tensor) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None:
            order.append("file")

    monkeypatch.setattr(runtime, "decode_pieces", pieces)
    monkeypatch.setattr(sinks, "open_sink", lambda *_, **__: Interrupted())
    assert call(place, "decode", "latents.pt", "--out", str(place / "a.npy")) == 130
    assert order[0] == "file"


@pytest.mark.parametrize("name", ["o.npy", "o.y4m", "o.raw"])
def test_a_disk_that_fills_up(place: Path, name: str) -> None:
    """A limit on file sizes says EFBIG where a full disk says ENOSPC; both come in the middle of a write."""
    ran = subprocess.run(
        command(place, "--out", str(place / name)), capture_output=True, text=True, preexec_fn=limited(20_000)
    )
    assert ran.returncode == 2
    assert f"{name}: cannot be written: File too large" in ran.stderr.replace("\n", " ")
    assert "Traceback" not in ran.stderr
    assert [p.name for p in place.iterdir() if p.stem.strip(".").startswith("o")] == []


LARGE = """
import resource, sys, numpy as np, torch
from owl_wms.media.latents import LatentFile
from owl_wms.runtime import VideoDecode, decode_stream
from owl_wms.settings import TensorRTConfig
from tests.runtime.test_stream import Counting

torch.set_num_threads(1)
path = sys.argv[1]
decode = VideoDecode(Counting(), batch_size=8, settings=TensorRTConfig(enabled=False), output="uint8")
list(decode_stream(decode, torch.zeros(1, 40, 4, 32, 32)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# Neither mapped nor read whole: either would take as many addresses as the file has bytes.
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
count = total = 0
for frames in decode_stream(decode, LatentFile(path)):
    count, total = count + len(frames), total + int(frames[:, 0, 0, 0].sum())
print(count, total)
"""


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_a_file_larger_than_memory_decodes(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    latents = torch.ones(1, 24_576, 4, 32, 32)  # 384 MiB
    path = tmp_path / f"large{suffix}"
    if suffix == ".npy":
        np.save(path, latents.numpy())
    elif suffix == ".pt":
        torch.save(latents, path)
    else:
        save_file({"latents": latents}, path)
    del latents
    ran = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=False)
    assert ran.stdout == f"24576 {24576 * 255}\n", ran.stderr


def test_sinks_write_what_they_are_given_in_any_pieces(tmp_path: Path) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3 * 7, 4, 6, 3), dtype=np.uint8))
    for cut in (1, 4, 7, 10, 21):
        for each in (False, True):
            out, spent = tmp_path / f"{cut}{each}.npy", Spent()
            with sinks.open_sink(out, shape=(3, 7), fps=60, each=each, spent=spent) as sink:
                for part in frames.split(cut):
                    sink.write(part)
            got = [np.load(path) for path in sinks.outputs(out, 3, each)]
            assert np.array_equal(np.concatenate([g.reshape(-1, 4, 6, 3) for g in got]), frames.numpy())
            assert got[0].shape == ((7, 4, 6, 3) if each else (3, 7, 4, 6, 3))
            assert set(spent.seconds) == {"write"}


def write_all(sink: sinks.Sink, pieces: list[Any]) -> None:
    for piece in pieces:
        sink.write(piece)


def test_an_error_inside_leaves_what_stood_there(tmp_path: Path) -> None:
    frames = torch.zeros(4, 6, 8, 3, dtype=torch.uint8)
    for name in ("a.npy", "a.raw", "a.y4m", "a.mp4"):
        (tmp_path / name).write_text("kept")
        with pytest.raises(TypeError), sinks.open_sink(tmp_path / name, shape=(1, 9), fps=60) as sink:
            write_all(sink, [frames, None])
        assert (tmp_path / name).read_text() == "kept"
    assert len(os.listdir(tmp_path)) == 4


def test_a_folder_of_pictures_stays_itself_with_what_else_it_holds(tmp_path: Path) -> None:
    """It may be a mount, which cannot be renamed or removed; files may have come while the clip was decoded."""
    out = tmp_path / "pictures"
    out.mkdir()
    (out / ".DS_Store").write_text("kept")
    node = out.stat().st_ino
    for count in (3, 2):
        with sinks.open_sink(out, shape=(1, count), fps=60) as sink:
            sink.write(torch.full((count, 4, 6, 3), count, dtype=torch.uint8))
            (out / "thesis.txt").write_text("kept")
            assert [p.name for p in tmp_path.iterdir()] == ["pictures"], "nothing is written outside of it"
        found = {p.name for p in out.iterdir()}
        assert found == {".DS_Store", "thesis.txt", *(f"{i:06}.png" for i in range(count))}
        assert np.array(Image.open(out / "000001.png")).mean() == count
    assert out.stat().st_ino == node


@pytest.mark.parametrize("there", [True, False])
def test_pictures_that_cannot_be_put_in_place_are_not_thrown_away(
    tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pictures"
    if there:
        out.mkdir()

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path if there else os, "rename" if there else "replace", busy)
    text = "pictures: cannot be written: Device or resource busy; the pictures are in (.*)"
    with pytest.raises(DataError, match=text) as caught, sinks.open_sink(out, shape=(1, 2), fps=60) as sink:
        sink.write(torch.zeros(2, 4, 6, 3, dtype=torch.uint8))
    kept = Path(str(caught.value).rpartition(" are in ")[2])
    assert [p.name for p in sorted(kept.iterdir())] == ["000000.png", "000001.png"]
