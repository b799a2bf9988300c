"""Tables and loaders: what was written comes back, epochs reshuffle, positions resume, bad data names file and row.

Run: python -m pytest tests/data/test_loaders.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from owl_wms import env
from owl_wms.data.loaders import get_loader
from owl_wms.data.npy_table import NpyTable, NpyTableWriter
from owl_wms.data.packing import PackedDataset
from owl_wms.errors import ConfigError, DataError
from tests.process_state import set_in_process

COLUMNS = ("depth_latent", "mouse", "buttons")


def write(folder: Path, lengths: tuple[int, ...] = (10, 7, 12)) -> Path:
    """Clips whose latents say row and frame: value = 100 * row + frame."""
    writer = NpyTableWriter(folder, COLUMNS, columns=("seed",))
    for row, n in enumerate(lengths):
        frame = np.arange(n, dtype=np.float32)
        latents = np.broadcast_to((100 * row + frame)[:, None, None, None], (n, 2, 1, 1)).astype(np.float32)
        writer.append(
            {"depth_latent": latents, "mouse": np.stack([frame] * 2, 1), "buttons": np.ones((n, 11), np.uint8)},
            seed=row,
        )
    return folder


def kwargs(folder: Path, window: int = 4, **changes: object) -> dict[str, object]:
    return {
        "dataset_path": folder,
        "window_length": window,
        "batch_columns": list(COLUMNS),
        "num_workers": 0,
        **changes,
    }


def test_written_rows_come_back(tmp_path: Path) -> None:
    table = NpyTable(write(tmp_path))
    assert [row.length for row in table.rows] == [10, 7, 12]
    assert table.rows[2].fields["seed"] == 2
    assert table.slice(2, "depth_latent", 3, 5).ravel().tolist() == [203, 203, 204, 204]
    assert (tmp_path / "mouse_1.npy").exists()
    NpyTableWriter(tmp_path, COLUMNS, columns=("seed",)).append(
        {
            "depth_latent": np.zeros((3, 2, 1, 1), np.float32),
            "mouse": np.zeros((3, 2), np.float32),
            "buttons": np.zeros((3, 11), np.uint8),
        },
        seed=9,
    )
    assert len(NpyTable(tmp_path).rows) == 4


def test_a_writer_that_adds_nothing_leaves_a_table_as_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(NpyTableWriter(tmp_path, COLUMNS, columns=("seed",))) == 3
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_missing_rows_are_skipped_and_truncated_ones_kept_on_request(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest[0]["missing"], manifest[1]["truncated"] = True, True
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert [row.index for row in NpyTable(tmp_path).rows] == [1, 2]
    assert [row.index for row in NpyTable(tmp_path, keep_truncated=False).rows] == [2]


def test_windows_are_side_by_side_unless_a_stride_is_given(tmp_path: Path) -> None:
    write(tmp_path)
    seen = sorted(int(b[0][0, 0, 0, 0, 0]) for b in get_loader("cod", 1, **kwargs(tmp_path)))
    assert seen == [0, 4, 100, 200, 204, 208]
    sliding = get_loader("cod", 1, **kwargs(tmp_path, stride=1))
    assert len(list(sliding)) == 7 + 4 + 9


def test_batches_have_upstreams_types(tmp_path: Path) -> None:
    latents, mouse, buttons = next(iter(get_loader("cod", 2, **kwargs(write(tmp_path)))))
    assert latents.shape == (2, 4, 2, 1, 1)
    assert (latents.dtype, mouse.dtype, buttons.dtype) == (torch.bfloat16,) * 3


def test_epochs_differ_and_a_position_resumes(tmp_path: Path) -> None:
    write(tmp_path, (40, 40))

    def firsts(loader: object, count: int) -> list[float]:
        out: list[float] = []
        while len(out) < count:
            for batch in loader:  # type: ignore[attr-defined]
                out.append(float(batch[1][0, 0, 0]) + 100 * float(batch[0][0, 0, 0, 0, 0] >= 100))
                if len(out) == count:
                    break
        return out

    whole = firsts(get_loader("cod", 2, **kwargs(tmp_path)), 25)
    assert whole[:10] != whole[10:20]
    cut = get_loader("cod", 2, **kwargs(tmp_path))
    firsts(cut, 13)
    rest = get_loader("cod", 2, **kwargs(tmp_path))
    rest.load_state_dict(cut.state_dict())
    assert firsts(rest, 12) == whole[13:]


def test_ranks_share_an_epoch(tmp_path: Path) -> None:
    write(tmp_path, (16, 16))
    seen = [
        {
            float(b[0][i, 0, 0, 0, 0])
            for b in get_loader("cod", 2, rank=rank, world_size=2, **kwargs(tmp_path))
            for i in (0, 1)
        }
        for rank in (0, 1)
    ]
    assert len(seen[0]) == len(seen[1]) == 4
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_packing_covers_the_stream_and_reshuffles_each_epoch(tmp_path: Path, workers: int) -> None:
    write(tmp_path, (10, 7, 12, 5, 9, 8))
    loader = get_loader("sequence_packing", 1, **kwargs(tmp_path, window=6, num_workers=workers))
    epochs = []
    for _ in range(3):
        windows = sorted(
            (tuple(latents[0, :, 0, 0, 0].float().tolist()), tuple(doc[0].tolist())) for latents, _, _, doc in loader
        )
        assert len(windows) == 51 // 6
        for frames, docs in windows:
            # bfloat16 rounds above 256; rows say the same through doc_id, exactly
            assert [int(f) // 100 for f in frames if f < 256] == [
                d for f, d in zip(frames, docs, strict=True) if f < 256
            ]
        epochs.append(windows)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_packed_window_joins_clips_in_order(tmp_path: Path) -> None:
    dataset = PackedDataset(write(tmp_path, (5, 5)), 10, ("mouse",))
    mouse, doc = dataset[(0, 0)]
    assert mouse[:, 0].tolist() == [0, 1, 2, 3, 4] * 2
    assert sorted(doc.tolist()) == [0] * 5 + [1] * 5


def test_unknown_ids_and_keywords_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cod_s3_mixed"):
        get_loader("cods", 1)
    with pytest.raises(ConfigError, match="window_length"):
        get_loader("cod", 1, dataset_path=tmp_path, window=3)
    with pytest.raises(ConfigError, match=r"train\.batch_size must be 1 per rank, got 2"):
        get_loader("sequence_packing", 2, **kwargs(write(tmp_path)))


def test_bad_data_names_file_and_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"schema\.json"):
        NpyTable(tmp_path / "nowhere")
    write(tmp_path)
    with pytest.raises(DataError, match="no array column 'video'"):
        get_loader("cod", 1, **kwargs(tmp_path, batch_columns=["video"]))
    with pytest.raises(DataError, match="longest has 12"):
        get_loader("cod", 1, **kwargs(tmp_path, window=13))
    whole = (tmp_path / "mouse_1.npy").read_bytes()
    (tmp_path / "mouse_1.npy").write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"mouse_1\.npy") as torn:
        NpyTable(tmp_path)
    assert torn.value.index == 1
    np.save(tmp_path / "mouse_1.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match="row 1 differ in length"):
        NpyTable(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest[1]["mouse"] = "../mouse_0.npy"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no file of this folder"):
        NpyTable(tmp_path)


def test_a_writer_refuses_rows_that_do_not_fit(tmp_path: Path) -> None:
    writer = NpyTableWriter(tmp_path, COLUMNS)
    with pytest.raises(DataError, match="share one length"):
        writer.append({"depth_latent": np.zeros((3, 1)), "mouse": np.zeros((2, 2)), "buttons": np.zeros((3, 11))})
    with pytest.raises(DataError, match="must bring arrays"):
        writer.append({"mouse": np.zeros((2, 2))})
    with pytest.raises(DataError, match="other columns"):
        NpyTableWriter(tmp_path, ("video",))
    assert NpyTable(tmp_path).rows == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("data_id", ["cod", "sequence_packing"])
def test_batches_stay_on_the_cpu_beside_another_default_device(tmp_path: Path, data_id: str, workers: int) -> None:
    write(tmp_path)
    wanted = list(get_loader(data_id, 1, **kwargs(tmp_path)))
    with set_in_process("meta"):
        loader = get_loader(data_id, 1, **kwargs(tmp_path, num_workers=workers))
        got = list(loader)
        again = list(loader)
    assert len(again) == len(got) == len(wanted)
    for batch, other in zip(got, wanted, strict=True):
        assert all(torch.equal(part, whole) for part, whole in zip(batch, other, strict=True))


@pytest.mark.parametrize("data_id", ["cod", "sequence_packing"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("dataset_path", None), ("dataset_path", 5), ("batch_columns", None), ("batch_columns", 3)]
    + [("num_workers", value) for value in (-1, 1.5, "x", None, env.MOST_PROCESSES + 1, 2**31)]
    + [("include_truncated", value) for value in ("false", "0", None)]
    + [("seed", value) for value in (2**33, -(2**33), 1.5, None)],
)
def test_arguments_of_other_types_are_one_error(tmp_path: Path, data_id: str, name: str, value: Any) -> None:
    given = {"dataset_path": str(tmp_path), "window_length": 3, "batch_columns": ["mouse"], "num_workers": 0}
    with pytest.raises(ConfigError, match=name):
        get_loader(data_id, 1, **{**given, name: value})


def test_a_flag_may_be_a_number(tmp_path: Path) -> None:
    write(tmp_path)
    for flag in (1, True):
        assert next(iter(get_loader("cod", 1, **kwargs(tmp_path, include_truncated=flag))))


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_names_in_a_bucket_are_texts(value: Any) -> None:
    with pytest.raises(ConfigError, match="prefix cannot be"):
        get_loader("cod_s3", 1, window_length=3, prefix=value)
    with pytest.raises(ConfigError, match="bucket_name cannot be"):
        get_loader("cod_s3_mixed", 1, window_length=3, bucket_name=value)
