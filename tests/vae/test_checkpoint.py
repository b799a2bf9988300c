"""Every form a checkpoint comes in, and every way in which one can be bad."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from owl_wms.errors import CheckpointError
from owl_wms.vae import build_autoencoder, build_decoder, load_weights, read_state_dict, save_weights, select_part
from owl_wms.vae.checkpoint import detect_variant
from owl_wms.vae.layouts import flat_weights, select_core
from tests.vae.helpers import randomize, small_dcae

MODEL = randomize(build_autoencoder(small_dcae()))
FULL = MODEL.state_dict()
DECODER = MODEL.decoder.state_dict()


def _same(got: dict, want: dict = DECODER) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


PREFIXES = [
    ".".join(chosen)
    for n in range(5)
    for chosen in itertools.combinations(("ema_model", "_orig_mod", "module", "core"), n)
]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("full", [True, False])
def test_any_combination_of_prefixes(tmp_path: Path, prefix: str, full: bool, suffix: str) -> None:
    state = {f"{prefix}.{k}" if prefix else k: v for k, v in (FULL if full else DECODER).items()}
    path = tmp_path / f"x{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    assert _same(select_part(read_state_dict(path), "decoder"))


PIECES = ["ema_model", "_orig_mod", "module", "core", "decoder"]


@given(order=st.permutations(PIECES), size=st.integers(0, 5), again=st.sampled_from(["", "_orig_mod.", "module."]))
@settings(max_examples=60, deadline=None)
def test_prefixes_in_any_order(order: list[str], size: int, again: str) -> None:
    prefix = "".join(f"{name}." for name in order[:size]) + again
    state = {f"{prefix}{k}": v for k, v in DECODER.items()}
    assert _same(select_part(flat_weights(state, "x.pt"), "decoder"))
    # The two scalars of an average stand beside the weights that it averaged, whatever wraps both.
    if "ema_model." in prefix:
        outside = prefix.split("ema_model.")[0]
        state |= {f"{outside}initted": torch.tensor(True), f"{outside}step": torch.tensor(3)}
        state |= {k.replace("ema_model.", "online_model."): v + 1 for k, v in state.items() if "ema_model." in k}
        assert _same(select_part(flat_weights(state, "x.pt"), "decoder"))
        trained = {k: v + 1 for k, v in DECODER.items()}
        assert _same(select_part(flat_weights(state, "x.pt", prefer_ema=False), "decoder"), trained)


@given(order=st.permutations(["ema_model", "module", "core"]), size=st.integers(0, 3), place=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_half_may_stand_anywhere_among_them_in_a_full_model(order: list[str], size: int, place: int) -> None:
    state = {}
    for key, value in FULL.items():
        part, rest = key.split(".", 1)
        pieces = [*order[:size]]
        pieces.insert(place, part)
        state[".".join([*pieces, rest])] = value
    read = flat_weights(state, "x.pt")
    assert _same(select_part(read, "decoder"))
    assert _same(select_part(read, "encoder"), MODEL.encoder.state_dict())


def test_an_averaged_decoder_beside_a_plain_encoder() -> None:
    state: dict[str, Any] = {k: v for k, v in FULL.items() if k.startswith("encoder.")}
    state |= {f"decoder.ema_model.{k}": v for k, v in DECODER.items()}
    state |= {f"decoder.online_model.{k}": v + 1 for k, v in DECODER.items()}
    read = flat_weights(state, "x.pt")
    assert _same(select_part(read, "decoder"))
    assert _same(select_part(read, "encoder"), MODEL.encoder.state_dict())


@pytest.mark.parametrize(
    "foreign", ["other.weight", "encoder.extra", "decoder.core.extra", "core.conv_in.bias", "ema_model.x"]
)
@pytest.mark.parametrize("prefix", ["", "core.", "core.ema_model.", "ema_model._orig_mod."])
def test_one_foreign_key_is_the_mismatch(foreign: str, prefix: str) -> None:
    """Most keys decide what the prefixes are; the one that is unlike them is named, not the keys that are fine."""
    state = {f"{prefix}{k}": v for k, v in DECODER.items()}
    if foreign in state:
        foreign = "conv_in.bias"  # the same weight twice, once in a core and once not
    state[foreign] = torch.ones(3)
    with pytest.raises(CheckpointError) as caught:
        load_weights(build_decoder(small_dcae()), select_part(flat_weights(state, "x.pt"), "decoder"), "x.pt")
    assert foreign.rsplit(".", 1)[1] in str(caught.value)
    assert "missing" not in str(caught.value)


def _training_checkpoint(prefix: str) -> dict[str, Any]:
    ema = {f"ema_model.{prefix}{k}": v + 1 for k, v in FULL.items()}
    online = {f"online_model.{prefix}{k}": v for k, v in FULL.items()}
    side = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    return {
        "model": {f"{prefix}{k}": v for k, v in FULL.items()},
        "ema": {**side, **online, **ema},
        "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "steps": 7,
    }


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_training_checkpoints_prefer_the_average(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "step_7.pt"
    torch.save(_training_checkpoint(prefix), path)
    averaged = {k: v + 1 for k, v in DECODER.items()}
    assert _same(select_part(read_state_dict(path), "decoder"), averaged)
    assert _same(select_part(read_state_dict(path, prefer_ema=False), "decoder"))
    torch.save({"ema": _training_checkpoint(prefix)["ema"]}, path)
    assert _same(select_part(read_state_dict(path, prefer_ema=False), "decoder"))
    torch.save({"model": _training_checkpoint(prefix)["model"], "ema": {}, "steps": 1}, path)
    assert _same(select_part(read_state_dict(path), "decoder"))


def test_world_model_weights_keep_their_names(tmp_path: Path) -> None:
    torch.save({"ema": {"ema_model._orig_mod.module.core.proj_in.weight": torch.ones(2)}}, tmp_path / "x.pt")
    state = read_state_dict(tmp_path / "x.pt")
    assert list(state) == ["core.proj_in.weight"]
    assert list(select_core(state)) == ["proj_in.weight"]
    # What is not the core's stays for loading to report.
    assert sorted(select_core({**state, "other": torch.ones(1)})) == ["other", "proj_in.weight"]


def test_variant_is_read_from_the_keys() -> None:
    for variant, skip in itertools.product(("tiled", "learned"), (False, True)):
        if variant == "tiled" and skip:
            continue
        model = build_autoencoder(small_dcae(skip_residuals=skip), variant)
        for part in (model.decoder, model.encoder):
            assert detect_variant(part.state_dict(), skip_residuals=skip) == variant
    assert detect_variant(DECODER, skip_residuals=True) == "tiled"


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this must never run > evil.txt",)


def test_bad_files_give_one_clear_error_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(DECODER, "good.pt")
    save_file(DECODER, "good.safetensors")
    whole = Path("good.pt").read_bytes()
    Path("short.pt").write_bytes(whole[: len(whole) // 2])
    Path("short.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-100])
    Path("header.safetensors").write_bytes(b"\xff" * 64)
    Path("noise.pt").write_bytes(random.Random(0).randbytes(4096))
    Path("text.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    Path("text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    Path("empty.pt").touch()
    torch.save(DECODER, "framed.pt", pickle_protocol=5)
    Path("folder.pt").mkdir()
    torch.save({"model": _Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"steps": 3, "note": "no weights"}, "hollow.pt")
    torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, "twice.pt")
    cases = {
        "absent.pt": "no such file",
        "absent.safetensors": "no such file",
        "short.pt": "truncated",
        "short.safetensors": "truncated",
        "header.safetensors": "truncated or not a safetensors file",
        "noise.pt": "truncated or not a PyTorch checkpoint",
        "text.pt": "truncated or not a PyTorch checkpoint: it is a pointer of Git LFS",
        "text.safetensors": "not a safetensors file: it is a pointer of Git LFS",
        "framed.pt": "was saved with pickle_protocol 4 or 5",
        "empty.pt": "is empty",
        "folder.pt": "is not a file",
        "evil.pt": "would run code",
        "list.pt": "holds a list",
        "hollow.pt": "holds no weights; its keys are: note, steps",
        "twice.pt": "two keys become one",
    }
    for name, words in cases.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            read_state_dict(name)
        assert caught.value.path == Path(name)
        assert str(caught.value).startswith(name)
    assert not Path("evil.txt").exists()


@given(where=st.floats(0, 1), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path, where: float, bit: int, cut: bool) -> None:
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"d{suffix}"
        state = {"conv_in.bias": torch.arange(4.0)}
        torch.save(state, path) if suffix == ".pt" else save_file(state, path)
        data = bytearray(path.read_bytes())
        index = min(int(where * len(data)), len(data) - 1)
        data[index] ^= 1 << bit
        path.write_bytes(data[:index] if cut else data)
        try:
            read_state_dict(path)
        except CheckpointError:
            continue


def test_another_architecture_names_the_first_mismatch(tmp_path: Path) -> None:
    wider = build_decoder(small_dcae(ch_0=32, ch_max=128))
    with pytest.raises(CheckpointError) as caught:
        load_weights(wider, DECODER, "x.pt")
    assert caught.value.mismatch == "conv_in.bias is [64] in the file and [128] in the configured model"
    assert "the first of 40 mismatches" in str(caught.value)
    deeper = build_decoder(small_dcae(decoder_blocks_per_stage=[2, 1, 2]))
    with pytest.raises(CheckpointError, match=r"blocks\.2\.blocks\.1\.conv1\.bias \[32\] is missing"):
        load_weights(deeper, DECODER, "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.blocks\.0.*is in the file and not .*the first of"):
        load_weights(build_decoder(small_dcae()), {f"x.{key}": value for key, value in sorted(DECODER.items())}, "x.pt")
    shallower = build_decoder(small_dcae(decoder_blocks_per_stage=[1, 1, 1]))
    with pytest.raises(CheckpointError, match="is in the file and not in the configured model"):
        load_weights(shallower, DECODER, "x.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save_weights(MODEL.decoder, tmp_path / "new" / "d.safetensors", dtype=dtype, metadata={"psnr": "28.4"})
    assert {v.dtype for v in load_file(path).values()} == {dtype}
    fresh = build_decoder(small_dcae())
    load_weights(fresh, read_state_dict(path), path)
    assert all(torch.equal(v, DECODER[k].to(dtype).float()) for k, v in fresh.state_dict().items())
    with pytest.raises(CheckpointError, match="give the file that suffix"):
        save_weights(MODEL.decoder, tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(MODEL.decoder, path / "d.safetensors")
