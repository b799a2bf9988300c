"""Reads folders of pictures as viewers show them: turned upright, all 16 bits, in sRGB, in the order of their numbers.

Why: a library's decoded bytes are not yet the picture. A camera stores it lying down and says so in EXIF, a depth map
of 16 bits becomes white when it is cut to 8, `frame_10` sorts before `frame_2` as text, and a memory stick from a Mac
has a `._frame_0.png` beside each picture. What cannot be read without a guess (transparency, an animation) is refused.

Usage:
    for path in picture_files(Path("frames")):
        frame = read_picture(path)      # float32 [3, H, W] in [-1, 1]
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.files import one_line, open_regular, read_exactly, size_of
from owl_wms.interrupts import raise_interrupt

_log = logging.getLogger(__name__)
_DECIMAL = re.compile(r"\d+(?:\.\d+)?")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OTHER_SUFFIXES = (".tif", ".tiff", ".heic", ".heif", ".avif", ".gif", ".exr", ".ppm", ".pgm", ".tga", ".jp2", ".jfif")
MAX_PIXELS = 1 << 27
"""Largest picture or video frame that is decoded: 134 million pixels, 1.6 GB as float32 colours."""

_SRGB_GAMMA = 0.45455  # as PNG writes it (PNG specification, gAMA)
# Transfer characteristics of ITU-T H.273 that are shown as sRGB is: BT.709, BT.601, sRGB, BT.2020 (10 and 12 bits).
_USUAL_TRANSFERS = (b"\x01", b"\x06", b"\x0d", b"\x0e", b"\x0f")
_MOST_BYTES = 768  # a palette of 256 colours
_TRANSPARENT = "it is transparent in places; lay it on a background first"
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of `PICTURE_SUFFIXES`; Pillow would run a program for an EPS of any ending
_ANIMATED = ("PNG", "WEBP")  # a phone's JPEG may have further pictures (MPO), of which the first is the picture


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures of a folder, in the order of the numbers in their names.

    Hidden files (`._x.png`, `.DS_Store`), folders and other endings are passed over. A warning says so of pictures with
    other endings, and that names of several patterns (`left_1`, `right_1`) are read one pattern after the other.

    Raises:
        DataError: none, a folder that cannot be read, or two pictures of one name with different endings.
    """
    try:
        found = list(folder.iterdir())
    except (OSError, ValueError) as error:  # a NUL in the name
        raise DataError(f"{folder}: cannot be read: {getattr(error, 'strerror', error)}", path=folder) from error
    entries = [path for path in found if path.suffix.lower() in PICTURE_SUFFIXES]
    files = sorted((path for path in entries if path.name[0] != "." and not path.is_dir()), key=natural_order)
    if not files:
        raise DataError(f"{folder}: no pictures ({', '.join(PICTURE_SUFFIXES)}) in this folder", path=folder)
    stems: dict[str, Path] = {}
    for path in files:
        other = stems.setdefault(path.stem, path)
        if other is not path:
            text = f"{other.name} and {path.name} are two pictures of one name; which of them is the frame?"
            raise DataError(f"{folder}: {text}", path=folder)
    others = [path.name for path in found if path.suffix.lower() in _OTHER_SUFFIXES and path.name[0] != "."]
    if others:
        text = "%s: pictures of other forms are passed over (%d, such as %s); convert them"
        _log.warning(text, folder, len(others), min(others))
    _tell_order(folder, files)
    return files


def _tell_order(folder: Path, files: list[Path]) -> None:
    """Warn where an order by the whole numbers in names may not be the one that is meant."""
    patterns = list(dict.fromkeys(re.sub(r"\d+", "#", path.stem.casefold()) for path in files))
    if 1 < len(patterns) < len(files):
        _log.warning("%s: holds pictures named %s, read in this order", folder, " and ".join(patterns[:3]))
    if len(patterns) > 1 or "#.#" not in patterns[0]:
        return
    by_size = sorted(files, key=lambda path: list(map(float, _DECIMAL.findall(path.stem))))
    other_order = next((pair for pair in zip(files, by_size, strict=True) if pair[0] != pair[1]), None)
    if other_order is not None:
        text = "%s: %s is read before %s; if the numbers are decimals, give the frames whole ones"
        _log.warning(text, folder, *(path.name for path in other_order))


def natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """Return a key that sorts names by the numbers in them: `frame_2` before `frame_10`; the name decides a tie."""
    pieces = re.split(r"(\d+)", path.name.casefold())
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece], path.name


def read_picture(path: Path) -> Tensor:
    """Read one picture as float32 [3, H, W] in [-1, 1], upright, in sRGB.

    Raises:
        DataError: no picture, more than `MAX_PIXELS`, an animation, a pixel that is not opaque, or a colour profile
            that cannot be applied.
    """
    try:
        # Of its size Pillow warns at 89 million pixels and fails at twice that; the bound here is between the two.
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as picture:
                if picture.format == "JPEG":
                    _require_blocks(file, picture.width * picture.height)
                return _decode(picture, _png_chunks(file) if picture.format == "PNG" else None)
    except Exception as error:  # damaged bytes lead Pillow's parsers to raise almost anything
        raise_interrupt(error)
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        reason = reason.split(" <_io.")[0]
        raise DataError(f"{path}: cannot be read as a picture: {reason}", path=path) from error


def _require_blocks(file: BufferedReader, pixels: int) -> None:
    """Raises ValueError for a JPEG whose file is too short for its size: Pillow's decoder fills up with grey.

    Huffman codes have a bit at least, and there is one for every 8x8 pixels (ITU-T T.81, F.1 and G.1). Arithmetic ones
    (SOF9, SOF10) may have less.
    """
    size = size_of(file)
    head = bytes(read_exactly(file, min(size, 1 << 16)))
    if size * 8 * 64 < pixels and b"\xff\xc9" not in head and b"\xff\xca" not in head:
        raise ValueError(f"it is truncated or damaged: {size} bytes are too few for {pixels} pixels")


def _png_chunks(file: BinaryIO) -> dict[bytes, bytes]:
    """Returns the short chunks that stand before the pixels of a PNG, and an empty text for each long one."""
    place, chunks = file.tell(), {}
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        size = int.from_bytes(head[:4], "big")
        chunks[head[4:]] = file.read(size) if size <= _MOST_BYTES else b""
        file.seek(4 + (size if size > _MOST_BYTES else 0), os.SEEK_CUR)
    file.seek(place)
    return chunks


def _decode(picture: Image.Image, chunks: dict[bytes, bytes] | None) -> Tensor:
    """Decodes a picture; `chunks` of a PNG are what Pillow passes over."""
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} are more than {MAX_PIXELS} pixels")
    if picture.format in _ANIMATED and getattr(picture, "n_frames", 1) > 1:
        raise ValueError("it is an animation; give the frames as files, or a clip")
    profile, gamma = picture.info.get("icc_profile"), picture.info.get("gamma")
    if gamma and not profile and "srgb" not in picture.info and abs(gamma - _SRGB_GAMMA) > 0.01:
        raise ValueError(f"its gamma is {gamma:g}, that of sRGB is {_SRGB_GAMMA}; convert it to sRGB first")
    coded = None if chunks is None else chunks.get(b"cICP")
    if coded is not None and not (coded[:1] == b"\1" and coded[1:2] in _USUAL_TRANSFERS and coded[2:] == b"\0\1"):
        raise ValueError(f"its colours are not those of sRGB (cICP {list(coded)}); convert it to sRGB first")
    upright: Image.Image = ImageOps.exif_transpose(picture)
    if chunks is not None and upright.mode == "P":
        colours = len(chunks.get(b"PLTE", b"")) // 3
        if np.array(upright).max() >= colours:
            raise ValueError(f"it has pixels of a colour that its palette of {colours} lacks")
    if upright.mode in _SIXTEEN_BITS:
        grey = np.array(upright).astype(np.float32)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its grey values leave the 16 bits of a picture")
        if (grey == upright.info.get("transparency")).any():
            raise ValueError(_TRANSPARENT)
        return torch.from_numpy(grey / 32767.5 - 1).expand(3, -1, -1)
    if upright.has_transparency_data:
        alpha = np.array(upright.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            raise ValueError(_TRANSPARENT)
    return torch.from_numpy(np.array(_in_srgb(upright, profile))).permute(2, 0, 1).float() / 127.5 - 1


def _in_srgb(picture: Image.Image, profile: Any) -> Image.Image:
    opaque = picture if picture.mode == "CMYK" else picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    if not profile:
        return opaque.convert("RGB")
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(given).lower():
            return opaque.convert("RGB")
        if opaque.mode == "L" and given.profile.xcolor_space.strip() != "GRAY":  # a colour profile says nothing of grey
            return opaque.convert("RGB")
        changed = ImageCms.profileToProfile(opaque, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ValueError(f"its colour profile cannot be applied: {error}") from error
    assert changed is not None
    return changed
