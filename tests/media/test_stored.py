"""Latents are read where they lie in their file: right values of every layout, and an error for a file cut short."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.serialization import config

from owl_wms.errors import DataError
from owl_wms.media import latents as latents_module
from owl_wms.media.arrays import ARRAY_SUFFIXES, load_latents, save_array
from owl_wms.media.facts import Facts
from owl_wms.media.latents import LatentFile
from owl_wms.models.latents import Whitener
from owl_wms.vae import read_state_dict

Z = torch.randn(2, 5, 4, 32, 48, generator=torch.Generator().manual_seed(0))
# Name -> what is saved as .pt, and whether it can be read where it lies.
LAYOUTS: dict[str, tuple[Any, bool]] = {
    "rank 5": (Z, True),
    "rank 4": (Z[0].clone(), True),
    "rank 3": (Z[0, 0].clone(), True),
    "tiny frames": (Z[..., :2, :3].clone(), True),
    "clips cut out of longer ones": (Z[:, 1:4], True),
    "every second frame": (Z[:, ::2], True),
    "channels last": (Z[0].contiguous(memory_format=torch.channels_last), True),
    "channels before frames": (Z.transpose(1, 2).contiguous().transpose(1, 2), True),
    "frames before clips": (Z.transpose(0, 1).contiguous().transpose(0, 1), True),
    "one of several": ({"mouse": torch.ones(5, 2), "latents": Z, "mask": torch.ones(5)}, True),
    "under another name": ({"z": Z}, True),
    "beside numbers of numpy": ({"latents": Z, "seed": np.int64(7), "fps": np.float32(20)}, True),
    "array of numpy": (Z.numpy(), False),
    "array of numpy under a name": ({"latents": Z[0].numpy().astype(">f4"), "mouse": np.ones((5, 2))}, False),
    "two views of one storage": ({"first": Z[:1], "latents": Z[1:]}, True),
    "parameter": (torch.nn.Parameter(Z[0]), True),
    "bf16": (Z.bfloat16(), True),
    "float64": (Z.double(), True),
    "float8": (Z.to(torch.float8_e4m3fn), True),
    "columns before rows": (Z.transpose(3, 4).contiguous().transpose(3, 4), True),
    "frames innermost": (Z.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3), False),
    "cut at its edges": (Z[..., 1:-1], False),
    "one clip, repeated": (Z[:1].expand(1, 5, 4, 32, 48), True),
    "negative": (torch._neg_view(Z), False),
}


def same_in_pieces(source: LatentFile, path: Path) -> None:
    whole = load_latents(path)
    assert source.shape == tuple(whole.shape)
    frames = whole.flatten(0, 1)
    for start, stop in [
        (0, len(frames)),
        (0, 1),
        (len(frames) - 1, len(frames)),
        (len(frames) // 3, min(7, len(frames))),
    ]:
        assert torch.equal(source.read(start, stop), frames[start:stop]), (start, stop)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    value, in_place = LAYOUTS[name]
    torch.save(value, tmp_path / "x.pt")
    source = LatentFile(tmp_path / "x.pt")
    assert (source._frames.file is not None) == in_place
    same_in_pieces(source, tmp_path / "x.pt")


def test_the_other_byte_order(tmp_path: Path) -> None:
    """Such a file is read whole: torch ends the process if it is to swap the bytes of values that it has not read."""
    torch.save(Z, tmp_path / "little.pt")
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "x.pt"))
    with zipfile.ZipFile(tmp_path / "little.pt") as archive:
        for name in ("data.pkl", "byteorder", "data/0"):
            data = archive.read(f"little/{name}")
            data = b"big" if name == "byteorder" else data
            data = np.frombuffer(data, "<f4").astype(">f4").tobytes() if name == "data/0" else data
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    source = LatentFile(tmp_path / "x.pt")
    assert source._frames.file is None
    same_in_pieces(source, tmp_path / "x.pt")
    assert torch.equal(source.read(0, 10), Z.flatten(0, 1))


def test_a_program_that_maps_all_files_of_torch(tmp_path: Path) -> None:
    """Weights would change with their file, and open files would be refused."""
    torch.save({"weight": Z}, tmp_path / "x.pt")
    with config.patch({"load.mmap": True}):
        assert torch.equal(load_latents(tmp_path / "x.pt"), Z)
        same_in_pieces(LatentFile(tmp_path / "x.pt"), tmp_path / "x.pt")
        weights = read_state_dict(tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("r+b") as file:
        file.write(bytes((tmp_path / "x.pt").stat().st_size))
    assert torch.equal(weights["weight"], Z)


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (Z[0, :1].expand(1 << 20, -1, -1, -1), "fewer values than its shape"),
        (torch.zeros(5, 4, 32, 48, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "cannot be converted"),
    ],
)
def test_what_the_reader_of_whole_files_refuses(tmp_path: Path, latents: torch.Tensor, said: str) -> None:
    torch.save(latents, tmp_path / "x.pt")
    for read in (load_latents, LatentFile):
        with pytest.raises(DataError, match=said):
            read(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.bin", "x"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    torch.save(Z, tmp_path / name)
    with pytest.raises(DataError, match="the ending must be one of"):
        LatentFile(tmp_path / name)


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_we_write(tmp_path: Path, suffix: str, rank: int, dtype: torch.dtype) -> None:
    path = tmp_path / f"x{suffix}"
    save_array(path, Z[(0,) * (5 - rank)].to(dtype), facts=Facts(fps=12.0))
    source = LatentFile(path)
    assert source._frames.file is not None
    same_in_pieces(source, path)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_order(tmp_path: Path, dtype: str, order: str) -> None:
    np.save(tmp_path / "x.npy", np.asarray(Z.numpy(), dtype=dtype, order=order))  # type: ignore[call-overload]
    source = LatentFile(tmp_path / "x.npy")
    assert (source._frames.file is not None) == (order == "C")
    same_in_pieces(source, tmp_path / "x.npy")


def test_safetensors_of_several_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "latents": Z.half(), "z": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    source = LatentFile(tmp_path / "x.safetensors")
    assert source._frames.file is not None
    same_in_pieces(source, tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.9])
def test_a_file_cut_short_between_a_look_at_it_and_the_read(
    tmp_path: Path, suffix: str, left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x{suffix}"
    save_array(path, Z)
    source = LatentFile(path)
    assert torch.equal(source.read(0, 3), Z[0, :3])
    monkeypatch.setattr(
        latents_module, "_version", lambda file: source._frames.version
    )  # what it looks at is as it was
    os.truncate(path, int(path.stat().st_size * left))
    with pytest.raises(DataError, match=rf"x\{suffix}: the file was changed while it was read; start again") as caught:
        source.read(0, 10)
    assert caught.value.path == path


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_a_file_that_is_written_while_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_array(path, Z)
    source = LatentFile(path)
    with path.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\0" * 9)
    os.utime(path, (1, 1))  # clocks of file systems are coarse
    with pytest.raises(DataError, match="the file was changed while it was read"):
        source.read(0, 1)


def lying_offset(path: Path) -> None:
    """The directory says another place for the values than their header does."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    raw[info.header_offset + 28 : info.header_offset + 30] = (500).to_bytes(2, "little")  # length of the extra field
    path.write_bytes(raw)


def lying_size(path: Path) -> None:
    """The pickle claims more values than the member has."""
    told, more = (b"M" + number.to_bytes(2, "little") for number in (Z.numel(), Z.numel() + 1))
    raw = path.read_bytes()
    assert told in raw
    path.write_bytes(raw.replace(told, more))


@pytest.mark.parametrize("lie", [lying_offset, lying_size])
def test_an_archive_that_lies_is_left_to_the_reader_of_whole_files(
    tmp_path: Path, lie: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    torch.save(Z, path)
    lie(path)
    asked: list[Path] = []

    def whole(path: Path) -> torch.Tensor:
        asked.append(path)
        return Z

    monkeypatch.setattr(latents_module, "load_array", whole)
    assert torch.equal(LatentFile(path).read(0, 10), Z.flatten(0, 1))
    assert asked == [path]


def test_an_open_file_is_closed_with_its_object(tmp_path: Path) -> None:
    save_array(tmp_path / "x.pt", Z)
    source = LatentFile(tmp_path / "x.pt")
    file = source._frames.file
    assert file is not None
    assert not file.closed
    del source
    assert file.closed


def test_a_transform_of_latents_is_not_mapped(tmp_path: Path) -> None:
    eye = torch.eye(4)
    Whitener(mean=torch.zeros(4), forward=eye, inverse=eye.clone()).save(tmp_path / "w.safetensors")
    loaded = Whitener.load(tmp_path / "w.safetensors")
    os.truncate(tmp_path / "w.safetensors", 0)  # a mapping would end the process here
    assert torch.equal(loaded.forward, eye)
