"""Records what became of every item, so that a run that was killed goes on where it ended.

Each block of a run has one part file of JSON lines. An item's lines are `begin`, `placing` (its outputs are finished,
with their hashes, and are about to get their names) and `done` or `failed`. A process that dies leaves at worst half a
line, which readers pass over. If an item has `placing` and no `done`, its outputs may have their names already: they
are hashed, and what agrees counts as done without being decoded again.

An object store has no appending: there the part is uploaded when the block begins and when it ends, and a killed
worker's block is decoded again into the same names.

Usage:
    ledger = Ledger(store)
    index = ledger.index()
    if not index.is_done(key): ...
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from owl_wms.batch.store import FOLDER, Store

PARTS = f"{FOLDER}/parts"
FAILED = f"{FOLDER}/failed.jsonl"
Line = dict[str, Any]
_OWN = ("event", "key", "at", "part")  # fields of a line that are not copied from `placing` to `done`
_HAS: dict[str, dict[str, type]] = {
    "placing": {"item": str, "outputs": list},
    "done": {"item": str, "outputs": list, "frames": int},
    "failed": {"item": str},
}
"""What lines of an event have beside it, key and time."""


def run_name(before: str | None = None) -> str:
    """Returns a name for a run; later ones sort behind earlier ones. A part's name goes on with rank and number.

    Args:
        before: name of the last run, whose names are to sort before this one's also where the clock was set back.
    """
    last = (before or "").partition("-")[0]
    now = max(time.time_ns(), int(last) + 1 if last.isascii() and last.isdecimal() else 0)
    return f"{now:020d}-{os.getpid()}"


def _rank_of(part: str) -> int:
    rank = part.split("-")[2:3]
    return int(rank[0]) if rank and rank[0].isdecimal() else 0


class Part:
    """The part file of one block, for appending; threads may share it."""

    def __init__(self, store: Store, name: str) -> None:
        """Opens the part and reads what an earlier attempt at the block wrote."""
        self._store, self._name = store, f"{PARTS}/{name}.jsonl"
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._file: int | None = None
        earlier = b""
        if store.is_local:
            path = Path(store.path(self._name))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            earlier = path.read_bytes()
            if earlier and not earlier.endswith(b"\n"):  # the attempt was killed while it wrote
                os.write(self._file, b"\n")
        else:
            earlier = store.read(self._name) or b""
            self._lines = [earlier] if earlier else []
        self.earlier = list(parsed(earlier))
        self.changed = False

    def add(self, event: str, key: str, **facts: Any) -> None:
        """Appends a line.

        Raises:
            OSError: it cannot be written.
        """
        line = json.dumps({"event": event, "key": key, "at": round(time.time(), 3), **facts}).encode() + b"\n"
        with self._lock:
            if self._file is None:
                self._lines.append(line)
                self.changed = True
                return
            while line:  # a full disk takes the beginning of a line; readers pass over it
                line = line[os.write(self._file, line) :]

    def add_done(self, placing: Line) -> None:
        """Appends `done` with the facts of a `placing` line.

        Raises:
            OSError: it cannot be written.
        """
        self.add("done", placing["key"], **{name: fact for name, fact in placing.items() if name not in _OWN})

    def upload(self) -> None:
        """Makes the lines so far visible in an object store; local lines are visible already.

        Raises:
            OSError: they cannot be written.
        """
        with self._lock:
            if self._file is None and self.changed:
                self._store.write(self._name, b"".join(self._lines))
                self.changed = False

    def close(self) -> None:
        """Flushes the part to the disk, or uploads it.

        Raises:
            OSError: it cannot be written.
        """
        self.upload()
        with self._lock:
            if self._file is not None:
                try:
                    os.fsync(self._file)
                finally:
                    os.close(self._file)
                    self._file = None


def parsed(data: bytes) -> Iterator[Line]:
    """Yields the lines of a part that are whole; what a damaged disk made of others is passed over."""
    for text in data.split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict):
            continue
        needed: dict[str, Any] = {"key": str, "event": str, "at": (int, float), **_HAS.get(str(line.get("event")), {})}
        whole = all(isinstance(line.get(name), kind) for name, kind in needed.items()) and math.isfinite(line["at"])
        if whole and line["key"].isascii() and all(map(_is_output, line.get("outputs", ()))):
            yield line


def _is_output(found: Any) -> bool:
    texts = [found.get("name"), found.get("sha256")] if isinstance(found, dict) else [None]
    return all(isinstance(text, str) and "\0" not in text for text in texts)


def are_placed(store: Store, placing: Line) -> bool:
    """Returns whether the outputs of a `placing` line have their names, by their hashes."""
    return all(store.digest(output["name"]) == output["sha256"] for output in placing["outputs"])


class Index:
    """The keys that are done, in a temporary SQLite file, so that memory does not grow with the dataset."""

    def __init__(self, kept: tuple[str, ...] = ("placing", "failed")) -> None:
        """Makes an empty index.

        Args:
            kept: events whose lines `lines` can give back.
        """
        self._kept = kept
        self._base = sqlite3.connect("")  # an empty name is a temporary file, removed when it is closed
        self._base.execute("PRAGMA cache_size=-8192")
        self._base.execute(
            "CREATE TABLE state (key BLOB PRIMARY KEY, event TEXT, line TEXT, frames INTEGER) WITHOUT ROWID"
        )
        self._base.execute("CREATE TABLE made (name BLOB PRIMARY KEY, url BLOB, key BLOB) WITHOUT ROWID")

    @property
    def frames(self) -> int:
        """Returns the frames of all items that are done."""
        return int(self._base.execute("SELECT total(frames) FROM state WHERE event = 'done'").fetchone()[0])

    def take(self, lines: Iterable[Line]) -> None:
        """Takes lines in the order in which they were written.

        A `done` holds until it is `lost`, or until outputs of another state of the input have taken its names.
        """
        for line in lines:
            key, event = line["key"].encode(), str(line.get("event"))
            if event != "lost" and self.is_done(line["key"]):
                continue
            if event == "done" and isinstance(line.get("name"), str):
                name = os.fsencode(line["name"])
                self._base.execute("DELETE FROM state WHERE key = (SELECT key FROM made WHERE name = ?)", (name,))
                self._base.execute(
                    "INSERT OR REPLACE INTO made VALUES (?, ?, ?)", (name, os.fsencode(line["item"]), key)
                )
            kept = json.dumps(line) if event in self._kept else ""
            row = key, event, kept, line["frames"] if event == "done" else 0
            self._base.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", row)

    def is_done(self, key: str) -> bool:
        """Returns whether the item's outputs are in place."""
        row = self._base.execute("SELECT event FROM state WHERE key = ?", (key.encode(),)).fetchone()
        return row is not None and row[0] == "done"

    def made_of(self, name: str) -> str | None:
        """Returns the URL of the item whose outputs were last placed under an item's name, or None."""
        row = self._base.execute("SELECT url FROM made WHERE name = ?", (os.fsencode(name),)).fetchone()
        return None if row is None else os.fsdecode(row[0])

    def lines(self, event: str) -> Iterator[Line]:
        """Yields the last lines of the items whose last event is this one, of those that it holds."""
        for (text,) in self._base.execute("SELECT line FROM state WHERE event = ?", (event,)):
            yield json.loads(text)

    def close(self) -> None:
        """Removes the temporary file."""
        self._base.close()


class Ledger:
    """The parts of one generation."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def lines(self) -> Iterator[Line]:
        """Yields all lines, run after run, each with the name of its `part`."""
        for name in self.store.names(PARTS):
            for line in parsed(self.store.read(f"{PARTS}/{name}") or b""):
                yield {**line, "part": name}

    def index(self) -> Index:
        """Returns the state of every item that a run has touched."""
        index = Index()
        index.take(self.lines())
        return index

    def adopt(self, index: Index, run: str, share: tuple[int, int] = (0, 1)) -> int:
        """Records as done the items that a killed worker had placed but not recorded; returns how many.

        Args:
            index: receives them too.
            run: names the part.
            share: `(rank, world)`; each rank looks at what was placed under its own number, or under one that no
                rank has now. What another rank is placing at this moment is not lost, only not recorded yet.
        """
        rank, world = share
        found = []
        for line in index.lines("placing"):
            mine = _rank_of(line["part"]) % world == rank
            if mine and are_placed(self.store, line):
                found.append(line)
        if found:
            part = Part(self.store, f"{run}--adopted-{rank}")  # is read before the run's blocks, as it is written
            for line in found:
                part.add_done(line)
            part.close()
            index.take({**line, "event": "done"} for line in found)
        return len(found)

    def write_failures(self, *, shared: bool = False) -> int:
        """Writes `failed.jsonl` anew, the items whose last outcome is a failure; returns how many.

        Args:
            shared: other ranks may write it too. It is then read and written until nothing has changed, so that the
                last writer's file has the failures of all ranks.
        """
        written = None
        while True:
            failed = self._failures()
            if failed == written:
                return len(failed)
            self.store.write(FAILED, "".join(text + "\n" for text in failed.values()).encode())
            if not shared:
                return len(failed)
            written = failed

    def _failures(self) -> dict[str, str]:
        failures = Failures()
        for line in self.lines():
            failures.take(line)
        return failures.by_item


class Failures:
    """The items whose last outcome is a failure, by URL: an input that changed has another key and is the same item."""

    def __init__(self) -> None:
        self.by_item: dict[str, str] = {}

    def take(self, line: Line) -> None:
        """Takes the next line of the ledger."""
        if line.get("event") == "failed":
            self.by_item[line["item"]] = json.dumps({name: line.get(name) for name in ("item", "reason", "remedy")})
        elif line.get("event") == "done":
            self.by_item.pop(line["item"], None)
