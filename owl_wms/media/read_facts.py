"""Finds the facts that a file carries about itself, whatever its form (`owl_wms.media.facts` lists where they are).

Usage:
    facts = read_facts("clip.safetensors")
    for sentence in facts.otherwise(vae_scale=1.0): ...      # values that a caller gave and the file contradicts
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from owl_wms.errors import DataError
from owl_wms.files import at_home, one_line, open_regular, read_regular
from owl_wms.interrupts import raise_interrupt
from owl_wms.media.facts import MEMBER, METADATA_KEY, Facts, facts_of_text
from owl_wms.media.watch import comment_of
from owl_wms.vae.weight_files import files_of

_MAX_BYTES = 1 << 16
_HEADER_BYTES = 100 << 20  # the longest header that safetensors reads


def read_facts(path: Path | str) -> Facts:
    """Return what a file of latents or a clip says about itself; nothing where it says nothing.

    Raises:
        DataError: no such file, one that cannot be read, or facts that cannot be.
    """
    path = at_home(path)
    return _read(path, lambda: _text_of(path))


def facts_of_bytes(data: bytes, path: Path) -> Facts:
    """Return what the bytes of a file of arrays say about themselves; `path` is its name, whose ending counts.

    Raises:
        DataError: facts that cannot be read.
    """
    return _read(path, lambda: _text_in(io.BytesIO(data), path.suffix.lower()))


def _read(path: Path, text_of: Callable[[], str | bytes | None]) -> Facts:
    try:
        return facts_of_text(text_of(), path)
    except DataError:
        raise
    except Exception as error:  # damaged archives and headers raise what their parsers raise
        raise_interrupt(error)
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, zipfile.BadZipFile):
            reason = "its archive is damaged or cut short"
        raise DataError(f"{path}: cannot be read: {one_line(reason)}", path=path) from error


def _text_of(path: Path) -> str | bytes | None:
    suffix = path.suffix.lower()
    if path.is_dir():
        source = path / "source.json"
        return read_regular(source, _MAX_BYTES, inside=path) if source.exists() else None
    with open_regular(path) as file:
        text = _text_in(file, suffix)
    if suffix == ".mp4":
        text = comment_of(path)
        return text if text is not None and text.startswith("{") else None
    return text


def _text_in(file: BinaryIO, suffix: str) -> str | bytes | None:
    """Returns the text of the facts in an open file of arrays."""
    head = file.read(8)
    if suffix == ".safetensors":
        length, header = int.from_bytes(head, "little"), b""
        if length <= _HEADER_BYTES:
            header = file.read(length)
        if len(head) < 8 or len(header) < length:
            raise ValueError("its header is truncated")
        metadata = json.loads(header).get("__metadata__") or {}
        return str(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
    if suffix == ".pt" and head.startswith(b"PK\x03\x04"):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.filename.rpartition("/")[2] == MEMBER and info.file_size <= _MAX_BYTES:
                    return archive.read(info)
    return None


def weights_digest(path: Path | str) -> str | None:
    """Return the SHA-256 of a file of weights, as files of latents state it; None for a folder or shards of several.

    Raises:
        OSError: it cannot be read.
        CheckpointError: an index of shards that cannot be used.
    """
    path = at_home(path)
    return file_digest(path) if path.is_file() and files_of(path) == [path] else None


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
        return found.hexdigest()
