"""Reads parts of a tensor in a `.pt` or `.safetensors` file, straight from the place where its values lie.

Why not a memory map: a file that is cut short between a look at its size and the read of a page ends the process
(SIGBUS). A read at an offset that finds too little is an error like any other, and takes no more memory than the part.

Formats: torch's archive is a zip file whose members are not compressed, one for each storage
(https://docs.pytorch.org/docs/stable/notes/serialization.html); for safetensors see `owl_wms.vae.pieces`.

Usage:
    stored = find_tensor(file, ".pt", "latents")      # None where it has to be read whole
    stored.part(0, 10, 26).read(file)                 # [16, ...]
"""

from __future__ import annotations

import itertools
import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BufferedReader

import torch
from torch import Tensor

from owl_wms.files import false_claims, read_exactly, read_into
from owl_wms.vae.pieces import safetensors_places
from owl_wms.vae.torch_files import load_torch

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member of a zip file: behind it come a name and extra fields of these lengths, and then the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Says where a tensor lies in a file, or a part of it.

    Attributes:
        begin: byte of the file at which the first value lies.
        strides: in values, as torch counts them.
    """

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def part(self, axis: int, start: int, stop: int) -> Stored:
        """Returns entries `start` to `stop` of an axis."""
        begin = self.begin + start * self.strides[axis] * self.dtype.itemsize
        return replace(self, begin=begin, shape=(*self.shape[:axis], stop - start, *self.shape[axis + 1 :]))

    def of_rank(self, rank: int) -> Stored:
        """Returns it with so many axes: those that it lacks stand first and have one entry."""
        lacking = rank - len(self.shape)
        return replace(self, shape=(*(1,) * lacking, *self.shape), strides=(*(0,) * lacking, *self.strides))

    def runs(self) -> tuple[list[int], list[int]]:
        """Returns the axes whose values lie one behind the other in the file, and before them those that leave gaps.

        Both begin with the widest stride. Axes of one entry are in neither.
        """
        axes = [axis for axis, size in enumerate(self.shape) if size > 1]
        gaps, length = sorted(axes, key=lambda axis: -self.strides[axis]), 1
        dense: list[int] = []
        while gaps and self.strides[gaps[-1]] == length:
            dense.insert(0, gaps.pop())
            length *= self.shape[dense[0]]
        return gaps, dense

    def read(self, file: BufferedReader) -> Tensor:
        """Returns the values, in memory of their own.

        Raises:
            OSError: the file has become shorter.
        """
        gaps, dense = self.runs()
        size = self.dtype.itemsize
        values = torch.empty(math.prod(self.shape), dtype=self.dtype, device="cpu")
        memory = memoryview(values.view(torch.uint8).numpy().data)
        length = size * math.prod(self.shape[axis] for axis in dense)
        for number, place in enumerate(itertools.product(*(range(self.shape[axis]) for axis in gaps))):
            skipped = sum(index * self.strides[axis] for index, axis in zip(place, gaps, strict=True))
            read_into(file, memory[number * length : (number + 1) * length], self.begin + skipped * size)
        order = [*gaps, *dense]
        laid = values.view([self.shape[axis] for axis in order])
        return laid.permute([order.index(axis) for axis in sorted(order)]).reshape(self.shape)


def find_tensor(file: BufferedReader, suffix: str, name: str) -> Stored | None:
    """Returns where the only tensor of a file lies, or the one with this name.

    None if there is no such tensor, or if anything about it is unusual. The file then has to be read whole, which
    succeeds or reports what is wrong.

    Raises:
        Exception: whatever a damaged file leads torch and safetensors to raise.
    """
    return _in_safetensors(file, name) if suffix == ".safetensors" else _in_torch(file, name)


def _in_safetensors(file: BufferedReader, name: str) -> Stored | None:
    places = {place.name: place for place in safetensors_places(file) or ()}
    place = next(iter(places.values())) if len(places) == 1 else places.get(name)
    if place is None:
        return None
    return Stored(begin=place.begin, dtype=place.dtype, shape=place.shape, strides=_contiguous(place.shape))


def _in_torch(file: BufferedReader, name: str) -> Stored | None:
    if false_claims(file) is not None or not is_native(file):
        return None
    file.seek(0)
    value = load_torch(file, device="meta")
    if isinstance(value, Mapping):
        tensors = {key: item for key, item in value.items() if isinstance(item, Tensor)}
        value = next(iter(tensors.values())) if len(tensors) == 1 else tensors.get(name)
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_nested:
        return None
    if value.is_quantized or value.is_conj() or value.is_neg():
        return None
    storage = value.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)  # torch's own, made for readers like this one
    last = value.storage_offset() + sum(
        (size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)
    )
    if begin is None or not value.numel() or (last + 1) * value.element_size() > storage.nbytes():
        return None
    if value.numel() * value.element_size() > storage.nbytes():  # many values made of few, which are refused
        return None
    if not _is_member(file, begin, storage.nbytes()):
        return None
    return Stored(
        begin=begin + value.storage_offset() * value.element_size(),
        dtype=value.dtype,
        shape=tuple(value.shape),
        strides=value.stride(),
    )


def is_native(file: BufferedReader) -> bool:
    """Returns whether a `.pt` file is an archive in this machine's byte order, or one so old that it does not say one.

    In another one torch swaps the bytes of every storage, and of one on the meta device that ends the process.
    """
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename.lower().endswith("byteorder"):
                with archive.open(info) as member:
                    if member.read(8) != sys.byteorder.encode():
                        return False
    return True


def _is_member(file: BufferedReader, begin: int, count: int) -> bool:
    """Returns whether the data of a member of a zip file are these bytes of it."""
    with zipfile.ZipFile(file) as archive:
        members, directory = archive.infolist(), archive.start_dir
    member = max((info for info in members if info.header_offset < begin), key=_place, default=None)
    ends = min((info.header_offset for info in members if info.header_offset > begin), default=directory)
    if member is None or member.file_size != count or begin + count > ends:
        return False
    header = read_exactly(file, _LOCAL_HEADER.size, member.header_offset)
    name, extra = _LOCAL_HEADER.unpack(header)
    return bool(member.header_offset + _LOCAL_HEADER.size + name + extra == begin)


def _place(member: zipfile.ZipInfo) -> int:
    return member.header_offset


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
