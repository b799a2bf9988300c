"""Checkpoints as training programs leave them: containers, roots, averages, and what is beside the weights."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from owl_wms.errors import CheckpointError
from owl_wms.vae import build_autoencoder, build_decoder, load_weights, read_state_dict, select_part
from owl_wms.vae.layouts import AVERAGES, TRAINED, WRAPPERS, flat_weights, select_core
from tests.vae.helpers import randomize, small_dcae

MODEL = randomize(build_autoencoder(small_dcae()))
FULL = MODEL.state_dict()
DECODER = MODEL.decoder.state_dict()
AVERAGED = {key: value + 1 for key, value in DECODER.items()}
RECORDS: dict[str, Any] = {
    "epoch": 3,
    "best": np.float64(0.25),
    "curve": np.zeros(3),
    "args": argparse.Namespace(lr=0.1, out=PurePosixPath("runs/1")),
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    "sched": {"state": {}, "param_groups": []},
    "global_step": torch.tensor(7),
}


def decoder_of(content: Any, *, prefer_ema: bool = True) -> dict[str, Tensor]:
    """The decoder's weights, and that a decoder takes them."""
    state = select_part(flat_weights(content, "x.pt", prefer_ema=prefer_ema), "decoder", "x.pt")
    load_weights(build_decoder(small_dcae()), state, "x.pt")
    return state


def same(got: dict[str, Tensor], want: dict[str, Tensor] = DECODER) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", [*TRAINED, *AVERAGES, "my_own_name", "first_stage_model"])
@pytest.mark.parametrize("root", ["", "vae.", "autoencoder.decoder.", "module.first_stage_model.", "model.decoder."])
def test_a_container_of_any_name_around_any_root(tmp_path: Path, name: str, root: str) -> None:
    state = {f"{root}{key}": value for key, value in DECODER.items()}
    torch.save({name: state, **RECORDS}, tmp_path / "x.pt")
    assert same(select_part(read_state_dict(tmp_path / "x.pt"), "decoder"))
    assert same(decoder_of({"checkpoint": {name: state}, **RECORDS}))
    save_file({f"{name}.{key}": value.clone() for key, value in state.items()}, tmp_path / "x.safetensors")
    assert same(select_part(read_state_dict(tmp_path / "x.safetensors"), "decoder"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_inside_and_outside(wrapper: str) -> None:
    inside = {key.replace("blocks.0.", f"blocks.0.{wrapper}."): value for key, value in DECODER.items()}
    assert same(decoder_of(inside))
    assert same(decoder_of({f"{wrapper}.{key}": value for key, value in inside.items()}))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("nested", [True, False])
def test_an_average_beside_the_trained_weights(average: str, nested: bool) -> None:
    content: dict[str, Any] = {"model": DECODER, average: AVERAGED}
    if not nested:
        content = {f"{name}.{key}": value for name, state in content.items() for key, value in state.items()}
    assert same(decoder_of(content), AVERAGED)
    assert same(decoder_of(content, prefer_ema=False))


@pytest.mark.parametrize("trained", ["model", "net_g"])
@pytest.mark.parametrize("average", ["ema_model_state_dict", "net_g_ema", "swa_model", "decoder_ema", "G-EMA"])
def test_an_average_whose_name_has_a_word_for_it(trained: str, average: str) -> None:
    assert same(decoder_of({trained: DECODER, average: AVERAGED, "avg_meter": {"loss": torch.ones(3)}}), AVERAGED)
    assert same(decoder_of({"model": DECODER, average: AVERAGED}, prefer_ema=False))
    for other in ("disc_ema", "d_ema", "net_d_ema", "critic_ema", "exp_avg", "grad_ema", "ema_grad_norms"):
        assert same(decoder_of({"model": DECODER, other: AVERAGED}))
    with pytest.raises(CheckpointError, match=r"several networks|holds weights twice"):
        decoder_of({f"{average}_a": AVERAGED, f"{average}_b": AVERAGED})


def test_an_average_of_a_network_without_a_first_layer_by_name() -> None:
    trained, average = (
        {f"{half}.1.weight": torch.full((2,), v) for half in ("encoder", "decoder")} for v in (1.0, 2.0)
    )
    state = flat_weights({"model": trained, "ema_weights": average}, "x.pt")
    assert same(select_part(state, "decoder"), {"1.weight": torch.full((2,), 2.0)})


@pytest.mark.parametrize("averaged", ["", "decoder."])
def test_an_average_without_the_dots_of_its_names(averaged: str) -> None:
    """As latent-diffusion keeps it in the state of its module, of all of it or of a part."""
    state = {f"model.{key}": value for key, value in (FULL if averaged else DECODER).items()}
    ema = {f"{averaged}{key}".replace(".", ""): value for key, value in AVERAGED.items()}
    state |= {f"model_ema.{key}": value for key, value in ema.items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    assert same(decoder_of({"state_dict": state}), AVERAGED)
    assert same(decoder_of({"state_dict": state}, prefer_ema=False))


@pytest.mark.parametrize("nested", [True, False])
def test_an_average_of_one_half_beside_both(nested: bool) -> None:
    content: dict[str, Any] = {"decoder": DECODER, "encoder": MODEL.encoder.state_dict(), "ema_decoder": AVERAGED}
    if not nested:
        content = {f"{name}.{key}": value for name, state in content.items() for key, value in state.items()}
    assert same(decoder_of(content), AVERAGED)
    encoder = select_part(flat_weights(content, "x.pt"), "encoder", "x.pt")
    assert same(encoder, MODEL.encoder.state_dict())


def test_halves_in_mappings_of_their_own_and_names_as_a_tree() -> None:
    assert same(decoder_of({"decoder": DECODER, "encoder": MODEL.encoder.state_dict(), "epoch": 3}))
    tree: dict[str, Any] = {}
    for key, value in FULL.items():
        *folders, name = key.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    assert same(decoder_of(tree))


def test_arrays_of_numpy_are_weights() -> None:
    arrays = {key: value.numpy().astype(">f4") for key, value in DECODER.items()}
    assert same(decoder_of({"params": arrays}))


def test_torchs_own_average_has_a_counter() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(MODEL)
    assert same(decoder_of(averaged.state_dict()))
    for name in ("model", "swa_model", "my_own_name"):
        assert same(decoder_of({name: averaged.state_dict()}))
        assert same(decoder_of({"state_dict": {f"{name}.{k}": v for k, v in averaged.state_dict().items()}}))


def test_a_smaller_network_beside_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    critic = {"conv_in.weight": torch.ones(3, 3), "head.bias": torch.ones(3)}
    assert same(decoder_of({"netG": DECODER, "netD": critic}))
    assert "netD.conv_in.weight, netD.head.bias belong to another network and are not used" in caplog.text
    with pytest.raises(CheckpointError, match=r"conv_in\.head \[3\] is in the file"):  # what is below its root
        decoder_of({"netG": {**DECODER, "conv_in.head": torch.ones(3)}, "netD": critic})


def test_training_networks_are_set_aside_and_strangers_told(caplog: pytest.LogCaptureFixture) -> None:
    state = {f"model.{key}": value for key, value in FULL.items()}
    state |= {"loss.discriminator.conv_in.weight": torch.ones(3), "lpips.net.0.weight": torch.ones(3)}
    with caplog.at_level(logging.WARNING):
        assert same(decoder_of({"state_dict": state}))
    assert not caplog.records
    state["model.quant_conv.weight"] = torch.ones(3)
    with caplog.at_level(logging.WARNING):
        assert same(decoder_of({"state_dict": state}))
    assert "quant_conv.weight are in neither half and are not used" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same(decoder_of({"model": DECODER, "stats": {"mean": torch.ones(4)}, "ema": {"shadow_params": [1]}}))
    assert "ema holds no weights by name" in caplog.text
    assert "stats stand beside model" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"student": {"decoder": DECODER}, "teacher": {"decoder": DECODER}}, "several networks, under student.decoder"),
        ({"netA": DECODER, "netB": DECODER}, "several networks, under netA and netB"),
        ({**{f"net.{k}": v for k, v in DECODER.items()}, **DECODER}, "holds weights twice"),
        ({**{f"net.{k}": v for k, v in DECODER.items()}, **{f"params.{k}": v for k, v in DECODER.items()}}, "twice"),
        ({"model": {"shadow_params": [torch.ones(2)]}}, "holds no weights; its keys are: model"),
        ([DECODER], "holds a list"),
    ],
)
def test_what_nothing_decides_is_refused(content: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        decoder_of(content)


def test_mappings_that_hold_themselves() -> None:
    loop: dict[str, Any] = {"conv_in.bias": torch.ones(2)}
    loop["again"] = loop
    with pytest.raises(CheckpointError, match="nested in themselves"):
        flat_weights(loop, "x.pt")
    laughs: dict[str, Any] = {"conv_in.bias": torch.ones(2)}
    for _ in range(12):
        laughs = {f"k{i}": laughs for i in range(10)}
    with pytest.raises(CheckpointError, match="over 100000 names"):
        flat_weights(laughs, "x.pt")


def test_a_core_under_any_root() -> None:
    core = {"proj_in.weight": torch.ones(2), "transformer.a": torch.ones(2)}
    for root in ("", "core.", "model.core.", "world.core.", "student."):
        assert select_core(flat_weights({f"{root}{k}": v for k, v in core.items()}, "x")).keys() == core.keys()


VALUES = st.one_of(
    st.integers(),
    st.text(max_size=5),
    st.none(),
    st.lists(st.integers(), max_size=2),
    st.builds(torch.zeros, st.integers(0, 3)),
    st.builds(lambda n: torch.zeros(n, 2).to_sparse(), st.integers(1, 3)),
    st.builds(lambda n: torch.zeros(n, device="meta"), st.integers(0, 3)),
    st.builds(lambda: torch.nested.nested_tensor([torch.zeros(2)])),
    st.builds(lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8)),
    st.builds(lambda: nn.Parameter(torch.zeros(1))),
    st.builds(lambda: np.zeros(2, dtype=">c8")),
)
NAMES = st.one_of(
    st.sampled_from([*TRAINED, *AVERAGES, *WRAPPERS, "decoder", "encoder", "core", "loss", "online_model", "opt", ""]),
    st.sampled_from(["conv_in.bias", "decoder.conv_in.bias", "ema_model.module.x", "a..b", ".", "n_averaged"]),
    st.integers(0, 2),
)
TREES = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=4),
    lambda inner: st.dictionaries(NAMES, st.one_of(VALUES, inner), max_size=4),
)


@given(content=TREES, prefer=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_mapping_gives_weights_or_a_checkpoint_error(content: dict[Any, Any], prefer: bool) -> None:
    said = ""
    try:
        state = select_part(flat_weights(content, "x.pt", prefer_ema=prefer), "decoder", "x.pt")
        load_weights(build_decoder(small_dcae()), state, "x.pt")
    except CheckpointError as error:
        said = str(error)
    assert said.startswith("x.pt: ")  # no such mapping has all the decoder's weights
    assert "\n" not in said


@given(seed=st.integers(0, 2**32), edits=st.integers(1, 4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_give_weights_or_a_checkpoint_error(tmp_path: Path, seed: int, edits: int) -> None:
    """Cut, flipped, spliced and repeated bytes of every form of file."""
    rng = random.Random(seed)
    state = {"model": {"decoder.conv_in.bias": torch.arange(4.0)}, "n": np.float32(1.0), "step": 3}
    good = tmp_path / "good"
    if not good.exists():
        torch.save(state, tmp_path / "a.pt")
        torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
        save_file({"decoder.conv_in.bias": torch.arange(4.0)}, tmp_path / "c.safetensors")
        (tmp_path / "d.safetensors.index.json").write_text('{"weight_map": {"decoder.conv_in.bias": "c.safetensors"}}')
        good.touch()
    source = tmp_path / rng.choice(["a.pt", "b.pt", "c.safetensors", "d.safetensors.index.json"])
    data = bytearray(source.read_bytes())
    for _ in range(edits):
        at, size = rng.randrange(len(data)), rng.randrange(1, 9)
        data[at : at + size] = rng.choice([b"", rng.randbytes(size), bytes(size), data[at : at + size] * 2])
        data = data or bytearray(1)
    fuzzed = source.with_name(f"fuzzed{''.join(source.suffixes)}")
    fuzzed.write_bytes(data)
    said = ""
    try:
        select_part(read_state_dict(fuzzed), "decoder", fuzzed)
    except CheckpointError as error:
        said = str(error)
    assert not said or said.startswith(str(tmp_path))
    assert "\n" not in said
