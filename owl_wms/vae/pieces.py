"""Reads the tensors of a safetensors file by several threads, each tensor into memory of its own.

Why it exists: the library reads from bytes in one thread and copies what it read. For a decoder of 900 MB that was 1.1
of the 1.7 seconds of loading it, and a start that finds its program in the cache waits for it. Most of the time goes
into memory that is touched for the first time, which several threads do side by side.

Whether a header is right says the library; only then are offsets taken from it.

Format: https://github.com/huggingface/safetensors#format: the length of the header in 8 bytes, the header in JSON, the
data. In the header, name -> dtype, shape, and where the tensor begins and ends in the data.

Usage:
    places = safetensors_places(file)
    state = {} if places is None else read_pieces(file, places)
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor

PIECE_BYTES = 1 << 24
MAX_THREADS = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPES: dict[str, torch.dtype] = getattr(safetensors.torch, "_TYPES", {})  # a file of others is the library's to read
# How versions of the library say that the header is right and only the data is missing.
_ONLY_DATA_MISSING = ("MetadataIncompleteBuffer", "incomplete metadata, file not fully covered")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A tensor in a file: its first byte counts from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    bytes: int


def safetensors_places(file: BinaryIO) -> list[Place] | None:
    """Returns where the tensors of a safetensors file lie; None where the library has to say what is wrong with it.

    Raises:
        OSError: it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    length = file.read(8)
    data = 8 + int.from_bytes(length, "little")
    if not 8 <= data <= min(size, 8 + MAX_HEADER_BYTES) or sys.byteorder != "little":
        return None
    header = file.read(data - 8)
    try:
        safetensors.deserialize(length + header)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        if not any(text in str(error) for text in _ONLY_DATA_MISSING):
            return None
    rows = {name: row for name, row in json.loads(header).items() if name != "__metadata__"}
    if data + max((row["data_offsets"][1] for row in rows.values()), default=0) != size:
        return None
    if not all(row["dtype"] in DTYPES for row in rows.values()):
        return None
    return [
        Place(
            name=name,
            dtype=DTYPES[row["dtype"]],
            shape=tuple(row["shape"]),
            begin=data + row["data_offsets"][0],
            bytes=row["data_offsets"][1] - row["data_offsets"][0],
        )
        for name, row in rows.items()
    ]


def read_pieces(file: BinaryIO, places: list[Place]) -> dict[str, Tensor]:
    """Returns the tensors at `places`, on the CPU, each with memory of its own.

    Raises:
        OSError: it cannot be read.
        ValueError: it became shorter meanwhile.
    """
    held = [torch.empty(place.bytes, dtype=torch.uint8, device="cpu") for place in places]  # not the default device
    if hasattr(os, "preadv"):
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "owl-wms-weights") as pool:
            list(pool.map(lambda piece: _fill(file.fileno(), *piece), _pieces(held, places)))
    else:  # Windows
        for into, begin in _pieces(held, places):
            file.seek(begin)
            if file.readinto(into) != len(into):  # type: ignore[attr-defined]
                raise ValueError("it became shorter while it was read")
    return {place.name: flat.view(place.dtype).reshape(place.shape) for place, flat in zip(places, held, strict=True)}


def _pieces(held: list[Tensor], places: list[Place]) -> Iterator[tuple[memoryview, int]]:
    for flat, place in zip(held, places, strict=True):
        memory = memoryview(flat.numpy().data)
        for start in range(0, place.bytes, PIECE_BYTES):
            yield memory[start : start + PIECE_BYTES], place.begin + start


def _fill(descriptor: int, into: memoryview, begin: int) -> None:
    while into:
        count = os.preadv(descriptor, [into], begin)
        if not count:
            raise ValueError("it became shorter while it was read")
        into, begin = into[count:], begin + count
