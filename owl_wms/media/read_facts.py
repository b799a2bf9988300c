"""Finds the facts that a file carries about itself, whatever its form (`owl_wms.media.facts` lists where they are).

Usage:
    facts = read_facts("clip.safetensors")
    for sentence in facts.otherwise(vae_scale=1.0): ...      # values that a caller gave and the file contradicts
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

from owl_wms.errors import DataError
from owl_wms.files import at_home, one_line, open_regular, read_exactly, read_regular, size_of
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
    try:
        return facts_of_text(_text_of(path), path)
    except DataError:
        raise
    except Exception as error:  # damaged archives and headers raise what their parsers raise
        raise_interrupt(error)
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: its facts cannot be read: {one_line(reason)}", path=path) from error


def _text_of(path: Path) -> str | bytes | None:
    suffix = path.suffix.lower()
    if path.is_dir():
        source = path / "source.json"
        return read_regular(source, _MAX_BYTES, inside=path) if source.exists() else None
    with open_regular(path) as file:
        size = size_of(file)
        if suffix == ".safetensors":
            length = int.from_bytes(read_exactly(file, 8), "little")
            if length > min(size - 8, _HEADER_BYTES):
                raise ValueError("its header is truncated")
            metadata = json.loads(read_exactly(file, length, 8)).get("__metadata__") or {}
            return str(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
        if suffix == ".pt" and read_exactly(file, min(4, size)) == b"PK\x03\x04":
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if info.filename.rpartition("/")[2] == MEMBER and info.file_size <= _MAX_BYTES:
                        return archive.read(info)
    if suffix == ".mp4":
        text = comment_of(path)
        return text if text is not None and text.startswith("{") else None
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
