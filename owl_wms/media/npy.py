"""Reads `.npy` files piece by piece without trusting them: the one reader for latents, frames and tables.

Why not `np.load`: mapped, a file that is cut short later ends the process; unmapped, a header's claim is allocated
before the file's size is looked at. Here the header is checked against the size, and then exactly the frames that are
wanted are read. Numbers come in the machine's byte order whatever the file has.

Usage:
    with NpyFile("mouse_0.npy") as file:
        file.shape, file.read(10, 26)      # (900, 2), float32 [16, 2]
"""

from __future__ import annotations

import io
import math
import tempfile
import warnings
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np

from owl_wms.files import open_regular, read_exactly, size_of

_HEADER_BYTES = 16 << 10  # numpy refuses longer ones as well
_WIDEST = 8  # bytes of a number; wider ones (float128) differ between machines


class NpyFile:
    """Reads an open `.npy` file of numbers.

    Attributes:
        shape: of the whole array.
        by_rows: whether entries of the first axis lie one behind the other; else every `read` reads the whole file.
        dtype: of what `read` returns, in the machine's byte order.
    """

    def __init__(self, path: Path | str, *, inside: Path | str | None = None) -> None:
        """Open the file and check its header.

        Args:
            path: the file.
            inside: see `open_regular`.

        Raises:
            OSError: as `open_regular`.
            ValueError: not such a file, objects or texts instead of numbers, or more or fewer bytes than the header
                says.
        """
        self._take(open_regular(path, inside=inside))

    def _take(self, file: BufferedReader) -> None:
        self._file = file
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def of_file(cls, file: BufferedReader) -> NpyFile:
        """Read a file that is open; it is closed if it is not such a file.

        Raises:
            ValueError: as the constructor.
        """
        made = cls.__new__(cls)
        made._take(file)
        return made

    @classmethod
    def of_bytes(cls, data: bytes) -> NpyFile:
        """Open the bytes of such a file, which came inside of another.

        Raises:
            ValueError: as the constructor.
        """
        # Without a name: by that Windows would not open it a second time. The reader closes it.
        file = tempfile.TemporaryFile()  # noqa: SIM115
        file.write(data)
        file.flush()
        return cls.of_file(cast(BufferedReader, file))

    def _read_header(self) -> None:
        size = size_of(self._file)
        if size == 0:
            raise ValueError("it is empty")
        head = io.BytesIO(read_exactly(self._file, min(size, _HEADER_BYTES)))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a header that Python 2 wrote
                read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = read[np.lib.format.read_magic(head)[0]](head)
        except Exception as error:  # a damaged header is parsed as Python, and raises what that raises
            raise ValueError(f"its header is damaged ({type(error).__name__})") from error
        if dtype.kind not in "biufc" or dtype.itemsize > _WIDEST * (1 + (dtype.kind == "c")):
            kind = "pickled objects, which are not read" if dtype.kind == "O" else str(dtype)
            raise ValueError(f"must hold numbers, found {kind}")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"its header claims the shape {shape}")
        self._offset, self._stored, self._fortran = head.tell(), dtype, fortran
        self.by_rows = not fortran
        self.shape: tuple[int, ...] = shape
        self.dtype = dtype.newbyteorder("=")
        wanted = self._offset + math.prod(shape) * dtype.itemsize
        if wanted != size:
            what = "truncated" if wanted > size else "longer than its header says"
            raise ValueError(
                f"the file is {what}: {list(shape)} of {dtype} are {wanted} bytes with the header, not {size}"
            )

    def read(self, start: int = 0, stop: int | None = None, *, axes: int = 1) -> np.ndarray:
        """Read entries `start` to `stop` of the first axis, or the whole array: a new array, [stop - start, ...].

        Args:
            axes: so many of the first axes count as one, in which the entries are counted.

        Raises:
            OSError: the file became shorter.
        """
        first, last = (0, None) if not self.shape or self._fortran else (start, stop)
        rows, row = (1, ()) if not self.shape else (math.prod(self.shape[:axes]), self.shape[axes:])
        first, last, _ = slice(first, last).indices(rows)
        count = math.prod(row)
        data = read_exactly(
            self._file, max(0, last - first) * count * self._stored.itemsize,
            self._offset + first * count * self._stored.itemsize,
        )  # fmt: skip
        if self._stored.kind == "b":
            values: np.ndarray = (
                np.frombuffer(data, np.uint8) != 0
            )  # any other byte is no value of a bool, and behaves like none
        else:
            values = np.frombuffer(data, self._stored).astype(self.dtype, copy=False)
        if not self.shape:
            return values.reshape(())
        if self._fortran:
            return np.ascontiguousarray(values.reshape(self.shape, order="F").reshape(rows, *row)[start:stop])
        return values.reshape(last - first, *row)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
