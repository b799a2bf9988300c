"""Reads and writes latents and frames as `.pt`, `.npy` and `.safetensors`, without running code from them.

Why one reader: whatever is wrong with a file (missing, truncated, pickled code, an odd rank, not-a-number) is found
here, once, before a decoder is built.

Usage:
    latents = load_latents("clip.pt")          # [b, n, c, h, w]
    save_array("clip.safetensors", tensor)
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from owl_wms.errors import DataError, NonFiniteError
from owl_wms.files import at_home, false_claims, foreign_to_torch, one_line, open_regular, read_exactly, size_of
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.facts import MEMBER, METADATA_KEY, Facts
from owl_wms.media.npy import NpyFile
from owl_wms.vae.layouts import tensor_of
from owl_wms.vae.torch_files import load_torch
from owl_wms.whole import why_unwritten, written_whole

ARRAY_SUFFIXES = (".pt", ".npy", ".safetensors")
_LISTED = " or ".join((", ".join(ARRAY_SUFFIXES[:-1]), ARRAY_SUFFIXES[-1]))
KEY = "latents"  # of a file that holds several tensors, the one that is meant


def load_array(path: Path | str) -> Tensor:
    """Returns the tensor in a file, on the CPU, as stored.

    A `.pt` or `.safetensors` file may hold several tensors if one of them is called `latents`.

    Raises:
        DataError: missing, unreadable or truncated file, unknown ending, pickled objects, no single tensor.
    """
    return _single(read_arrays(path), Path(path))


def read_arrays(path: Path | str) -> Any:
    """Returns the value in a file, on the CPU, as stored: a tensor, or a mapping with tensors in it.

    The file is read whole: it may change or go afterwards.

    Raises:
        DataError: missing, unreadable or truncated file, unknown ending, pickled objects, compressed members, or a
            tensor that is not an ordinary one or claims more values than the file holds.
    """
    path = at_home(path)
    suffix = path.suffix.lower()
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder, a file is wanted: {_LISTED}", path=path)
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path}: the ending must be one of {_LISTED}, got {suffix or 'none'}", path=path)
    try:
        if suffix == ".npy":
            with NpyFile(path) as array:
                value: Any = torch.from_numpy(array.read())
        else:
            with open_regular(path) as file:
                if suffix == ".pt":
                    value = _load_torch(file)
                else:
                    value = load_bytes(bytes(read_exactly(file, size_of(file))))
        value = {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else _plain(value)
    except Exception as error:  # damaged bytes lead numpy and torch to raise almost anything (TokenError, SyntaxError)
        raise_interrupt(error)
        raise DataError(f"{path}: {_why_unreadable(path, suffix, error)}", path=path) from error
    return value


def load_tensor_bytes(data: bytes) -> Any:
    """Returns the value in the bytes of a `.pt` file, under the rules of `read_arrays`.

    Raises:
        ValueError: the bytes cannot be read, in one line that says why.
    """
    try:
        value = _plain(_load_torch(io.BytesIO(data)))
    except Exception as error:  # see above
        raise_interrupt(error)
        raise ValueError(_why_not_torch(data[:16], error)) from error
    return value


def _load_torch(file: io.BufferedReader | io.BytesIO) -> Any:
    claims = false_claims(file)
    if claims is not None:
        raise ValueError(claims)
    return load_torch(file)


def _plain(value: Any) -> Any:
    """Return a tensor's values alone: a parameter's without their gradient, a conjugate or negative view's worked out.

    An array of numpy becomes a tensor; what is neither comes back as it is. Refused are what is not a dense tensor in
    memory, and one whose strides make many values of few.
    """
    tensor = tensor_of(value)
    if tensor is None:
        return value
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else f"{tensor.layout}"
        where = f" on {tensor.device}" if tensor.device.type != "cpu" else ""
        raise ValueError(f"it holds a {kind} tensor{where}, a dense one is wanted")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        shape = list(tensor.shape)
        raise ValueError(f"it holds fewer values than its shape {shape} says; save tensor.contiguous() instead")
    return tensor.detach().resolve_conj().resolve_neg()


def _why_unreadable(path: Path, suffix: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return error.strerror if error.strerror.startswith("is ") else f"cannot be read: {error.strerror}"
    if path.stat().st_size == 0:
        return f"cannot be read as {suffix}: it is empty"
    if suffix == ".safetensors" and isinstance(error, LookupError):
        return f"cannot be read as {suffix}: the library knows no type {one_line(error)}"
    if suffix != ".pt":
        return f"cannot be read as {suffix}: {one_line(error) or type(error).__name__}"
    with open_regular(path) as file:
        head = bytes(read_exactly(file, min(16, size_of(file))))
        if head.startswith(b"PK\x03\x04") and _lacks_its_end(file):
            return "cannot be read as .pt: the file is truncated; copy or write it again"
    return _why_not_torch(head, error)


def _why_not_torch(head: bytes, error: Exception) -> str:
    """Say why bytes that begin with `head` could not be read, without torch's advice to load them unsafely."""
    foreign = foreign_to_torch(head)
    if isinstance(error, pickle.UnpicklingError) and foreign is None:
        return "holds more than tensors (or is damaged), and pickled code is not run; save the tensor alone"
    reason = foreign or one_line(str(error).split("\n", 1)[0]) or type(error).__name__
    if foreign is None and isinstance(error, LookupError):  # its text is a key alone
        reason = f"the file is damaged ({type(error).__name__}: {reason})"
    if "weights_only" in reason:
        reason = "it is damaged, or holds more than tensors"
    return f"cannot be read as .pt: {reason}"


def _lacks_its_end(file: io.BufferedReader) -> bool:
    """Returns whether a zip archive, as torch writes, breaks off before its directory, which stands last.

    torch then says "[Errno 22] Invalid argument" or speaks of its archive reader, according to where it breaks off.
    """
    try:
        return not zipfile.is_zipfile(file)
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
    """Returns latents of a file as float [b, n, c, h, w]; ranks 3 and 4 count as one frame and one clip.

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

    float8 becomes float32.

    Raises:
        DataError: as there.
    """
    shape = clip_shape(tuple(latents.shape), latents.dtype, path, channels)
    return as_numbers(latents, path).reshape(shape)


def as_numbers(latents: Tensor, path: Path | str) -> Tensor:
    """Returns latents in a dtype that one can compute with: float8 is a way to store numbers, and becomes float32.

    Raises:
        DataError: torch names dtypes that it has no conversions for.
    """
    if latents.element_size() > 1:
        return latents
    try:
        return latents.float()
    except RuntimeError as error:
        raise DataError(f"{path}: latents of {latents.dtype} cannot be converted", path=path) from error


def clip_shape(
    shape: tuple[int, ...], dtype: torch.dtype, path: Path | str, channels: int | None = None
) -> tuple[int, int, int, int, int]:
    """Returns the shape of a file's latents as `(b, n, c, h, w)`; arguments as in `load_latents`.

    Raises:
        DataError: as there.
    """
    if not dtype.is_floating_point:
        raise DataError(f"{path}: latents must be floating point, got {dtype}", path=path)
    if len(shape) not in (3, 4, 5):
        raise DataError(
            f"{path}: latents must be [b, n, c, h, w], [n, c, h, w] or [c, h, w], got {list(shape)}", path=path
        )
    if 0 in shape:
        raise DataError(f"{path}: has no frames, its shape is {list(shape)}; store at least one", path=path)
    b, n, c, h, w = (*(1,) * (5 - len(shape)), *shape)
    if channels is not None and c != channels:
        raise DataError(f"{path}: the decoder takes {channels} latent channels, got {c} in {list(shape)}", path=path)
    return b, n, c, h, w


def check_finite(frames: Tensor, path: Path | str, first: int = 0) -> None:
    """Raises DataError if a value of `[k, c, h, w]`, the frames of a file from `first` on, is not finite."""
    finite = frames.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        index = first + int((~finite).int().argmax())
        raise DataError(f"{path}: frame {index} has values that are not finite", path=path, index=index)


def check_encoded(latents: Tensor, source: Path | str, first: int, dtype: torch.dtype) -> None:
    """Raises NonFiniteError if latents `[k, c, h, w]` that an encoder made in `dtype` are not finite.

    Args:
        source: the pictures, `first` the number of the first one, for the message.
    """
    try:
        check_finite(latents, source, first)
    except DataError as error:
        frame = error.index or 0
        wider = "encode in a wider dtype (bf16, fp32)" if dtype == torch.float16 else "look at the weights"
        text = f"the latents of frame {frame} have values that are not finite in {str(dtype).removeprefix('torch.')}"
        raise NonFiniteError(f"{source}: {text}; {wider}", frame=frame) from None


def save_array(path: Path | str, tensor: Tensor | Mapping[str, Tensor], *, facts: Facts | None = None) -> None:
    """Write one tensor, or several by name, in the form that the path's ending says; folders are made.

    Only the tensor's own values are written, not the storage that a view is cut from.

    Args:
        path: the file; `.npy` has bfloat16 and float8 as float32.
        tensor: dense tensors.
        facts: see `owl_wms.media.facts`; `.npy` has no place for them.

    Raises:
        DataError: unknown ending, several tensors for `.npy`, a tensor that is not dense, or the path cannot be
            written; what stood there then stays as it was.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in ARRAY_SUFFIXES:
        raise DataError(f"{path}: the ending must be one of {_LISTED}, got {suffix or 'none'}", path=path)
    named = {KEY: tensor} if isinstance(tensor, Tensor) else tensor
    stored = {name: _own_values(value, path) for name, value in named.items()}
    if suffix == ".npy" and len(stored) != 1:
        raise DataError(f"{path}: .npy holds one tensor, got {', '.join(stored)}", path=path)
    if suffix == ".safetensors" and any(value.dtype == torch.float8_e8m0fnu for value in stored.values()):
        raise DataError(f"{path}: safetensors writes float8_e8m0fnu, and cannot read it; use .pt", path=path)
    told = None if facts is None or not facts.to_dict() else facts.to_text()
    try:
        with written_whole(path) as draft:
            if suffix == ".pt":
                torch.save(stored[KEY] if isinstance(tensor, Tensor) else stored, draft)
                if told is not None:
                    with zipfile.ZipFile(draft, "a") as archive:
                        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/{MEMBER}", told)
            elif suffix == ".npy":
                (only,) = stored.values()
                as_float = only.is_floating_point() and only.dtype not in (torch.float16, torch.float32, torch.float64)
                with draft.open("wb") as file:  # given a name, numpy would add to one that ends in .NPY
                    np.save(file, only.float().numpy() if as_float else only.numpy(), allow_pickle=False)
            else:
                save_file(stored, draft, metadata=None if told is None else {METADATA_KEY: told})
    except (OSError, RuntimeError, TypeError, ValueError, LookupError, SafetensorError) as error:
        # torch.save says RuntimeError for a missing folder; the others are of dtypes that a form does not have.
        raise DataError(f"{path}: cannot be written: {one_line(why_unwritten(error))}", path=path) from error


def _own_values(tensor: Tensor, path: Path) -> Tensor:
    """Returns a dense tensor on the CPU whose storage holds its values and nothing else."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise DataError(
            f"{path}: only dense tensors can be written, got {type(tensor).__name__} {tensor.dtype}", path=path
        )
    plain = tensor.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format)
