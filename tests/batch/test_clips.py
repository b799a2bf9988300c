"""Clips in batches and through the command: the frames of `owl-wms decode`, from every kind of input, in every form.

Run: python -m pytest tests/batch/test_clips.py
"""

from __future__ import annotations

import io
import json
import re
import socket
import tarfile
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import numpy as np
import prometheus_client
import pytest
import torch
from safetensors.torch import save_file
from torch.cuda._utils import _get_device_index

from owl_wms.batch import DecodeClips, EncodeClips
from owl_wms.batch.clips import _place
from owl_wms.configs import load_vae_config
from owl_wms.errors import DataError, NonFiniteError
from owl_wms.media.arrays import load_array, save_array
from owl_wms.media.facts import Facts
from owl_wms.media.read_facts import file_digest, read_facts
from owl_wms.media.video import VideoWriter
from owl_wms.timing import Spent
from owl_wms.vae import build_autoencoder
from tests.cli.conftest import CONFIG
from tests.cli.runner import run
from tests.media.test_video import gradient


def latents(frames: int, seed: int = 0) -> torch.Tensor:
    golden = torch.load("tests/data/dcae_pin_square.pt", weights_only=True)
    size = golden["cfg"].get("latent_size", 4)
    side = size if isinstance(size, int) else size[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, golden["cfg"]["latent_channels"], side, side, generator=generator)


def counters() -> list[float]:
    """Items done, items failed and frames, as this process tells Prometheus."""
    labels = [("items", {"state": "done"}), ("items", {"state": "failed"}), ("frames", {})]
    value = prometheus_client.REGISTRY.get_sample_value
    return [value(f"owl_batch_{name}_total", label) or 0.0 for name, label in labels]


@pytest.fixture
def one_by_one(tmp_path: Path, files: tuple[str, str]) -> np.ndarray:
    """What `owl-wms decode` makes of `latents(5)`."""
    save_array(tmp_path / "one.npy", latents(5))
    out = tmp_path / "one_frames.npy"
    arguments = ["--vae-config", files[0], "--checkpoint", files[1], "--no-tensorrt", "--device", "cpu"]
    assert run("decode", str(tmp_path / "one.npy"), *arguments, "--out", str(out)) == 0
    return np.load(out)


@pytest.mark.parametrize(("given", "found"), [(None, 1), ("cuda", 1), ("cuda:0", 0)])
def test_a_gpu_has_a_number(given: str | None, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.cuda.set_device` refuses `cuda` alone, which is what a Ray actor has."""
    numbers: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: numbers.append(_get_device_index(device)))
    assert _place(given, None) == (torch.device("cuda", found), torch.bfloat16)
    assert numbers == [found]


@pytest.mark.gpu
def test_a_gpu_decodes_without_being_named(files: tuple[str, str]) -> None:
    """As in a Ray actor."""
    decode, named = (DecodeClips(*files, device=device, tensorrt=False) for device in (None, "cuda:0"))
    batch = {"latents": latents(5)[None].numpy()}
    assert np.array_equal(decode(batch)["frames"], named(batch)["frames"])


def test_a_batch_in_memory(files: tuple[str, str], one_by_one: np.ndarray) -> None:
    decode = DecodeClips(*files, device="cpu", tensorrt=False)
    got = decode({"latents": torch.stack([latents(5), latents(5)]).numpy(), "name": np.array(["a", "b"])})
    assert list(got) == ["name", "frames"]
    assert np.array_equal(got["frames"], np.stack([one_by_one, one_by_one]))
    swapped = latents(5).numpy()[None].astype(">f4")  # HDF5 and others give such
    assert np.array_equal(decode({"latents": swapped})["frames"][0], one_by_one)
    rows = np.empty(2, object)
    rows[:] = [latents(5).numpy(), latents(3).numpy()]
    ragged = decode({"latents": rows})["frames"]
    assert [len(frames) for frames in ragged] == [5, 3]
    assert np.array_equal(ragged[0], one_by_one)
    with pytest.raises(DataError, match="no column 'latents', it has name; rename the column"):
        decode({"name": np.array(["a"])})
    with pytest.raises(DataError, match="frame 0 has values that are not finite"):
        decode({"latents": np.full((1, *latents(1).shape), np.nan, np.float32)})


@pytest.mark.parametrize(("given", "scale"), [(None, 4.0), (1.0, 1.0), (4.0, 4.0)])
def test_a_file_s_own_scale_and_rate_hold_as_for_one_file(
    tmp_path: Path, files: tuple[str, str], given: float | None, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    """`owl-wms encode --scale 4` writes such latents, and `owl-wms decode` multiplies them by 4."""
    for name in ("a.pt", "b.pt"):
        save_array(tmp_path / name, latents(2) / 4, facts=Facts(vae_scale=4.0, fps=15, vae_sha256="0" * 64))
    save_array(tmp_path / "plain.npy", latents(2))
    decode = DecodeClips(*files, device="cpu", tensorrt=False, scale=given)
    (own,), (other,), (plain,) = (decode.sources(tmp_path / name) for name in ("a.pt", "b.pt", "plain.npy"))
    assert (own.scale, own.fps, other.scale) == (scale, 15, scale)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "a.pt", "a.latent.pt")
    (packed,) = decode.sources(tmp_path / "d.tar")
    assert (packed.scale, packed.fps) == (scale, 15)
    assert (plain.scale, plain.fps) == (1.0 if given is None else given, None)
    if given is None:
        got, wanted = (torch.cat([p.clone() for p in decode.stream(source, Spent())]) for source in (own, plain))
        assert torch.equal(got, wanted)
    assert ("a.pt: vae_scale is 1.0, and the file says 4.0" in caplog.text) == (given == 1.0)
    assert f"a.pt: vae_sha256 is '{file_digest(files[1])}', and the file says '000" in caplog.text
    assert "b.pt" not in caplog.text, "it says the same"


def test_the_command_decodes_every_kind_of_input(
    tmp_path: Path, files: tuple[str, str], one_by_one: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    for name in ("a.pt", "deep/b.npy", "c.safetensors"):
        save_array(folder / name, latents(5))
    with tarfile.open(folder / "d.tar", "w") as tar:
        for clip in ("x", "y"):
            for member in ("latent", "mouse"):
                data = io.BytesIO()
                torch.save(latents(5) if member == "latent" else torch.zeros(5, 2), data)
                info = tarfile.TarInfo(f"{clip}.{member}.pt")
                info.size = data.tell()
                data.seek(0)
                tar.addfile(info, data)
    (folder / "notes.md").write_text("no input")
    (folder / "broken.pt").write_bytes(b"PK\x03\x04")
    out = tmp_path / "out"
    arguments = [str(folder), "--out", str(out), "--vae-config", files[0], "--checkpoint", files[1], "--no-tensorrt"]
    before = counters()
    assert run("-v", "decode-dataset", *arguments, "--metrics-port", "0") == 1
    shown = capsys.readouterr().err
    assert re.search(rf"{re.escape(socket.gethostname())}:\d+: [\d.]+ frames/s, 1 failed .* 5/\?", shown), shown
    assert re.search(r"[\d.]+ frames/s, 1 failed .* 5/5 ", shown), "the whole job on a line of its own"
    (url,) = re.findall(r"metrics: (http://localhost:\d+/metrics)", shown)
    with build_opener(ProxyHandler({})).open(url, timeout=60) as page:
        served = page.read().decode()
    assert 'owl_batch_items_total{state="done"}' in served
    assert [now - then for now, then in zip(counters(), before, strict=True)] == [4, 1, 25]
    names = ["a.pt.npy", "c.safetensors.npy", "d.tar/x.npy", "d.tar/y.npy", "deep/b.npy.npy"]
    (generation,) = out.iterdir()
    assert sorted(str(p.relative_to(generation)) for p in generation.rglob("*.npy")) == names
    for name in names:
        assert np.array_equal(np.load(generation / name), one_by_one), name
    (told,) = (json.loads(line) for line in (generation / "_ledger/failed.jsonl").read_text().splitlines())
    assert told["reason"] == "cannot be read as .pt: the file is truncated; copy or write it again"
    (folder / "broken.pt").unlink()
    capsys.readouterr()
    assert run("decode-dataset", *arguments) == 0
    assert "nothing is left to do: 4 files were done before" in capsys.readouterr().err
    assert run("decode-dataset", *arguments, "--status") == 0
    assert capsys.readouterr().out.startswith("done 4, failed 1, left 0, ")
    assert run("decode-dataset", *arguments, "--verify") == 0
    assert capsys.readouterr().out == "all as recorded\n"
    absent = str(tmp_path / "absent")
    for where, reason in (
        (absent, "cannot be read: No such file or directory"),
        (str(out.parent / "none"), "holds no"),
    ):
        (tmp_path / "none").mkdir(exist_ok=True)
        assert run("decode-dataset", where, *arguments[1:]) == 2
        assert f"error: {where}: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpus", "3"), "--gpus 3: this machine shows 2; give at most 2"),
        (("--gpus", "1", "--workers", "2"), "--gpus and --workers: give one of them"),
        (("--gpus", "2", "--engine", "ranks"), "--gpus: each rank has one GPU; say in torchrun or srun how many"),
    ],
)
def test_gpus_that_cannot_be_had(
    tmp_path: Path,
    files: tuple[str, str],
    options: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    options = options if "--engine" in options else (*options, "--engine", "local")
    model = ["--vae-config", files[0], "--checkpoint", files[1]]
    assert run("decode-dataset", str(tmp_path), "--out", str(tmp_path / "out"), *model, *options) == 2
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["mp4", "tar", "parquet"])
def test_other_forms(tmp_path: Path, one_by_one: np.ndarray, form: str) -> None:
    from owl_wms.batch.outputs import count_frames, write_frames

    path = tmp_path / f"clip.{form}"
    pieces = iter([torch.from_numpy(one_by_one[:3]), torch.from_numpy(one_by_one[3:])])
    assert write_frames(pieces, path, form, shape=(1, 5), fps=60) == 5
    assert count_frames(path, form) == 5
    if form == "tar":
        with tarfile.open(path) as tar:
            member = tar.extractfile("frames.npy")
            assert member is not None
            assert np.array_equal(np.load(io.BytesIO(member.read())), one_by_one)
    if form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the extra ray")
        rows = parquet.read_table(path).to_pylist()
        shape = (rows[0]["height"], rows[0]["width"], rows[0]["channels"])
        assert np.array_equal([np.frombuffer(row["data"], np.uint8).reshape(shape) for row in rows], one_by_one)
    assert sorted(p.name for p in tmp_path.glob("clip*")) == [f"clip.{form}"]


def test_clips_and_arrays_become_latents(tmp_path: Path) -> None:
    (tmp_path / "vae.yml").write_text(CONFIG.replace("channels: 4", "channels: 3", 1))
    autoencoder = build_autoencoder(load_vae_config(tmp_path / "vae.yml").model, "tiled")
    save_file(autoencoder.state_dict(), tmp_path / "vae.safetensors")
    model = str(tmp_path / "vae.yml"), str(tmp_path / "vae.safetensors")
    arguments = ["--vae-config", model[0], "--checkpoint", model[1]]
    folder = tmp_path / "in"
    folder.mkdir()
    frames = gradient(3)
    np.save(folder / "a.npy", frames.permute(0, 3, 1, 2).numpy())
    with VideoWriter(folder / "b.mp4") as clip:
        clip.write(frames)
    assert run("encode", str(folder / "a.npy"), *arguments, "--out", str(tmp_path / "a.pt"), "--device", "cpu") == 0
    wanted = load_array(tmp_path / "a.pt")
    got = EncodeClips(*model, device="cpu")({"frames": frames[None].numpy()})["latents"]
    assert np.allclose(got[0], wanted.numpy(), atol=1e-5)
    huge = {key: value * 1e3 for key, value in autoencoder.state_dict().items()}
    save_file(huge, tmp_path / "huge.safetensors")
    half = EncodeClips(model[0], str(tmp_path / "huge.safetensors"), device="cpu", dtype="fp16")
    with pytest.raises(NonFiniteError, match="the latents of frame 0 have values that are not finite in float16"):
        half({"frames": frames[None].numpy()})
    assert run("encode-dataset", str(folder), "--out", str(tmp_path / "out"), *arguments, "--scale", "2") == 0
    (generation,) = (tmp_path / "out").iterdir()
    assert torch.equal(load_array(generation / "a.npy.pt"), wanted / 2)
    assert load_array(generation / "b.mp4.pt").shape == wanted.shape
    facts = read_facts(generation / "a.npy.pt")
    assert facts == Facts(vae_scale=2.0, vae="vae.safetensors", vae_sha256=file_digest(model[1]), layout="n c h w")
    assert read_facts(generation / "b.mp4.pt").fps == 60
