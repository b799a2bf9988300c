"""What every reader of outside files promises: a value, or one of our errors, in one line that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from owl_wms.errors import OwlError


def read_or_refuse(read: Callable[[Path], object], path: Path) -> bool:
    """Read a file and check the refusal, if it is one; returns whether it was read. Other errors propagate."""
    try:
        read(path)
        return True
    except OwlError as error:
        said = str(error)
    assert len(said.splitlines()) == 1, said
    assert str(path) in said, said
    assert "weights_only" not in said, said
    assert len(said) < 2000, said
    return False
