"""Tensors of a safetensors file, read by threads: the library's values, in memory of their own, and no damaged file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from owl_wms.errors import CheckpointError
from owl_wms.vae import pieces
from owl_wms.vae.pieces import DTYPES, read_pieces, safetensors_places
from owl_wms.vae.weight_files import read_content


def written(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file with every dtype that the library knows, an empty tensor, a scalar, and one of several pieces."""
    bits = torch.randint(0, 2, (48,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    state = {f"of.{dtype}": bits.view(dtype).reshape(2, -1).clone() for dtype in DTYPES.values()}
    state |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "long": torch.arange(5000, dtype=torch.int16)}
    save_file(state, folder / "a.safetensors", metadata={"dtype": "none of these"})
    return folder / "a.safetensors", state


def test_the_values_are_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    path, state = written(tmp_path)
    with torch.device("meta"), path.open("rb") as file:
        places = safetensors_places(file)
        assert places is not None
        found = read_pieces(file, places)
    wanted = load_file(path)
    assert found.keys() == wanted.keys() == state.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape, value.device.type) == (wanted[name].dtype, wanted[name].shape, "cpu")
        assert bytes(value.reshape(-1).view(torch.uint8)) == bytes(wanted[name].reshape(-1).view(torch.uint8))
        assert value.untyped_storage().nbytes() == value.nbytes, "shares memory with another tensor"
        value.zero_()


def test_damaged_files_are_left_to_the_library(tmp_path: Path) -> None:
    whole = written(tmp_path)[0].read_bytes()
    length = int.from_bytes(whole[:8], "little")
    damaged = [whole[:cut] for cut in (1, 7, 8, 9, length, 8 + length, len(whole) - 1)]
    damaged += [whole + b"\0", (1 << 62).to_bytes(8, "little") + whole[8:], whole[:8] + b"[" + whole[9:]]
    damaged += [whole.replace(b'"shape":[2,', b'"shape":[3,', 1), whole.replace(b'"F64"', b'"F99"', 1)]
    for at, data in enumerate(damaged):
        path = tmp_path / f"{at}.safetensors"
        path.write_bytes(data)
        with path.open("rb") as file:
            assert safetensors_places(file) is None, at
        with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
            read_content(path)


def test_another_wording_of_the_library_costs_only_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = written(tmp_path)
    monkeypatch.setattr(pieces, "_ONLY_DATA_MISSING", ())
    with path.open("rb") as file:
        assert safetensors_places(file) is None
    assert read_content(path).keys() == state.keys()


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    with path.open("rb") as file:
        places = safetensors_places(file)
        assert places is not None
        os.truncate(path, 4000)
        with pytest.raises(ValueError, match="became shorter"):
            read_pieces(file, places)


def test_the_installed_library_says_that_only_data_is_missing(tmp_path: Path) -> None:
    whole = written(tmp_path)[0].read_bytes()
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(whole[: 8 + int.from_bytes(whole[:8], "little")])
    assert any(text in str(caught.value) for text in pieces._ONLY_DATA_MISSING)
