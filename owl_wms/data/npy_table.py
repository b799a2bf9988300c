"""A table of clips in a folder: one row per clip, every array of it in a `.npy` file of its own.

Why this format: it is upstream's, arrays are memory-mapped, so a window of a long clip costs only the pages it
touches, and a half-written row is never in the manifest. Layout of the folder:

    schema.json    {"columns": [...], "array_columns": [...]}
    manifest.json  [{"depth_latent": "depth_latent_0.npy", "seq_len": 900, "missing": false, ...}, ...]
    depth_latent_0.npy, mouse_0.npy, ...
    source.json    what made the rows, where their maker says so; no reader needs it

Usage:
    writer = NpyTableWriter(folder, array_columns=("depth_latent", "mouse", "buttons"), columns=("seed",))
    writer.append({"depth_latent": latents, "mouse": mouse, "buttons": buttons}, seed=7)
    table = NpyTable(folder)
    table.rows[0].length, table.slice(0, "mouse", 10, 26)     # frames, float32 [16, 2]
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owl_wms.errors import DataError

_OWN_COLUMNS = ("missing", "truncated", "seq_len")


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """One clip.

    Attributes:
        index: its place in the manifest; file names and error messages use it.
        length: frames, the same in every array of the row.
        fields: the manifest's entry.
    """

    index: int
    length: int
    fields: Mapping[str, Any]


class NpyTable:
    """Read access to such a folder; rows marked `missing` are left out, truncated ones kept unless asked otherwise."""

    def __init__(self, path: Path | str, columns: Sequence[str] | None = None, *, keep_truncated: bool = True) -> None:
        """Read schema and manifest and check that the arrays of every row exist and agree on their length, and that a
        column has one shape of frame in all rows.

        Args:
            path: the folder.
            columns: array columns that will be read; all of the schema's when None.
            keep_truncated: whether rows marked `truncated` count.

        Raises:
            DataError: no such folder, broken JSON, an unknown column, a missing or unreadable array, lengths or shapes
                that differ.
        """
        self.path = Path(path)
        schema = _read_json(self.path / "schema.json", dict)
        manifest = _read_json(self.path / "manifest.json", list)
        known = schema.get("array_columns")
        if not isinstance(known, list):
            raise DataError(
                f"{self.path / 'schema.json'}: `array_columns` must be a list, got {known!r}", path=self.path
            )
        self.columns = tuple(known) if columns is None else tuple(columns)
        for column in self.columns:
            if column not in known:
                raise DataError(f"{self.path}: no array column {column!r}; it has {', '.join(known)}", path=self.path)
        self.rows: list[Row] = []
        # Column -> shape of a frame, and the row that says so.
        self._frames: dict[str, tuple[tuple[int, ...], int]] = {}
        for index, fields in enumerate(manifest):
            if not isinstance(fields, dict):
                raise DataError(
                    f"{self.path}: row {index} of the manifest must be an object", path=self.path, index=index
                )
            if fields.get("missing") or (fields.get("truncated") and not keep_truncated):
                continue
            self.rows.append(Row(index=index, length=self._length(index, fields), fields=fields))

    def slice(self, row: int, column: str, start: int, stop: int) -> np.ndarray:
        """Frames `start` to `stop` of a column of `rows[row]`, copied out of the map: [stop - start, ...].

        Raises:
            DataError: the range leaves the clip, the file cannot be read, or a value is NaN or infinite.
        """
        entry = self.rows[row]
        if not 0 <= start < stop <= entry.length:
            raise DataError(
                f"{self.path}: frames {start} to {stop} of row {entry.index} lie outside its {entry.length} frames",
                path=self.path,
                index=entry.index,
            )
        values = np.array(self._map(entry.index, entry.fields, column)[start:stop])
        # One such value in a batch makes every weight NaN, and nothing on the way there complains.
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            file = self.path / entry.fields[column]
            raise DataError(
                f"{file}: frame {start + int(bad.argmax())} of {column!r} in row {entry.index} holds NaN or infinity; "
                "store the clip anew, or mark its row as missing in manifest.json",
                path=file,
                index=entry.index,
            )
        return values

    def _length(self, index: int, fields: Mapping[str, Any]) -> int:
        arrays = {column: self._map(index, fields, column) for column in self.columns}
        for column, array in arrays.items():
            shape, first = self._frames.setdefault(column, (array.shape[1:], index))
            if array.shape[1:] != shape:
                file = self.path / fields[column]
                raise DataError(
                    f"{file}: frames of {column!r} in row {index} are {list(array.shape[1:])}, "
                    f"those of row {first} are {list(shape)}; a column has one shape",
                    path=file,
                    index=index,
                )
            if array.dtype.kind not in "biuf":
                file = self.path / fields[column]
                raise DataError(
                    f"{file}: array {column!r} of row {index} must hold numbers, found {array.dtype}",
                    path=file,
                    index=index,
                )
        lengths = {column: len(array) for column, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                f"{self.path}: arrays of row {index} differ in length: {lengths}", path=self.path, index=index
            )
        return next(iter(lengths.values()), 0)

    def _map(self, index: int, fields: Mapping[str, Any], column: str) -> np.ndarray:
        name = fields.get(column)
        # A manifest may come from elsewhere: it names files of this folder, never a way out of it.
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(
                f"{self.path}: row {index} names no file of this folder for {column!r}: {name!r}",
                path=self.path,
                index=index,
            )
        file = self.path / name
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{file}: cannot read array {column!r} of row {index}: {error}", path=file, index=index
            ) from error
        if array.ndim == 0:
            raise DataError(f"{file}: array {column!r} of row {index} has no frame axis", path=file, index=index)
        return array


class NpyTableWriter:
    """Appends rows to a folder; the manifest is replaced whole after each row, so a crash loses at most that row."""

    def __init__(self, path: Path | str, array_columns: Sequence[str], columns: Sequence[str] = ()) -> None:
        """Open the folder for appending; it is created when absent.

        Args:
            path: the folder.
            array_columns: columns that every row brings as arrays [n, ...].
            columns: further columns of plain values.

        Raises:
            DataError: the folder already holds a table of other columns, or cannot be written.
        """
        self.path = Path(path)
        self.array_columns = tuple(array_columns)
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        schema = {"columns": [*array_columns, *columns, *_OWN_COLUMNS], "array_columns": list(array_columns)}
        self._rows: list[dict[str, Any]] = []
        if (self.path / "schema.json").exists():
            present = _read_json(self.path / "schema.json", dict)
            if present != schema:
                raise DataError(
                    f"{self.path}: holds a table of other columns: {present}; choose another folder", path=self.path
                )
            self._rows = _read_json(self.path / "manifest.json", list)
        else:
            with _writing(self.path):
                _replace_json(self.path / "manifest.json", self._rows)
                _replace_json(self.path / "schema.json", schema)  # last: it is what says that there is a table
        self._plain = tuple(columns)

    def append(self, arrays: Mapping[str, np.ndarray], *, truncated: bool = False, **fields: Any) -> int:
        """Store one clip.

        Args:
            arrays: every array column, [n, ...], of one length n of at least 1.
            truncated: whether the clip was cut short.
            fields: values of the plain columns.

        Returns:
            The row's index.

        Raises:
            DataError: columns or lengths that do not fit, or a full disk; the table is then as it was.
        """
        index = len(self._rows)
        if set(arrays) != set(self.array_columns) or set(fields) != set(self._plain):
            raise DataError(
                f"{self.path}: row {index} must bring arrays {self.array_columns} and fields {self._plain}, "
                f"got {tuple(arrays)} and {tuple(fields)}",
                path=self.path,
                index=index,
            )
        lengths = {column: len(array) for column, array in arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(
                f"{self.path}: arrays of row {index} must share one length above 0: {lengths}",
                path=self.path,
                index=index,
            )
        row: dict[str, Any] = {
            **fields,
            "missing": False,
            "truncated": truncated,
            "seq_len": next(iter(lengths.values())),
        }
        for column in arrays:
            row[column] = f"{column}_{index}.npy"
        try:
            with _writing(self.path, index):
                for column, array in arrays.items():
                    np.save(self.path / row[column], array, allow_pickle=False)
                _replace_json(self.path / "manifest.json", [*self._rows, row])
        except DataError:
            for column in arrays:  # no row names them, and the space may be what is missing
                (self.path / row[column]).unlink(missing_ok=True)
            raise
        self._rows.append(row)
        return index

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The manifest's entries so far, those of earlier writers included."""
        return tuple(self._rows)

    @property
    def source(self) -> dict[str, Any] | None:
        """What `set_source` kept in this folder, or None.

        Raises:
            DataError: the file is not a JSON object.
        """
        file = self.path / "source.json"
        return _read_json(file, dict) if file.exists() else None

    def set_source(self, source: Mapping[str, Any]) -> None:
        """Keep what makes the rows, JSON-ready, for whoever appends to them.

        Raises:
            DataError: the folder cannot be written.
        """
        with _writing(self.path):
            _replace_json(self.path / "source.json", dict(source))

    def __len__(self) -> int:
        return len(self._rows)


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        made = "`owl-wms data make` makes a table of the rendered game"
        raise DataError(f"{path}: no such file, so this is no table; {made}", path=path) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read this part of a table: {reason}", path=path) from error
    if not isinstance(value, kind):
        raise DataError(f"{path}: must hold a JSON {kind.__name__}, found {type(value).__name__}", path=path)
    return value


def _replace_json(path: Path, value: Any) -> None:
    draft = path.with_suffix(".tmp")
    try:
        draft.write_text(json.dumps(value), encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path, index: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # numpy's own, for an array that does not fit, has no strerror
        what = "" if index is None else f"row {index} "
        raise DataError(
            f"{path}: {what}cannot be written: {error.strerror or error}", path=path, index=index
        ) from error
