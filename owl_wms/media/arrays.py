"""Latents and frames as array files: `.pt`, `.npy` and `.safetensors`, read without running code from them.

Why one reader: whatever is wrong with a file (missing, truncated, pickled code, an odd rank, not-a-number) is found
here, once, before a decoder is built.

Usage:
    latents = load_latents("clip.pt")          # [b, n, c, h, w]
    save_array("clip.safetensors", tensor)
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from owl_wms.errors import DataError
from owl_wms.media.whole import why_unwritten, written_whole
from owl_wms.vae.weight_files import not_from_torch

ARRAY_SUFFIXES = (".pt", ".npy", ".safetensors")
KEY = "latents"  # of a file that holds several tensors, the one that is meant


def load_array(path: Path | str, *, mapped: bool = False) -> Tensor:
    """The tensor in a file, on the CPU, as stored.

    A `.pt` or `.safetensors` file may hold several tensors if one of them is called `latents`.

    Args:
        path: the file.
        mapped: leave the values in the file until they are used. They are read-only, and change when the file does.

    Raises:
        DataError: missing, unreadable or truncated file, unknown ending, pickled objects, no single tensor.
    """
    return _single(read_arrays(path, mapped=mapped), Path(path))


def read_arrays(path: Path | str, *, mapped: bool = False) -> Any:
    """What a file holds, on the CPU, as stored: a tensor, or a mapping that has tensors in it; `mapped` as above.

    Raises:
        DataError: missing, unreadable or truncated file, unknown ending, pickled objects.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path}: the ending must be one of {', '.join(ARRAY_SUFFIXES)}, got {suffix!r}", path=path)
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, a file is wanted' if path.is_dir() else 'no such file'}", path=path)
    try:
        if suffix == ".pt":
            with (
                warnings.catch_warnings()
            ):  # a damaged file is one error below, not also a remark on its pickle protocol
                warnings.simplefilter("ignore", UserWarning)
                # Only torch's own zip archives can be mapped, which it made the default in version 1.6.
                mapped = mapped and zipfile.is_zipfile(path)
                value: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        elif suffix == ".npy":
            # Mapped first: a header that claims more than the file holds fails here instead of allocating it.
            array = np.load(path, allow_pickle=False, mmap_mode="r")
            with warnings.catch_warnings():  # that it is read-only
                warnings.simplefilter("ignore", UserWarning)
                value = torch.from_numpy(array if mapped else np.array(array))
        else:
            value = load_file(path)
    except Exception as error:  # damaged bytes lead numpy and torch to raise almost anything (TokenError, SyntaxError)
        raise DataError(f"{path}: {_why_unreadable(path, suffix, error)}", path=path) from error
    return value


def _why_unreadable(path: Path, suffix: str, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"cannot be read: {error.strerror}"
    foreign = not_from_torch(path) if suffix == ".pt" else None
    if isinstance(error, pickle.UnpicklingError) and foreign is None:
        return "holds more than tensors (or is damaged), and pickled code is not run; save the tensor alone"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if foreign is not None:
        reason = foreign
    elif path.stat().st_size == 0:
        reason = "it is empty"
    elif _lacks_its_end(path):
        reason = "the file is truncated; copy or write it again"
    elif isinstance(error, LookupError):  # its text is a key alone
        reason = f"the file is damaged ({type(error).__name__}: {reason})"
    return f"cannot be read as {suffix}: {reason}"


def _lacks_its_end(path: Path) -> bool:
    """Whether a zip archive, as torch writes, breaks off before its directory, which stands last.

    torch then says "[Errno 22] Invalid argument" or speaks of its archive reader, according to where it breaks off.
    """
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\x03\x04"
    try:
        return begins and not zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it has a directory, a damaged one
        return False


def _single(value: Any, path: Path) -> Tensor:
    if isinstance(value, Mapping):
        tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
        if KEY in tensors:
            return tensors[KEY]
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        names = ", ".join(map(str, list(value)[:6])) or "nothing"
        raise DataError(f"{path}: needs one tensor, or one called {KEY!r}; it holds {names}", path=path)
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: needs a tensor, it holds a {type(value).__name__}", path=path)
    return value


def load_latents(path: Path | str, channels: int | None = None) -> Tensor:
    """Latents of a file as float [b, n, c, h, w]; ranks 3 and 4 count as one frame and one clip.

    Args:
        path: see `load_array`.
        channels: what the decoder takes, when that is known.

    Raises:
        DataError: as `load_array`, or another rank, no frames, integers, other channels, or values that are not finite.
    """
    latents = as_clips(load_array(path), path, channels)
    check_finite(latents.flatten(0, 1), path)
    return latents


def as_clips(latents: Tensor, path: Path | str, channels: int | None = None) -> Tensor:
    """Returns the latents of a file as [b, n, c, h, w]; arguments as in `load_latents`, values are not looked at.

    Raises:
        DataError: as there.
    """
    shape = list(latents.shape)
    if not latents.is_floating_point():
        raise DataError(f"{path}: latents must be floating point, got {latents.dtype}", path=path)
    if latents.dim() not in (3, 4, 5):
        raise DataError(f"{path}: latents must be [b, n, c, h, w], [n, c, h, w] or [c, h, w], got {shape}", path=path)
    while latents.dim() < 5:
        latents = latents[None]
    if latents.numel() == 0:
        raise DataError(f"{path}: has no frames, its shape is {shape}", path=path)
    if channels is not None and latents.shape[2] != channels:
        raise DataError(
            f"{path}: the decoder takes {channels} latent channels, got {latents.shape[2]} in {shape}", path=path
        )
    return latents


def check_finite(frames: Tensor, path: Path | str, first: int = 0) -> None:
    """Raises DataError if a value of `[k, c, h, w]`, the frames of a file from `first` on, is not finite."""
    finite = frames.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        index = first + int((~finite).int().argmax())
        raise DataError(f"{path}: frame {index} has values that are not finite", path=path, index=index)


def save_array(path: Path | str, tensor: Tensor | Mapping[str, Tensor]) -> None:
    """Write one tensor, or several by name, in the form that the path's ending says; folders are made.

    Raises:
        DataError: unknown ending, several tensors for `.npy`, or the path cannot be written; what stood there
            then stays as it was.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path}: the ending must be one of {', '.join(ARRAY_SUFFIXES)}, got {suffix!r}", path=path)
    named = {KEY: tensor} if isinstance(tensor, Tensor) else tensor
    stored = {name: value.detach().contiguous().cpu() for name, value in named.items()}
    if suffix == ".npy" and len(stored) != 1:
        raise DataError(f"{path}: .npy holds one tensor, got {', '.join(stored)}", path=path)
    try:
        with written_whole(path) as draft:
            if suffix == ".pt":
                torch.save(stored[KEY] if isinstance(tensor, Tensor) else stored, draft)
            elif suffix == ".npy":
                (only,) = stored.values()
                with draft.open("wb") as file:  # given a name, numpy would add to one that ends in .NPY
                    np.save(file, only.float().numpy() if only.dtype == torch.bfloat16 else only.numpy())
            else:
                save_file(stored, draft)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError for a missing folder
        raise DataError(f"{path}: cannot be written: {why_unwritten(error)}", path=path) from error
