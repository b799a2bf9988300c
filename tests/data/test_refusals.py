"""Data that would ruin a run is refused where it is read, with file and row, also out of a worker process.

Run: python -m pytest tests/data/test_refusals.py
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from owl_wms.data.loaders import get_loader
from owl_wms.data.npy_table import NpyTable, NpyTableWriter
from owl_wms.errors import ConfigError, DataError
from tests.data.test_loaders import COLUMNS, kwargs, write


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("data_id", ["cod", "sequence_packing"])
def test_a_frame_that_is_not_finite_names_file_row_and_frame(tmp_path: Path, value: float, data_id: str) -> None:
    write(tmp_path)
    latents = np.load(tmp_path / "depth_latent_1.npy")
    latents[5, 0] = value
    np.save(tmp_path / "depth_latent_1.npy", latents)
    with pytest.raises(DataError, match=r"depth_latent_1\.npy: frame 5 of 'depth_latent' in row 1") as caught:
        list(get_loader(data_id, 1, **kwargs(tmp_path, stride=1) if data_id == "cod" else kwargs(tmp_path)))
    assert (caught.value.path, caught.value.index) == (tmp_path / "depth_latent_1.npy", 1)
    # Frames before it are still good.
    assert np.isfinite(NpyTable(tmp_path).slice(1, "depth_latent", 0, 5)).all()


def test_an_error_of_a_worker_is_the_error_itself(tmp_path: Path) -> None:
    write(tmp_path)
    mouse = np.load(tmp_path / "mouse_2.npy")
    mouse[:] = np.nan
    np.save(tmp_path / "mouse_2.npy", mouse)
    with pytest.raises(DataError) as caught:
        list(get_loader("cod", 1, **kwargs(tmp_path, num_workers=1)))
    assert (caught.value.path, caught.value.index) == (tmp_path / "mouse_2.npy", 2)
    assert str(caught.value).startswith(f"{tmp_path / 'mouse_2.npy'}: frame")
    assert "Traceback" not in str(caught.value)


def test_data_errors_survive_pickling() -> None:
    copy = pickle.loads(pickle.dumps(DataError("text", path="a/b", index=3)))
    assert (str(copy), copy.path, copy.index) == ("text", Path("a/b"), 3)


def test_a_row_of_another_shape_or_kind_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    np.save(tmp_path / "depth_latent_2.npy", np.zeros((12, 5, 1, 1), np.float32))
    with pytest.raises(DataError, match=r"row 2 are \[5, 1, 1\], those of row 0 are \[2, 1, 1\]") as caught:
        NpyTable(tmp_path)
    assert (caught.value.path, caught.value.index) == (tmp_path / "depth_latent_2.npy", 2)
    np.save(tmp_path / "depth_latent_2.npy", np.full((12, 2, 1, 1), "x"))
    with pytest.raises(DataError, match="row 2 must hold numbers, found <U1"):
        NpyTable(tmp_path)


@pytest.mark.parametrize("window", ["4", 4.0, True, 0])
@pytest.mark.parametrize("data_id", ["cod", "sequence_packing", "cod_s3"])
def test_a_window_length_is_a_whole_number(tmp_path: Path, window: object, data_id: str) -> None:
    NpyTableWriter(tmp_path, COLUMNS)
    given = {"window_length": window} if data_id == "cod_s3" else kwargs(tmp_path, window=window)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="window_length must be a whole number and at least 1") as caught:
        next(iter(get_loader(data_id, 1, **{**given, "num_workers": 0})))
    assert caught.value.key == "window_length"


def test_a_folder_without_a_table_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(DataError, match=r"schema\.json: no such file, so this is no table; `owl-wms data make`"):
            NpyTable(path)
