"""Reads what `torch.save` wrote without running code from it: weights, latents, checkpoints of runs.

Why not `torch.load` alone: its safe reader refuses numbers and arrays of numpy, paths and plain records of settings,
which stand beside tensors in many files, and which run nothing either.

Usage:
    content = load_torch("step_100.pt")
"""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import re
import threading
import types
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from owl_wms import env

FORBIDDEN = re.compile(r"[Uu]nsupported (global|GLOBAL|class)|unrecognized function|Can only build|not allowed")
"""Begins torch's refusal to run code, as opposed to bytes that it cannot parse."""
_LARGE = 1 << 26
_turn = threading.RLock()  # torch has one list of what is allowed, for all threads


def _renew() -> None:
    """For a forked child, a loader's worker for example: another thread of the parent may have had the turn."""
    global _turn
    _turn = threading.RLock()


env.after_fork(_renew)


def load_torch(file: Path | str | BinaryIO, *, device: str = "cpu") -> Any:
    """Returns the content of a file, as it was saved.

    Args:
        file: a path, or a file that is open at its beginning.
        device: where tensors are put; on `meta` their values are not read.

    Raises:
        pickle.UnpicklingError: damaged bytes, or objects that would run code (`FORBIDDEN` is in the text).
        Exception: whatever else damaged bytes lead `torch.load` to raise.
    """
    if not _is_refused_when_large(file):
        try:
            return _load(file, device)
        except pickle.UnpicklingError as error:
            if not FORBIDDEN.search(str(error)):
                raise
        if not isinstance(file, (Path, str)):
            file.seek(0)
    with _turn:
        taken = {*torch.serialization.get_safe_globals()}  # the caller's own are allowed before and afterwards
        with torch.serialization.safe_globals([entry for entry in _harmless() if entry not in taken]):
            return _load(file, device)


def _is_refused_when_large(file: Path | str | BinaryIO) -> bool:
    """Returns whether a large file names classes that torch alone refuses, perhaps behind gigabytes of tensors.

    A look at the names takes some milliseconds, which small files are not worth.
    """
    if isinstance(file, (Path, str)):
        with open(file, "rb") as opened:
            return _is_refused_when_large(opened)
    if file.seek(0, os.SEEK_END) < _LARGE:
        file.seek(0)
        return False
    file.seek(0)
    try:
        return bool(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # damaged, or the older form: whoever reads it says so
        return False
    finally:
        file.seek(0)


def _load(file: Path | str | BinaryIO, device: str) -> Any:
    with warnings.catch_warnings():  # a damaged file is one error, and not also a remark on its pickle protocol
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(file, map_location=device, weights_only=True, mmap=False)


def _harmless() -> list[Any]:
    """Returns classes that stand beside weights in many checkpoints and whose construction runs nothing of the file's.

    Numbers and arrays of numpy under the module names of both its generations, and plain records of settings.
    """
    multiarray = "numpy._core.multiarray", "numpy.core.multiarray"
    scalar, rebuild = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    types_of_numbers = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}
    paths = [(pathlib.PurePosixPath, f"pathlib{m}.{n}Path") for m in ("", "._local") for n in ("Posix", "PurePosix")]
    return [
        *((scalar, f"{module}.scalar") for module in multiarray),
        *((rebuild, f"{module}._reconstruct") for module in multiarray),
        np.ndarray,
        np.dtype,
        *types_of_numbers,
        *paths,
        argparse.Namespace,
        types.SimpleNamespace,
    ]
