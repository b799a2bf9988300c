"""Weights in several files, in folders, and files that lie about their size or change afterwards."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from owl_wms.batch.job import digest_of_files
from owl_wms.errors import CheckpointError
from owl_wms.files import false_claims
from owl_wms.media.read_facts import file_digest, weights_digest
from owl_wms.trainers.checkpoints import load_checkpoint
from owl_wms.vae import (
    build_autoencoder,
    build_decoder,
    load_weights,
    read_state_dict,
    select_part,
    torch_files,
    weight_files,
)
from tests.vae.helpers import randomize, small_dcae

MODEL = randomize(build_autoencoder(small_dcae()))
DECODER = MODEL.decoder.state_dict()


def reads(path: Path) -> bool:
    state = select_part(read_state_dict(path), "decoder")
    return state.keys() == DECODER.keys() and all(torch.equal(state[key], DECODER[key]) for key in DECODER)


def shards(folder: Path, suffix: str = ".safetensors", count: int = 3) -> Path:
    """Weights in `count` files and an index."""
    folder.mkdir()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    places = {key: f"{stem}-{1 + i % count:05}-of-{count:05}{suffix}" for i, key in enumerate(DECODER)}
    for name in set(places.values()):
        part = {key: DECODER[key] for key in DECODER if places[key] == name}
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_by_index_folder_part_and_numbers(tmp_path: Path, suffix: str) -> None:
    index = shards(tmp_path / "parts", suffix)
    first = sorted(index.parent.glob(f"*{suffix}"))[0]
    assert all(reads(path) for path in (index, index.parent, first))
    index.unlink()
    assert all(reads(path) for path in (first, first.parent))
    sorted(index.parent.glob(f"*{suffix}"))[2].unlink()
    with pytest.raises(CheckpointError, match=r"its part .*00003-of-00003.* is missing"):
        read_state_dict(first)


def test_shards_are_what_a_digest_is_of(tmp_path: Path) -> None:
    """An index stays the same when the weights in its shards change."""
    index = shards(tmp_path / "parts")
    first, second, third = sorted(index.parent.glob("*.safetensors"))
    torch.save(DECODER, tmp_path / "one.pt")
    assert weight_files.files_of(tmp_path / "one.pt") == [tmp_path / "one.pt"]
    assert weight_files.files_of(index) == weight_files.files_of(second) == [index, first, second, third]
    assert weights_digest(tmp_path / "one.pt") == file_digest(tmp_path / "one.pt")
    assert weights_digest(index) is weights_digest(second) is weights_digest(index.parent) is None
    before = digest_of_files(str(index))
    save_file({key: value + 1 for key, value in load_file(second).items()}, second)
    assert digest_of_files(str(index)) != before
    index.unlink()
    assert weight_files.files_of(third) == [first, second, third]


@pytest.mark.parametrize("name", ["model.fp16-0000{}-of-00002.safetensors", "model-0000{}-of-00002.fp16.safetensors"])
def test_shards_of_a_variant(tmp_path: Path, name: str) -> None:
    """diffusers puts the variant before or behind the number, according to its version."""
    places = {key: name.format(1 + i % 2) for i, key in enumerate(DECODER)}
    for part in set(places.values()):
        save_file({key: DECODER[key] for key in DECODER if places[key] == part}, tmp_path / part)
    assert reads(tmp_path)
    assert reads(tmp_path / name.format(2))
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert reads(index)
    assert reads(tmp_path)


def test_weights_in_full_come_before_a_variant_beside_them(tmp_path: Path) -> None:
    """As in a download of a whole repository."""
    half = tmp_path / "w-00001-of-00001.fp16.safetensors"
    save_file({key: value + 1 for key, value in DECODER.items()}, half)
    places = dict.fromkeys(DECODER, half.name)
    (tmp_path / "w.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "found.index.faiss.json").write_text("{}")
    save_file(DECODER, tmp_path / "w.safetensors")
    assert reads(tmp_path)
    (tmp_path / "w.safetensors").rename(tmp_path / "w-00001-of-00001.safetensors")
    places = dict.fromkeys(DECODER, "w-00001-of-00001.safetensors")
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert reads(tmp_path)


def test_the_tensors_of_a_large_file_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": DECODER, "args": argparse.Namespace(lr=0.5)}, tmp_path / "run.pt")
    load, reads = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *given, **options: reads.append(given) or load(*given, **options))
    assert read_state_dict(tmp_path / "run.pt").keys() == DECODER.keys()
    assert len(reads) == 2, "nobody looks at the names in a small file first"
    monkeypatch.setattr(torch_files, "_LARGE", 1)
    assert read_state_dict(tmp_path / "run.pt").keys() == DECODER.keys()
    assert len(reads) == 3
    with (tmp_path / "run.pt").open("rb") as file:
        assert torch_files.load_torch(file)["args"].lr == 0.5
    torch.save(DECODER, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "old.pt").keys() == DECODER.keys()
    assert len(reads) == 5


def test_what_a_caller_allowed_stays_allowed(tmp_path: Path) -> None:
    torch.save({**DECODER, "best": np.float64(0.5)}, tmp_path / "run.pt")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([np.dtype]):
        assert reads(tmp_path / "run.pt")
        assert np.dtype in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_forked_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    with torch_files._turn, torch_files._turn:  # nor a signal handler for what it interrupted
        held = torch_files._turn
        torch_files._renew()
        assert torch_files._turn is not held


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {**m, "more": m["conv_in.bias"]}, "more is not in that file"),
        (lambda m: {k: v for k, v in m.items() if k != "conv_in.bias"}, "conv_in.bias is in that file and not in the"),
        (lambda m: {**m, "conv_in.bias": "../up.safetensors"}, "must be a file beside it"),
        (lambda m: {**m, "conv_in.bias": "/etc/passwd"}, "must be a file beside it"),
        (lambda m: {**m, "conv_in.bias": ""}, "must be a file beside it, not ''$"),
        (lambda m: {**m, "conv_in.bias": "a\n\ud800"}, r"its part a\\n\\ud800 is missing"),
        (lambda m: {**m, "conv_in.bias": 3}, "weight_map must map names to files"),
        (lambda m: [1], "weight_map must map names to files"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: Any, words: str) -> None:
    index = shards(tmp_path / "parts")
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": change(content["weight_map"])}))
    with pytest.raises(CheckpointError, match=words):
        read_state_dict(index)
    index.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not an index of weight files"):
        read_state_dict(index)


def test_folders(tmp_path: Path) -> None:
    save_file(DECODER, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert reads(tmp_path)
    torch.save(DECODER, tmp_path / "other.pt")
    assert reads(tmp_path)  # the usual name is the one that is meant
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"is not a file, and it has one\.safetensors, other\.pt; give the"):
        read_state_dict(tmp_path)


def test_a_folder_with_files_of_systems_and_of_training(tmp_path: Path) -> None:
    torch.save(DECODER, tmp_path / "vae.pt")
    for name in ("._vae.pt", ".vae.pt.swp", "._model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("optimizer.pt", "scheduler.bin"):
        torch.save({"state": {}}, tmp_path / name)
    assert reads(tmp_path)
    (tmp_path / "vae.pt").unlink()
    with pytest.raises(CheckpointError, match=r"it has optimizer\.pt, scheduler\.bin; give the"):
        read_state_dict(tmp_path)


def test_names_of_others_stay_on_their_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names with line breaks, terminal sequences and halves of characters, and one of a megabyte."""
    path = tmp_path / "odd\nname.pt"
    names = ["a\nb", "\x1b[2Jcleared", "\u202ereversed", "half \ud800", "x" * (1 << 20)]
    torch.save({**MODEL.state_dict(), **{name: torch.zeros(1) for name in names}}, path)
    assert select_part(read_state_dict(path), "decoder", path).keys() == DECODER.keys()
    with pytest.raises(CheckpointError) as caught:
        load_weights(MODEL.decoder, {**DECODER, names[0]: torch.zeros(1)}, path)
    for said in (caplog.records[-1].getMessage(), str(caught.value)):
        assert said.isprintable()
        assert r"odd\nname.pt" in said
        assert r"a\nb" in said
        assert len(said) < 5000
        said.encode()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_larger_than_memory_is_not_damaged(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (torch.save if suffix == ".pt" else save_file)(DECODER, tmp_path / f"step_3{suffix}")

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr(weight_files, "read_pieces", refused)
    with pytest.raises(CheckpointError, match="weights do not fit into memory"):
        read_state_dict(tmp_path / f"step_3{suffix}")
    if suffix == ".pt":
        with pytest.raises(CheckpointError, match="GiB do not fit into memory; free some and start again"):
            load_checkpoint(tmp_path / "step_3.pt")


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(DECODER, tmp_path / "d.pt")
    assert reads(Path("~/d.pt"))


def test_distributed_checkpoints(tmp_path: Path) -> None:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    content = {
        "model": {f"decoder.{key}": value for key, value in DECODER.items()},
        "optimizer": {"state": {"conv_in.bias": {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "step": 7,
    }
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert reads(tmp_path / "dcp")
    metadata = tmp_path / "dcp" / ".metadata"
    whole = metadata.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\x80\x04K\x01."):
        metadata.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"cannot be read as a folder of torch.distributed.checkpoint"):
            read_state_dict(tmp_path / "dcp")
    metadata.write_bytes(whole)
    (part,) = (tmp_path / "dcp").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cannot be read as a folder|claim"):
        read_state_dict(tmp_path / "dcp")
    part.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read as a folder|claim"):
        read_state_dict(tmp_path / "dcp")


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_distributed_metadata_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="would run code"):
        read_state_dict(tmp_path / "dcp")
    assert not (tmp_path / "ran").exists()


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_state_dict(path)


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    torch.save({"conv_in.bias": torch.zeros(1 << 22)}, tmp_path / "s.pt")
    with (
        zipfile.ZipFile(tmp_path / "s.pt") as source,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for member in source.infolist():
            target.writestr(member.filename, source.read(member.filename))
    with (tmp_path / "s.pt").open("rb") as file:
        assert false_claims(file) is None
    with pytest.raises(CheckpointError, match=r"is compressed, which torch.save never does"):
        read_state_dict(tmp_path / "packed.pt")
    # A stride of 0 lets four bytes stand for any shape: the shape is compared before a value is read.
    torch.save({**DECODER, "conv_in.bias": torch.zeros(1).expand(1 << 40)}, tmp_path / "stride.pt")
    with pytest.raises(CheckpointError, match=r"conv_in.bias is .1099511627776"):
        load_weights(build_decoder(small_dcae()), read_state_dict(tmp_path / "stride.pt"), "stride.pt")
    key = "conv_in.parametrizations.weight.original1"
    folded = {k: v for k, v in DECODER.items() if not k.startswith("conv_in.param")}
    folded["conv_in.weight"] = torch.zeros(1).expand(1 << 20, 1 << 20, 1, 1)
    with pytest.raises(CheckpointError, match=f"{key} is .1048576, 1048576, 1, 1"):
        load_weights(build_decoder(small_dcae()), folded, "stride.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_written_again_changes_no_weight(tmp_path: Path, suffix: str) -> None:
    path, other = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for place, state in ((path, DECODER), (other, {key: value + 1 for key, value in DECODER.items()})):
        torch.save(state, place) if suffix == ".pt" else save_file(state, place)
    state = read_state_dict(path)
    with torch.device("meta"):
        live = build_decoder(small_dcae())
    load_weights(live, state, path, assign=True)
    shutil.copyfile(other, path)
    assert all(torch.equal(value, DECODER[key]) for key, value in live.state_dict().items())
    path.write_bytes(b"")
    assert all(torch.equal(value, DECODER[key]) for key, value in live.state_dict().items())


def test_safetensors_under_another_ending(tmp_path: Path) -> None:
    weights = {"conv_in.weight": torch.arange(6.0).reshape(2, 3)}
    save_file(weights, tmp_path / "downloaded.pt")
    assert torch.equal(read_state_dict(tmp_path / "downloaded.pt")["conv_in.weight"], weights["conv_in.weight"])
