"""Reads and writes a table of clips in a folder: one row per clip, every array of it in a `.npy` file of its own.

Why this format: it is upstream's, a window of a long clip costs only the bytes that it has, and a half-written row is
never in the manifest. Layout of the folder (docs/formats.md has it whole):

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owl_wms.data.one_writer import OneWriter
from owl_wms.errors import DataError, OwlError
from owl_wms.files import at_home, one_line, read_regular, unusable_name
from owl_wms.media.npy import NpyFile
from owl_wms.whole import make_folder, why_unwritten, written_whole

LATENT_COLUMN = "depth_latent"  # upstream's name for latents, of colour and depth or not
MAX_JSON_BYTES = 1 << 28
"""Longest manifest: about a million rows."""
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
    """Read access to such a folder; rows marked `missing` are left out, truncated ones are not unless asked for."""

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
        self.path = at_home(path)
        schema = _read_json(self.path / "schema.json", dict)
        manifest = _read_json(self.path / "manifest.json", list)
        known = schema.get("array_columns")
        if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
            text = f"`array_columns` must be a list of names, got {one_line(repr(known), 80)}"
            raise _wrong(self.path / "schema.json", text)
        self.columns = tuple(known) if columns is None else tuple(columns)
        for column in self.columns:
            if column not in known:
                raise _wrong(self.path, f"no array column {column!r}; it has {', '.join(known)}")
        self.rows: list[Row] = []
        # Column -> shape of a frame, and the row that says so.
        self._frames: dict[str, tuple[tuple[int, ...], int]] = {}
        for index, fields in enumerate(manifest):
            if not isinstance(fields, dict):
                raise _wrong(self.path, f"row {index} of the manifest must be an object", index)
            flags = {name: _flag(fields.get(name), name, index, self.path) for name in ("missing", "truncated")}
            if flags["missing"] or (flags["truncated"] and not keep_truncated):
                continue
            self.rows.append(Row(index=index, length=self._length(index, fields), fields=fields))

    def slice(self, row: int, column: str, start: int, stop: int) -> np.ndarray:
        """Return frames `start` to `stop` of a column of `rows[row]`, read from its file: [stop - start, ...].

        Raises:
            DataError: the range leaves the clip, the file cannot be read, or a value is NaN or infinite.
        """
        entry = self.rows[row]
        if not 0 <= start < stop <= entry.length:
            text = f"frames {start} to {stop} of row {entry.index} lie outside its {entry.length} frames"
            raise _wrong(self.path, text, entry.index)
        with self._open(entry.index, entry.fields, column) as file:
            values = file.read(start, stop)
        shape = self._frames[column][0] if column in self._frames else values.shape[1:]
        if values.shape != (stop - start, *shape):  # another process put a new file there
            text = f"frames {start} to {stop} of {column!r} in row {entry.index} are {list(values.shape)} now"
            raise _wrong(self.path / entry.fields[column], f"{text}; open the table anew", entry.index)
        # One such value in a batch makes every weight NaN, and nothing on the way there complains.
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            text = f"frame {start + int(bad.argmax())} of {column!r} in row {entry.index} holds NaN or infinity"
            remedy = "store the clip anew, or mark its row as missing in manifest.json"
            raise _wrong(self.path / entry.fields[column], f"{text}; {remedy}", entry.index)
        return values

    def _length(self, index: int, fields: Mapping[str, Any]) -> int:
        lengths: dict[str, int] = {}
        for column in self.columns:
            with self._open(index, fields, column) as array:
                lengths[column], shape = array.shape[0], array.shape[1:]
            held, first = self._frames.setdefault(column, (shape, index))
            if shape != held:
                text = f"frames of {column!r} in row {index} are {list(shape)}, those of row {first} are {list(held)}"
                raise _wrong(self.path / fields[column], f"{text}; a column has one shape", index)
        said = fields.get("seq_len")
        if said is not None and self.columns:
            lengths["seq_len"] = said
        found = list(lengths.values())
        if any(length != found[0] for length in found):  # what the manifest says may be no number
            raise _wrong(self.path, f"arrays of row {index} differ in length: {lengths}", index)
        return next(iter(lengths.values()), 0)

    @contextmanager
    def _open(self, index: int, fields: Mapping[str, Any], column: str) -> Iterator[NpyFile]:
        name = fields.get(column)
        # A manifest may come from elsewhere: it names files of this folder, never a way out of it.
        if not isinstance(name, str) or Path(name).name != name:
            raise _wrong(self.path, f"row {index} names no file of this folder for {column!r}: {name!r}", index)
        file = self.path / name
        try:
            with NpyFile(file, inside=self.path) as array:
                if not array.shape:
                    raise ValueError("it has no frame axis")
                yield array
        except (OSError, ValueError) as error:
            if isinstance(error, OwlError):
                raise
            reason = one_line(getattr(error, "strerror", None) or error)
            text = f"array {column!r} of row {index} {reason}"
            if not reason.startswith("must"):
                text = f"cannot read array {column!r} of row {index}: {reason}"
            raise _wrong(file, text, index) from error


class NpyTableWriter:
    """Appends rows to a folder; the manifest is replaced whole after each row, so a crash loses at most that row."""

    def __init__(
        self, path: Path | str, array_columns: Sequence[str], columns: Sequence[str] = (), *, begin: bool = True
    ) -> None:
        """Open the folder for appending; it is created when absent.

        Args:
            path: the folder.
            array_columns: columns that every row brings as arrays [n, ...].
            columns: further columns of plain values.
            begin: make an empty table at once; False makes it with its first row, so that whoever is killed before it
                leaves no table without clips.

        Raises:
            DataError: the folder already holds a table of other columns, or cannot be written, or a column's name is
                none for a file.
        """
        self.path = at_home(path)
        self.array_columns = tuple(array_columns)
        for column in self.array_columns:
            problem = unusable_name(f"{column}_0.npy")
            if problem is not None:
                raise _wrong(self.path, f"no file can be named after column {column!r}: it {problem}")
        with _writing(self.path):
            make_folder(self.path)
        schema = {"columns": [*array_columns, *columns, *_OWN_COLUMNS], "array_columns": list(array_columns)}
        self._rows: list[dict[str, Any]] = []
        self._schema: dict[str, Any] | None = None
        if (self.path / "schema.json").exists():
            present = _read_json(self.path / "schema.json", dict)
            if present != schema:
                raise _wrong(self.path, f"holds a table of other columns: {present}; choose another folder")
            self._rows = _read_json(self.path / "manifest.json", list)
        else:
            self._schema = schema
            with _writing(self.path):
                _replace_json(self.path / "manifest.json", self._rows)
                if begin:
                    self._make_table()
        self._plain = tuple(columns)
        self._one = OneWriter(self.path / "manifest.json")
        held = (row.get(column) for row in self._rows if isinstance(row, dict) for column in self.array_columns)
        self._used = {name for name in held if isinstance(name, str)}  # names of files

    def append(self, arrays: Mapping[str, np.ndarray], *, truncated: bool = False, **fields: Any) -> int:
        """Store one clip.

        Args:
            arrays: every array column, [n, ...], of one length n of at least 1.
            truncated: whether the clip was cut short.
            fields: values of the plain columns.

        Returns:
            The row's index.

        Raises:
            DataError: columns or lengths that do not fit, NaN or infinity, a full disk, or rows of another program
                since; the table is as it was.
        """
        index = len(self._rows)
        if set(arrays) != set(self.array_columns) or set(fields) != set(self._plain):
            text = f"row {index} must bring arrays {self.array_columns} and fields {self._plain}"
            raise _wrong(self.path, f"{text}, got {tuple(arrays)} and {tuple(fields)}", index)
        stored = {column: self._numbers(column, array, index) for column, array in arrays.items()}
        lengths = {column: len(array) for column, array in stored.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise _wrong(self.path, f"arrays of row {index} must share one length above 0: {lengths}", index)
        row: dict[str, Any] = {
            **{name: self._plain_value(name, value, index) for name, value in fields.items()},
            "missing": False,
            "truncated": bool(truncated),
            "seq_len": next(iter(lengths.values())),
        }
        row |= self._unused_names(index)
        with _writing(self.path, index), self._one.turn(self._rows):
            try:
                for column, array in stored.items():
                    (self.path / row[column]).unlink(missing_ok=True)  # what it links to belongs to others
                    np.save(self.path / row[column], array, allow_pickle=False)
                _replace_json(self.path / "manifest.json", [*self._rows, row])
                self._make_table()
            except BaseException:
                for column in arrays:  # the space may be what is missing
                    (self.path / row[column]).unlink(missing_ok=True)
                with suppress(OSError):  # the row may be in it already, as after Ctrl-C
                    _replace_json(self.path / "manifest.json", self._rows)
                raise
        self._rows.append(row)
        self._used.update(row[column] for column in arrays)
        return index

    def _unused_names(self, index: int) -> dict[str, str]:
        """Return names of files by the row's number, or by the next one that no row has (if one was taken out)."""
        while True:
            names = {column: f"{column}_{index}.npy" for column in self.array_columns}
            if self._used.isdisjoint(names.values()):
                return names
            index += 1

    def _make_table(self) -> None:
        """Write the schema, if it is not written yet; it says that there is a table, so it comes last."""
        if self._schema is not None:
            _replace_json(self.path / "schema.json", self._schema)
            self._schema = None

    def _numbers(self, column: str, array: Any, index: int) -> np.ndarray:
        """Return an array as it is stored: numbers of at most 64 bits with a frame axis, in native byte order."""
        if np.ma.is_masked(array):
            raise _wrong(self.path, f"{column!r} of row {index} has masked values; fill them first", index)
        try:
            values = np.asarray(array)
        except (TypeError, ValueError, RuntimeError) as error:  # a ragged list, or a tensor that numpy cannot have
            text = f"{column!r} of row {index} is no array: {one_line(error)}"
            raise _wrong(self.path, text, index) from error
        odd = values.dtype.kind not in "biuf" or values.dtype.itemsize > 8 or values.ndim == 0
        if odd or not np.isfinite(values).all():  # no reader would take it
            text = f"must be {'' if odd else 'finite '}numbers [n, ...], got {values.dtype} {list(values.shape)}"
            raise _wrong(self.path, f"{column!r} of row {index} {text}", index)
        return np.ascontiguousarray(values, values.dtype.newbyteorder("="))

    def _plain_value(self, name: str, value: Any, index: int) -> Any:
        """Return a field as JSON has it, a number of numpy's as a plain one."""
        plain = value.item() if isinstance(value, np.generic) or (hasattr(value, "item") and value.ndim == 0) else value
        try:
            json.dumps(plain, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            text = f"cannot be written as JSON: {one_line(repr(value), 80)}"
            raise _wrong(self.path, f"{name!r} of row {index} {text}", index) from error
        return plain

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """Return the manifest's entries so far, those of earlier writers included."""
        return tuple(self._rows)

    @property
    def source(self) -> dict[str, Any] | None:
        """Return what `set_source` wrote to this folder, or None.

        Raises:
            DataError: the file is not a JSON object.
        """
        return read_source(self.path)

    def set_source(self, source: Mapping[str, Any]) -> None:
        """Keep what makes the rows, JSON-ready, for whoever appends to them.

        Raises:
            DataError: the folder cannot be written.
        """
        with _writing(self.path):
            _replace_json(self.path / "source.json", dict(source))

    def __len__(self) -> int:
        return len(self._rows)


def read_source(folder: Path) -> dict[str, Any] | None:
    """Return what `NpyTableWriter.set_source` wrote to a table's folder, or None.

    Raises:
        DataError: the file is not a JSON object.
    """
    file = folder / "source.json"
    return _read_json(file, dict) if file.exists() else None


def _wrong(path: Path, text: str, index: int | None = None) -> DataError:
    return DataError(f"{path}: {text}", path=path, index=index)


def _flag(value: Any, name: str, index: int, path: Path) -> bool:
    """Return a flag of the manifest: true, false, 1 or 0; absent and null are false. Text would count as true."""
    if value is None or isinstance(value, bool) or (type(value) is int and value in (0, 1)):
        return bool(value)
    text = f"{name!r} of row {index} must be true or false, got {one_line(repr(value), 80)}"
    raise _wrong(path / "manifest.json", text, index)


def _read_json(path: Path, kind: type) -> Any:
    try:
        text = read_regular(path, MAX_JSON_BYTES, inside=path.parent).decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except (FileNotFoundError, NotADirectoryError) as error:
        made = "`owl-wms data make` makes a table of the rendered game, `owl-wms data import` one of your files"
        raise _wrong(path, f"no such file, so this is no table; {made}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or (
            "nested too deeply" if isinstance(error, RecursionError) else error
        )
        raise _wrong(path, f"cannot read this part of a table: {one_line(reason)}") from error
    if not isinstance(value, kind):
        raise _wrong(path, f"must hold a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a key that stands twice, JSON's readers take the one or the other."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _replace_json(path: Path, value: Any) -> None:
    with written_whole(path) as draft:
        draft.write_text(json.dumps(value), encoding="utf-8")


@contextmanager
def _writing(path: Path, index: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "" if index is None else f"row {index} "
        raise _wrong(path, f"{what}cannot be written: {why_unwritten(error)}", index) from error
