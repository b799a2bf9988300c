"""Array files that lie, change or come from elsewhere: the values, or one DataError of one line that names the file."""

from __future__ import annotations

import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from owl_wms.data.sources import clips_of
from owl_wms.errors import DataError, OwlError, printable
from owl_wms.media.arrays import ARRAY_SUFFIXES, load_array, load_latents, load_tensor_bytes, read_arrays, save_array
from owl_wms.media.facts import Facts
from owl_wms.media.frames import frame_batches
from owl_wms.media.latents import LatentFile
from owl_wms.media.npy import NpyFile
from owl_wms.media.read_facts import read_facts, weights_digest
from owl_wms.media.sinks import open_sink
from owl_wms.vae.weight_files import read_content
from tests.only_ours import read_or_refuse

Z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def refused(path: Path, words: str = "") -> str:
    with pytest.raises(DataError, match=words) as caught:
        load_latents(path)
    assert caught.value.path == path
    assert printable(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    return str(caught.value)


LIES: dict[str, tuple[Callable[[], Any], str]] = {
    "expanded": (lambda: torch.zeros(1).expand(1, 200_000, 4, 64, 64), "fewer values than its shape"),
    "one axis expanded": (lambda: torch.zeros(2, 1, 2, 2).expand(2, 4, 2, 2), "fewer values"),
    "overlapping": (lambda: torch.zeros(40).as_strided((9, 4, 4, 4), (1, 1, 1, 1)), "fewer values"),
    "sparse": (lambda: Z.to_sparse(), "a torch.sparse_coo tensor"),
    "compressed rows": (lambda: torch.eye(4).to_sparse_csr(), "a torch.sparse_csr tensor"),
    "meta": (lambda: Z.to("meta"), "on meta"),
    "nested": (lambda: torch.nested.nested_tensor([Z[0]]), "nested"),
    "quantised": (lambda: torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8), "quantised"),
    "complex": (lambda: Z.to(torch.complex64), "must be floating point"),
    "bool": (lambda: Z > 0, "must be floating point"),
    "in a mapping": (lambda: {"latents": Z.to_sparse(), "mouse": Z}, "sparse"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_ordinary(tmp_path: Path, name: str) -> None:
    make, words = LIES[name]
    torch.save(make(), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", words)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused_before_memory_is_taken(tmp_path: Path, method: int) -> None:
    torch.save(torch.zeros(1, 1, 4, 1024, 256), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as a, zipfile.ZipFile(tmp_path / "b.pt", "w", method) as b:
        for info in a.infolist():
            b.writestr(info.filename, a.read(info))
    refused(tmp_path / "b.pt", "is compressed, which torch.save never does")


def test_a_member_that_claims_more_than_the_file_has(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as b:
        b.writestr("x/data.pkl", b"")
        big = zipfile.ZipInfo("x/data/0")
        b.writestr(big, b"1234")
        big.file_size = big.compress_size = 1 << 34
    refused(tmp_path / "b.pt", "its members claim")


@pytest.mark.parametrize("name", ["damaged_directory.pt", "other_directory.pt"])
def test_an_archive_whose_directory_is_damaged_is_not_left_to_torch(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's reader took a size far beyond the file's from what is left of it."""
    asked: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda file, **_: asked.append(file))
    raw = (Path(__file__).parents[1] / "faults" / "corpus" / "weights" / name).read_bytes()
    (tmp_path / "x.pt").write_bytes(raw)
    for read in (load_latents, LatentFile, read_content):
        with pytest.raises(OwlError, match="its directory is damaged or missing"):
            read(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="its directory is damaged or missing"):
        load_tensor_bytes(raw)
    assert not asked


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_float8_is_widened(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    stored = Z.abs().to(dtype)
    if (dtype, suffix) == (torch.float8_e8m0fnu, ".safetensors"):
        with pytest.raises(DataError, match=r"use \.pt"):
            save_array(tmp_path / f"x{suffix}", stored)
        return
    save_array(tmp_path / f"x{suffix}", stored)
    assert torch.equal(load_latents(tmp_path / f"x{suffix}")[0], stored.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_floats_come_back(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    save_array(tmp_path / f"x{suffix}", Z.to(dtype))
    assert torch.equal(load_latents(tmp_path / f"x{suffix}")[0].double(), Z.to(dtype).double())


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
@pytest.mark.parametrize("view", ["slice", "expanded", "transposed", "parameter", "shared", "step"])
def test_a_view_is_saved_alone(tmp_path: Path, suffix: str, view: str) -> None:
    long = torch.randn(500, 16, 8, 8)
    made = {
        "slice": long[10:11], "expanded": long[:1, :1].expand(1, 4, 8, 8), "transposed": long[:2].transpose(2, 3),
        "parameter": torch.nn.Parameter(long[:1]), "shared": long[3:4], "step": long[:4:2, ::2],
    }[view]  # fmt: skip
    save_array(
        tmp_path / f"x{suffix}", {"latents": made, "again": made} if view == "shared" and suffix != ".npy" else made
    )
    assert torch.equal(load_array(tmp_path / f"x{suffix}"), made)
    assert (tmp_path / f"x{suffix}").stat().st_size < 2 * made.numel() * 4 + 8192


@pytest.mark.parametrize("tensor", [Z.to_sparse(), Z.to("meta"), torch.nested.nested_tensor([Z[0]])], ids=str)
@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_what_is_not_dense_is_not_written(tmp_path: Path, tensor: torch.Tensor, suffix: str) -> None:
    with pytest.raises(DataError, match="only dense tensors"):
        save_array(tmp_path / f"x{suffix}", tensor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [">f4", "<f4", ">f8", ">f2", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_any_byte_order_and_axis_order(tmp_path: Path, dtype: str, order: str) -> None:
    values = np.asarray(Z.numpy().astype(dtype), order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "x.npy", values)
    assert np.array_equal(load_latents(tmp_path / "x.npy")[0].numpy(), values)
    with NpyFile(tmp_path / "x.npy") as file:
        assert file.dtype.isnative
        assert np.array_equal(file.read(1, 3), values[1:3])


def header(text: str, version: bytes = b"\x01\x00", data: bytes = b"\0" * 64) -> bytes:
    raw = text.encode() + b"\n"
    return b"\x93NUMPY" + version + len(raw).to_bytes(4 if version[0] > 1 else 2, "little") + raw + data


FORM = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"
NPY = {
    "larger": (header(FORM.format("'<f4'", "(1, 99999999, 4, 999, 999)")), "truncated"),
    "overflow": (header(FORM.format("'<f4'", "(4294967296, 4294967296, 4294967296)")), "truncated"),
    "smaller": (header(FORM.format("'<f4'", "(1, 4, 1, 2)")), "longer than its header says"),
    "negative": (header(FORM.format("'<f4'", "(-1, 4, 2, 2)")), "claims the shape"),
    "objects": (header(FORM.format("'|O'", "(4,)")), "pickled objects"),
    "texts": (header(FORM.format("'<U4'", "(4,)")), "must hold numbers"),
    "times": (header(FORM.format("'<M8[s]'", "(4, 1, 1, 2)")), "must hold numbers"),
    "raw": (header(FORM.format("'|V2'", "(4, 2, 2, 2)")), "must hold numbers"),
    "records": (header(FORM.format("[('a', '<f4')]", "(4, 1, 2, 2)")), "must hold numbers"),
    "long": (header(FORM.format("'<f16'", "(1, 1, 2, 2)")), "must hold numbers"),
    "version 3": (header(FORM.format("'<f4'", "(4, 2, 2)"), b"\x03\x00"), "header is damaged"),
    "version 9": (header(FORM.format("'<f4'", "(4, 2, 2)"), b"\x09\x00"), "header is damaged"),
    "no header": (b"\x93NUMPY", "header is damaged"),
    "no end": (b"\x93NUMPY\x01\x00\xff\xff{", "header is damaged"),
    "code": (header("__import__('os').mkdir('ran')"), "header is damaged"),
    "nest": (header("(" * 5000), "header is damaged"),
    "text": (b"hello, here are no numbers", "header is damaged"),
    "empty": (b"", "it is empty"),
}


@pytest.mark.parametrize("name", NPY)
@pytest.mark.filterwarnings("error")
def test_npy_headers(tmp_path: Path, name: str) -> None:
    data, words = NPY[name]
    (tmp_path / "x.npy").write_bytes(data)
    refused(tmp_path / "x.npy", words)


def test_bytes_that_are_no_bool(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(header(FORM.format("'|b1'", "(3,)"), data=b"\0\1\2"))
    assert read_arrays(tmp_path / "x.npy").tolist() == [False, True, True]


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    refused(tmp_path / f"pipe{suffix}", "is a named pipe, a file is wanted")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        (tmp_path / "s").rename(tmp_path / f"socket{suffix}")
    refused(tmp_path / f"socket{suffix}", "No such device or address")
    for device in ("zero", "null", "urandom"):
        (tmp_path / f"{device}{suffix}").symlink_to(f"/dev/{device}")
        refused(tmp_path / f"{device}{suffix}", "is a device, a file is wanted")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    refused(tmp_path / f"loop{suffix}", "symbolic links")
    refused(Path(f"a\0b{suffix}"), "is no name of a file")
    refused(tmp_path / ("x" * 300 + suffix), "too long")


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_a_file_may_change_after_it_was_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_array(path, Z)
    held = load_array(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(10)
    assert torch.equal(held, Z)


def test_endings_in_capitals_and_names_of_255_bytes(tmp_path: Path) -> None:
    for suffix in (*ARRAY_SUFFIXES, ".PT", ".Npy", ".SafeTensors"):
        path = tmp_path / ("x" * (255 - len(suffix)) + suffix)
        save_array(path, Z)
        assert torch.equal(load_array(path), Z)
    with pytest.raises(DataError, match="File name too long"):
        save_array(tmp_path / ("x" * 253 + ".pt"), Z)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_facts_travel(tmp_path: Path, suffix: str) -> None:
    facts = Facts(fps=np.float32(12.5), vae_scale=0.34, vae="demo", vae_sha256="a" * 64, layout="n c h w")  # type: ignore[arg-type]
    save_array(tmp_path / f"x{suffix}", Z, facts=facts)
    assert read_facts(tmp_path / f"x{suffix}") == facts
    assert torch.equal(load_array(tmp_path / f"x{suffix}"), Z)
    if suffix == ".pt":
        assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), Z)
        assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True, mmap=True), Z)
    save_array(tmp_path / f"y{suffix}", Z)
    assert read_facts(tmp_path / f"y{suffix}") == Facts()
    assert facts.otherwise(fps=12.5, vae_scale=1.0, vae=None) == ["vae_scale is 1.0, and the file says 0.34"]


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"fps": "12"}', '{"fps": true}', '{"fps": -1}', '{"vae_scale": 1e999}', '{"fps": NaN}',
     '{"layout": 3}', "[" * 9000, '{"fps": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_facts_that_cannot_be(tmp_path: Path, text: str) -> None:
    save_file({"latents": Z}, tmp_path / "x.safetensors", metadata={"owl_wms": text})
    with pytest.raises(DataError, match=r"facts? ") as caught:
        read_facts(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert torch.equal(load_latents(tmp_path / "x.safetensors")[0], Z)


@given(st.binary(max_size=300), st.integers(0, 2000), st.integers(0, 60), st.sampled_from(ARRAY_SUFFIXES))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_only_our_own_errors_for_damaged_files(tmp_path: Path, put: bytes, at: int, cut: int, suffix: str) -> None:
    good = tmp_path / f"good{suffix}"
    if not good.exists():
        save_array(good, Z, facts=Facts(fps=3.0))
    raw = good.read_bytes()
    at %= len(raw)
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(raw[:at] + put + raw[at + cut :])
    for read in (load_latents, read_facts):
        read_or_refuse(read, path)


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_files_in_the_home_folder(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_array(f"~/x{suffix}", torch.ones(2, 3, 2, 2))
    assert torch.equal(load_latents(tmp_path / "home" / f"x{suffix}"), load_latents(f"~/x{suffix}"))
    save_array(f"~/said{suffix}", Z, facts=Facts(vae_scale=2.0))
    assert read_facts(f"~/said{suffix}") == read_facts(tmp_path / "home" / f"said{suffix}")
    assert weights_digest(f"~/x{suffix}") == weights_digest(tmp_path / "home" / f"x{suffix}") is not None
    assert [clip.name for clip in clips_of("~")] == ["said", "x"]
    with open_sink(Path("~/frames"), shape=(1, 1), fps=1) as sink:
        sink.write(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    (frames,) = frame_batches(Path("~/frames"), channels=3, size=(4, 4), batch_size=2)
    assert frames.shape == (1, 3, 4, 4)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("suffix", ARRAY_SUFFIXES)
def test_latents_that_change_while_they_are_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_array(path, Z)
    source = LatentFile(path)
    save_array(tmp_path / f"other{suffix}", Z + 1)
    (tmp_path / f"other{suffix}").rename(path)  # another file under the name: the one that was opened stays
    assert torch.equal(source.read(0, 3), Z)
    source = LatentFile(path)
    os.truncate(path, 10)
    with pytest.raises(DataError, match=r"x\..*: the file was changed while it was read"):
        source.read(0, 1)


@pytest.mark.parametrize("value", [torch.nn.Parameter(Z.clone()), torch._neg_view(-Z)], ids=["parameter", "negative"])
def test_values_without_their_history(tmp_path: Path, value: torch.Tensor) -> None:
    torch.save(value, tmp_path / "x.pt")
    latents = load_latents(tmp_path / "x.pt")
    assert torch.equal(latents[0], Z)
    assert not latents.requires_grad
    assert not latents.is_neg()


def test_latents_at_home_or_without_a_name_by_now_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_array(tmp_path / "z.npy", Z)
    source = LatentFile("~/z.npy")
    assert torch.equal(source.read(0, 3), Z)
    (tmp_path / "z.npy").unlink()
    assert torch.equal(source.read(0, 3), Z), "it is open, and nobody can write to it any more"
