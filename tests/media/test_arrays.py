"""Array files: each form comes back, each bad file is one DataError that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from owl_wms.errors import DataError
from owl_wms.media.arrays import ARRAY_SUFFIXES, load_array, load_latents, save_array


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_every_form_round_trips(tmp_path: Path, suffix: str) -> None:
    latents = torch.randn(3, 4, 2, 2)
    save_array(tmp_path / f"deep/x{suffix}", latents)
    assert torch.equal(load_array(tmp_path / f"deep/x{suffix}"), latents)
    assert load_latents(tmp_path / f"deep/x{suffix}", channels=4).shape == (1, 3, 4, 2, 2)


def test_ranks_and_named_tensors(tmp_path: Path) -> None:
    torch.save({"latents": torch.zeros(2, 3, 4, 2, 2), "mouse": torch.zeros(3, 2)}, tmp_path / "a.pt")
    assert load_latents(tmp_path / "a.pt").shape == (2, 3, 4, 2, 2)
    torch.save(torch.zeros(4, 2, 2), tmp_path / "b.pt")
    assert load_latents(tmp_path / "b.pt").shape == (1, 1, 4, 2, 2)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    torch.save(torch.randn(64, 4, 2, 2), folder / "cut.pt")
    (folder / "cut.pt").write_bytes((folder / "cut.pt").read_bytes()[:500])
    save_file({"latents": torch.randn(8, 4, 2, 2)}, folder / "cut.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-40])
    np.save(folder / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    torch.save(Path, folder / "code.pt")
    (folder / "folder.pt").mkdir()
    (folder / "empty.npy").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("version https://example.org")
    (folder / "key.pt").write_bytes(b"\x80\x02e")
    torch.save(torch.zeros(3, 4), folder / "rank.pt")
    torch.save(torch.zeros(0, 4, 2, 2), folder / "none.pt")
    torch.save(torch.zeros(2, 4, 2, 2, dtype=torch.int64), folder / "ints.pt")
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / "two.pt")
    torch.save([1, 2], folder / "list.pt")
    nan = torch.zeros(3, 4, 2, 2)
    nan[2, 0, 0, 0] = torch.nan
    torch.save(nan, folder / "nan.pt")
    torch.save(torch.zeros(3, 5, 2, 2), folder / "channels.pt")
    (folder / "x.txt").write_text("no")
    return {
        "missing": (folder / "nowhere.pt", "no such file"),
        "cut pt": (folder / "cut.pt", "cannot be read as .pt: the file is truncated"),
        "cut safetensors": (folder / "cut.safetensors", "cannot be read as .safetensors"),
        "pickled numpy": (folder / "object.npy", "cannot be read as .npy"),
        "pickled code": (folder / "code.pt", "pickled code is not run"),
        "folder": (folder / "folder.pt", "is a folder, a file is wanted"),
        "empty": (folder / "empty.npy", "cannot be read as .npy: it is empty"),
        "empty safetensors": (folder / "empty.safetensors", "cannot be read as .safetensors: it is empty"),
        "empty pt": (folder / "empty.pt", "cannot be read as .pt: it is empty"),
        "text": (
            folder / "text.pt",
            "it is a pointer of Git LFS and not the file itself; run git lfs pull in its repository",
        ),
        "damaged pickle": (folder / "key.pt", "the file is damaged|or is damaged"),
        "rank": (folder / "rank.pt", r"got \[3, 4\]"),
        "no frames": (folder / "none.pt", "has no frames"),
        "integers": (folder / "ints.pt", "floating point, got torch.int64"),
        "two tensors": (folder / "two.pt", "it holds a, b"),
        "list": (folder / "list.pt", "holds a list"),
        "not finite": (folder / "nan.pt", "frame 2 has values that are not finite"),
        "channels": (folder / "channels.pt", "takes 4 latent channels, got 5"),
        "ending": (folder / "x.txt", "must be one of"),
    }


def test_bad_files_are_named(tmp_path: Path) -> None:
    for name, (path, message) in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=message) as caught:
            load_latents(path, channels=4)
        assert caught.value.path == path, name
        assert str(path) in str(caught.value)


def test_a_truncated_file_says_so_wherever_it_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(torch.randn(64, 4, 8, 8), path)
    whole = path.read_bytes()
    for size in (5, 500, len(whole) // 2, 40_000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="truncated") as caught:
            load_latents(path)
        assert "Errno" not in str(caught.value)


def test_unwritable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_array(tmp_path / "file" / "x.pt", torch.zeros(1))
    with pytest.raises(DataError, match="must be one of"):
        save_array(tmp_path / "x.bin", torch.zeros(1))
