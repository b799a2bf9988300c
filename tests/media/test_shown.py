"""Pictures and clips are read as viewers and players show them."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from owl_wms.errors import DataError
from owl_wms.media.facts import Facts
from owl_wms.media.frames import frame_batches
from owl_wms.media.read_facts import read_facts
from owl_wms.media.stills import picture_files, read_picture
from owl_wms.media.video import VideoWriter, read_video
from tests.media.test_video import gradient
from tests.only_ours import read_or_refuse

CORNER = np.zeros((8, 16, 3), np.uint8)
CORNER[:4, :4] = (255, 0, 0)
CORNER[4:, 12:] = (0, 0, 255)


def frames_of(folder: Path, size: tuple[int, int], **more: Any) -> torch.Tensor:
    return torch.cat(list(frame_batches(folder, channels=3, size=size, batch_size=4, **more)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_every_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {"lossless": True}
    Image.fromarray(CORNER).save(tmp_path / f"x{suffix}", exif=exif, **options)
    turns = {
        1: CORNER, 2: CORNER[:, ::-1], 3: CORNER[::-1, ::-1], 4: CORNER[::-1], 5: CORNER.transpose(1, 0, 2),
        6: np.rot90(CORNER, -1), 7: CORNER.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(CORNER),
    }  # fmt: skip
    shown = turns[orientation].transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(read_picture(tmp_path / f"x{suffix}").numpy() - shown).max() < 0.1


def test_sixteen_bits_keep_their_steps(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "0.png")
    assert np.abs(read_picture(tmp_path / "0.png")[1].numpy() - (ramp / 32767.5 - 1)).max() < 1e-4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_modes(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, 0))
    grey.convert(mode).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png")[0, 0].tolist() == [-1, 1]


def test_colours_of_a_profile(tmp_path: Path) -> None:
    """A profile whose numbers mean other colours is applied; sRGB's own changes nothing."""
    picture = Image.new("RGB", (4, 4), (200, 100, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "a.png", icc_profile=srgb)
    assert torch.allclose(read_picture(tmp_path / "a.png")[:, 0, 0], torch.tensor([200, 100, 50]) / 127.5 - 1)
    picture.save(tmp_path / "b.png", icc_profile=b"no profile")
    with pytest.raises(DataError, match="colour profile"):
        read_picture(tmp_path / "b.png")


def test_pictures_that_need_a_guess_are_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "alpha.png")
    frames = [Image.new("RGB", (4, 4), (i * 100,) * 3) for i in range(3)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "none.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    bomb = whole.read_bytes()
    (tmp_path / "bomb.png").write_bytes(bomb[:16] + struct.pack(">II", 60_000, 60_000) + bomb[24:])
    for name, words in {
        "alpha.png": "transparent", "moving.webp": "animation", "moving.png": "animation", "text.png": "identify",
        "none.png": "identify", "pipe.png": "named pipe", "cut.png": "truncated|picture", "bomb.png": "picture",
        "nowhere.png": "No such file",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words) as caught:
            read_picture(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


def test_pictures_of_several_patterns_and_of_other_forms_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("left_1.png", "left_2.png"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        assert len(picture_files(tmp_path)) == 2
    assert not caplog.records
    for name in ("right_1.png", "photo.HEIC", "._photo.tif"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        assert len(picture_files(tmp_path)) == 3
    assert "pictures of other forms are passed over (1, such as photo.HEIC); convert them" in caplog.text
    assert "holds pictures named left_# and right_#, read in this order" in caplog.text


def test_decimals_in_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("t_0.25.png", "t_0.5.png", "t_1.0.png"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in picture_files(tmp_path)] == ["t_0.5.png", "t_0.25.png", "t_1.0.png"]
    assert "t_0.5.png is read before t_0.25.png; if the numbers are decimals" in caplog.text
    caplog.clear()
    (tmp_path / "words").mkdir()
    for name in ("a_2.png", "b_1.png", "c.png"):
        (tmp_path / "words" / name).touch()
    assert len(picture_files(tmp_path / "words")) == 3
    assert not caplog.records


def test_the_order_of_numbers_and_what_is_passed_over(tmp_path: Path) -> None:
    names = ["f_2.png", "f_10.PNG", "f_1.jpg", "f_3b10.png", "f_3b9.png", "F_4.png", "f_0011.png", "g.png"]
    for name in names:
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    for name in ("._f_1.jpg", ".hidden.png", "Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "folder.png").mkdir()
    wanted = ["f_1.jpg", "f_2.png", "f_3b9.png", "f_3b10.png", "F_4.png", "f_10.PNG", "f_0011.png", "g.png"]
    assert [path.name for path in picture_files(tmp_path)] == wanted
    Image.new("RGB", (2, 2)).save(tmp_path / "f_1.png")
    with pytest.raises(DataError, match="two pictures of one name"):
        picture_files(tmp_path)


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write a display matrix into an .mp4's track header."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    raw[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("matrix", "quarters", "mirrored"),
    [((1, 0, 0, 1), 0, False), ((0, 1, -1, 0), -1, False), ((-1, 0, 0, -1), 2, False), ((0, -1, 1, 0), 1, False),
     ((-1, 0, 0, 1), 0, True), ((1, 0, 0, -1), 2, True), ((0, 1, 1, 0), 1, True), ((0, -1, -1, 0), -1, True)],
)  # fmt: skip
def test_display_matrices(tmp_path: Path, matrix: tuple[int, ...], quarters: int, mirrored: bool) -> None:
    """A player mirrors, then turns; the eight cases against numpy's own turns."""
    path = tmp_path / "x.mp4"
    picture = np.kron(CORNER, np.ones((8, 8, 1), np.uint8))
    with VideoWriter(path) as clip:
        clip.write(torch.from_numpy(picture).expand(2, -1, -1, -1))
    with_matrix(path, *matrix)
    shown = np.rot90(picture[:, ::-1] if mirrored else picture, quarters)
    for frame in read_video(path):
        assert frame.shape == shown.shape
        assert np.abs(frame.numpy().astype(int) - shown.astype(int)).mean() < 10
    with av.open(str(path)) as container:  # FFmpeg's own number for the turn, counted against the clock
        turn = next(container.decode(video=0)).rotation
    assert mirrored or turn % 360 == quarters * 90 % 360


def test_a_turn_by_less_than_a_quarter_is_refused(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "x.mp4") as clip:
        clip.write(gradient(1))
    with_matrix(tmp_path / "x.mp4", 2, 0, 0, 1)
    with pytest.raises(DataError, match="display matrix"):
        list(read_video(tmp_path / "x.mp4"))


def encoded(path: Path, picture: np.ndarray, *, aspect: Fraction | None = None, **tags: int) -> None:
    """A clip of one colour as another program writes it; `tags` of the stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "1"}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        spaces = av.video.reformatter.Colorspace
        space = spaces.ITU709 if tags.get("colorspace", 2 if picture.shape[0] < 720 else 1) == 1 else spaces.ITU601
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p", dst_colorspace=space)
        for name, value in tags.items():
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("primaries", "transfer"), [(9, 14), (9, 1), (10, 1), (11, 17), (12, 13), (1, 8), (1, 9), (1, 10)]
)
def test_colours_of_other_screens_are_refused(tmp_path: Path, primaries: int, transfer: int) -> None:
    encoded(tmp_path / "x.mp4", np.zeros((32, 64, 3), np.uint8), color_primaries=primaries, color_trc=transfer)
    with pytest.raises(
        DataError, match=rf"primaries {primaries}, transfer {transfer} of H\.273\); convert it to BT.709"
    ):
        next(read_video(tmp_path / "x.mp4"))


@pytest.mark.parametrize("primaries", [2, 4, 5, 6, 7])
def test_colours_of_older_screens_are_read(tmp_path: Path, primaries: int) -> None:
    encoded(tmp_path / "x.mp4", np.full((64, 64, 3), 90, np.uint8), color_primaries=primaries, color_trc=6)
    assert abs(float(next(read_video(tmp_path / "x.mp4")).float().mean()) - 90) < 3


@pytest.mark.parametrize("lines", [64, 720])
@pytest.mark.parametrize("tags", [{}, {"colorspace": 1}, {"colorspace": 5}, {"colorspace": 6}])
def test_colours_by_tag_or_as_players_suppose(tmp_path: Path, lines: int, tags: dict[str, int]) -> None:
    colour = np.array([200, 30, 60], np.uint8)
    encoded(tmp_path / "x.mp4", np.tile(colour, (lines, 64, 1)), **tags)
    (frame,) = read_video(tmp_path / "x.mp4")
    assert np.abs(frame[lines // 2, 32].numpy().astype(int) - colour).max() <= 4


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    encoded(tmp_path / "x.mp4", np.zeros((32, 64, 3), np.uint8), aspect=Fraction(3, 2))
    assert [frame.shape for frame in read_video(tmp_path / "x.mp4")] == [(32, 96, 3)]


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_refused(tmp_path: Path, transfer: int) -> None:
    encoded(tmp_path / "x.mp4", np.zeros((32, 64, 3), np.uint8), color_trc=transfer)
    with pytest.raises(DataError, match="HDR"):
        list(read_video(tmp_path / "x.mp4"))


def test_written_clips_name_their_colours_and_facts(tmp_path: Path) -> None:
    facts = Facts(fps=12, vae_scale=0.5, layout="n c h w")
    with VideoWriter(tmp_path / "x.mp4", 12, facts=facts) as clip:
        clip.write(gradient(3))
    with av.open(str(tmp_path / "x.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = [context.colorspace, context.color_primaries, context.color_trc, context.color_range]
    assert [int(tag) for tag in tags] == [1, 1, 1, 1]
    assert read_facts(tmp_path / "x.mp4") == facts


@pytest.mark.parametrize(
    "name",
    ["10:30:05.mp4", "file:c.mp4", "http:x.mp4", "concat:a|b.mp4", "a b.mp4", "%03d.mp4", "größe.mp4", "-x.mp4",
     "a,b.mp4",
     "x.MP4", "[0].mp4", "x" * 251 + ".mp4", "~.mp4", "$HOME.mp4", "crypto:k.mp4", "a\nb.mp4"],
)  # fmt: skip
def test_any_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with VideoWriter(name) as clip:
        clip.write(gradient(2))
    assert len(list(read_video(name))) == 2
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_is_too_long_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="File name too long"), VideoWriter(tmp_path / ("x" * 252 + ".mp4")) as clip:
        clip.write(gradient(2))


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{0}\n", "ffconcat version 1.0\nfile {0}\n", "just text"],
    ids=["playlist", "concat", "text"],
)
def test_a_list_of_other_files_is_no_clip(tmp_path: Path, text: str) -> None:
    with VideoWriter(tmp_path / "real.mp4") as clip:
        clip.write(gradient(2))
    (tmp_path / "x.mp4").write_text(text.format(tmp_path / "real.mp4"))
    with pytest.raises(DataError, match=r"x\.mp4: cannot be read as video"):
        list(read_video(tmp_path / "x.mp4"))


@given(st.binary(max_size=60), st.integers(0, 10_000), st.integers(0, 40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_our_own_errors_for_damaged_clips_and_pictures(tmp_path: Path, put: bytes, at: int, cut: int) -> None:
    if not (tmp_path / "good.mp4").exists():
        with VideoWriter(tmp_path / "good.mp4", facts=Facts(fps=3.0)) as clip:
            clip.write(gradient(3))
        Image.fromarray(gradient(1)[0].numpy()).save(tmp_path / "good.png")
        Image.fromarray(gradient(1)[0].numpy()).save(tmp_path / "good.jpg")
    for suffix in (".mp4", ".png", ".jpg"):
        raw = (tmp_path / f"good{suffix}").read_bytes()
        start = at % len(raw)
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(raw[:start] + put + raw[start + cut :])
        for read in (read_facts, lambda path: list(read_video(path))) if suffix == ".mp4" else (read_picture,):
            read_or_refuse(read, path)  # type: ignore[arg-type]


def test_a_folder_whose_name_is_none_is_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be read: .*embedded null (byte|character)"):
        picture_files(Path("a\0b"))


def png(path: Path, depth: int, kind: int, row: bytes, **chunks: bytes) -> Path:
    """A PNG of one row of two pixels, of this bit depth and colour type, with further chunks before it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("coded", [(1, 13, 0, 1), (1, 1, 0, 1)])
def test_usual_colours_by_their_codes(tmp_path: Path, coded: tuple[int, ...]) -> None:
    frame = read_picture(
        png(tmp_path / "x.png", 8, 2, bytes([255, 128, 0] * 2), tEXt=b"a\0" + b"b" * 5000, cICP=bytes(coded))
    )
    assert ((frame[:, 0, 1] + 1) * 127.5).round().tolist() == [255, 128, 0]


@pytest.mark.parametrize("coded", [(9, 16, 0, 1), (9, 18, 0, 1), (12, 13, 0, 1), (1, 8, 0, 1), (1, 13, 0, 0), (1,)])
def test_colours_of_hdr_and_other_screens_are_refused(tmp_path: Path, coded: tuple[int, ...]) -> None:
    path = png(tmp_path / "x.png", 8, 2, bytes(6), sRGB=b"\0", cICP=bytes(coded))
    with pytest.raises(DataError, match=r"not those of sRGB \(cICP .*convert it to sRGB first"):
        read_picture(path)


@pytest.mark.parametrize(("row", "palette", "right"), [(b"\0\1", 2, True), (b"\0\2", 2, False), (b"\0\0", 0, False)])
def test_a_palette_that_lacks_colours_is_refused(tmp_path: Path, row: bytes, palette: int, right: bool) -> None:
    chunks = {"PLTE": bytes(range(200, 200 + 3 * palette))} if palette else {}
    path = png(tmp_path / "x.png", 8, 3, row, **chunks)
    if right:
        assert ((read_picture(path)[:, 0, 1] + 1) * 127.5).round().tolist() == [203, 204, 205]
        return
    with pytest.raises(DataError, match="of a colour that its palette of"):
        read_picture(path)


def test_a_jpeg_too_short_for_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("L", (2048, 2048), 90).save(path, quality=1, optimize=True, progressive=True)  # of the fewest bits
    assert path.stat().st_size < 2048 * 2048 // 128
    assert (read_picture(path) + 1).mean() * 127.5 == pytest.approx(90, abs=10)
    raw = path.read_bytes()
    path.write_bytes(raw[:600] + raw[-2:])
    with pytest.raises(DataError, match=r"truncated or damaged: 602 bytes are too few for 4194304 pixels"):
        read_picture(path)


@pytest.mark.parametrize(("gamma", "refused"), [(100000, True), (45455, False)])
def test_a_gamma_of_another_screen_is_refused(tmp_path: Path, gamma: int, refused: bool) -> None:
    facts = PngImagePlugin.PngInfo()
    facts.add(b"gAMA", gamma.to_bytes(4, "big"))
    Image.new("RGB", (4, 4), (120, 60, 30)).save(tmp_path / "x.png", pnginfo=facts)
    if refused:
        with pytest.raises(DataError, match=r"its gamma is 1, that of sRGB is 0\.45455"):
            read_picture(tmp_path / "x.png")
    else:
        assert read_picture(tmp_path / "x.png").shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("x.mp4", "libx264", {"movflags": "faststart"}),
        ("x.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("x.mov", "libx264", {}),
        ("x.mkv", "libx264", {}),
        ("x.webm", "libvpx", {}),
        ("x.avi", "mpeg4", {}),
    ],
)
def test_a_clip_that_breaks_off_is_an_error(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path, random = tmp_path / name, np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(40):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(list(read_video(path))) == 40
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) * 2 // 3, len(whole) // 3, 60, 9):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="x"):
            list(read_video(path))


@pytest.mark.parametrize("form", ["TIFF", "GIF", "ICO", "PPM"])
def test_other_forms_under_the_ending_of_a_picture_are_refused(tmp_path: Path, form: str) -> None:
    """Pillow would make black of a TIFF of numbers from 0 to 1, and run a program for PostScript."""
    picture = Image.fromarray(np.full((4, 4), 0.5, np.float32)) if form == "TIFF" else Image.new("RGB", (16, 16))
    picture.save(tmp_path / "x.png", format=form)
    with pytest.raises(DataError, match="cannot identify"):
        read_picture(tmp_path / "x.png")


def test_a_palette_has_the_colours_of_its_profile(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = bytearray(srgb)
    red, blue = tags.find(b"rXYZ", 128), tags.find(b"bXYZ", 128)
    tags[red : red + 4], tags[blue : blue + 4] = b"bXYZ", b"rXYZ"
    swapped = bytes(tags).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([200, 10, 10])
    picture.save(tmp_path / "x.png", icc_profile=swapped)
    assert ((read_picture(tmp_path / "x.png")[:, 0, 0] + 1) * 127.5).round().tolist() == [10, 10, 200]


def test_a_grey_value_of_sixteen_bits_may_be_transparent(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "x.png", transparency=0x80FF)
    with pytest.raises(DataError, match="transparent in places"):
        read_picture(tmp_path / "x.png")
    Image.fromarray(np.full((4, 4), 0x80FE, np.uint16)).save(tmp_path / "x.png", transparency=0x80FF)
    assert read_picture(tmp_path / "x.png").shape == (3, 4, 4)


@pytest.mark.parametrize("alpha", [255, 10])
def test_a_clip_that_is_transparent_is_refused(tmp_path: Path, alpha: int) -> None:
    with av.open(str(tmp_path / "x.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "rgba"
        pixels = np.full((8, 8, 4), (200, 30, 60, alpha), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
    if alpha == 255:
        (frame,) = read_video(tmp_path / "x.mov")
        assert frame[0, 0].tolist() == [200, 30, 60]
    else:
        with pytest.raises(DataError, match="transparent in places"):
            list(read_video(tmp_path / "x.mov"))


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
@pytest.mark.parametrize("alpha", [255, 10])
def test_alpha_that_lies_beside_the_frames_is_seen(tmp_path: Path, codec: str, alpha: int) -> None:
    """WebM has it in blocks of its own, which FFmpeg's decoders pass over."""
    with av.open(str(tmp_path / "x.webm"), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, "yuva420p", {"auto-alt-ref": "0"}
        for opacity in (255, alpha):
            pixels = np.full((64, 64, 4), (120, 120, 120, opacity), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="yuva420p")))
        container.mux(stream.encode())
    frames = read_video(tmp_path / "x.webm")
    assert abs(int(next(frames)[0, 0, 0]) - 120) < 3
    if alpha == 255:
        assert len(list(frames)) == 1
    else:
        with pytest.raises(DataError, match="frame 1: it is transparent in places"):
            list(frames)


def test_a_cover_before_the_video_is_not_the_clip(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for kind, count in ((cover, 1), (stream, 6)):
            for _ in range(count):
                pixels = np.full((kind.height, kind.width, 3), 90, np.uint8)
                container.mux(kind.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(kind.encode())
    assert [tuple(frame.shape) for frame in read_video(tmp_path / "x.mkv")] == [(48, 64, 3)] * 6
