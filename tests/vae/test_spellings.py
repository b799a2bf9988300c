"""The same weights under other names and in other forms; and values that are no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm

from owl_wms.errors import CheckpointError
from owl_wms.utils.owl_vae_bridge import get_decoder_only
from owl_wms.vae import build_decoder, fold_weight_norm, load_weights, read_state_dict, save_weights
from owl_wms.vae.spellings import DIRECTION, GAIN
from tests.vae.helpers import randomize, small_audio, small_dcae, small_distill

Z = torch.randn(2, 8, 2, 2)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace(GAIN, "weight_g").replace(DIRECTION, "weight_v"): v for k, v in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("config", [small_dcae(), small_distill(), small_audio()])
@pytest.mark.parametrize("folded", [True, False])
def test_every_spelling_loads_into_every_form(config: object, folded: bool) -> None:
    whole = randomize(build_decoder(config))
    plain = fold_weight_norm(whole)
    z = torch.randn(1, whole.latent_channels, 4) if hasattr(config, "strides") else Z
    wanted = whole(z)
    for state in (whole.state_dict(), old_names(whole.state_dict()), plain.state_dict()):
        target = build_decoder(config).eval()
        target = fold_weight_norm(target) if folded else target
        load_weights(target, state, "x.pt")
        assert torch.equal(target(z), wanted)


def test_torchs_older_weight_norm_really_writes_these_names() -> None:
    assert set(old_weight_norm(nn.Conv2d(1, 1, 1)).state_dict()) == {"bias", "weight_g", "weight_v"}


@torch.no_grad()
def test_a_row_of_zeros_stays_zero() -> None:
    plain = fold_weight_norm(randomize(build_decoder(small_dcae())))
    plain.conv_in.weight[3] = 0
    target = build_decoder(small_dcae()).eval()
    load_weights(target, plain.state_dict(), "x.pt")
    assert torch.equal(target(Z), plain(Z))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_file_in_half_precision_gives_equal_frames(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tmp_path / "vae.yml"
    config.write_text(
        "model: {model_id: dcae, sample_size: [64, 64], channels: 3, latent_channels: 8, ch_0: 16, ch_max: 64, "
        "encoder_blocks_per_stage: [2, 1, 1], decoder_blocks_per_stage: [2, 1, 1]}"
    )
    torch.save(randomize(build_decoder(small_dcae())).state_dict(), tmp_path / "a.pt")
    first = get_decoder_only(None, config, tmp_path / "a.pt", device="cpu", dtype=dtype)
    torch.save(first.state_dict(), tmp_path / "b.pt")
    second = get_decoder_only(None, config, tmp_path / "b.pt", device="cpu", dtype=dtype)
    assert torch.equal(first(Z.to(dtype)), second(Z.to(dtype)))


@pytest.mark.parametrize("fault", ["quarter", "one"])
def test_a_mixed_or_half_pair_is_reported(fault: str) -> None:
    whole = build_decoder(small_dcae()).state_dict()
    state = dict(whole)
    if fault == "one":
        del state[f"conv_in.{GAIN}"]
        words = f"conv_in.{GAIN}.* is missing"
    else:
        state[f"conv_in.{GAIN}"] = torch.ones(16, 1, 1, 1)
        words = f"conv_in.{GAIN} is .16, 1, 1, 1."
    for target in (build_decoder(small_dcae()), fold_weight_norm(build_decoder(small_dcae()))):
        with pytest.raises(
            CheckpointError, match=words if target.conv_in.state_dict().get("weight") is None else "conv_in"
        ):
            load_weights(target, state, "x.pt")


KEY = f"conv_in.{DIRECTION}"
UNFIT = {
    "sparse": (lambda w: w.to_sparse(), "sparse"),
    "meta": (lambda w: w.to("meta"), "no values"),
    "nested": (lambda w: torch.nested.nested_tensor([w[0]]), "nested"),
    "quantised": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.quint8), "quantised"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "int8": (lambda w: w.to(torch.int8), "int8 in the file and torch.float32"),
    "bool": (lambda w: w.bool(), "bool in the file"),
    "nan": (lambda w: w.index_fill(0, torch.tensor(1), float("nan")), "not finite"),
    "infinite": (lambda w: w.index_fill(0, torch.tensor(1), float("-inf")), "not finite"),
    "nan in 8 bits": (lambda w: w.index_fill(0, torch.tensor(1), float("nan")).to(torch.float8_e4m3fn), "not finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_weight_is_refused(tmp_path: Path, name: str) -> None:
    make, words = UNFIT[name]
    state = build_decoder(small_dcae()).state_dict()
    torch.save({**state, KEY: make(state[KEY])}, tmp_path / "x.pt")
    for assign in (True, False):
        with pytest.raises(CheckpointError, match=words) as caught:
            load_weights(build_decoder(small_dcae()), read_state_dict(tmp_path / "x.pt"), "x.pt", assign=assign)
        assert KEY in str(caught.value)


def test_eight_bit_floats_and_shared_memory_load(tmp_path: Path) -> None:
    state = build_decoder(small_dcae()).state_dict()
    base = torch.randn(1 << 16)
    shared = {key: base[: value.numel()].view(value.shape) for key, value in state.items() if key != KEY}
    torch.save({**shared, KEY: state[KEY].to(torch.float8_e4m3fn)}, tmp_path / "x.pt")
    with torch.device("meta"):
        module = build_decoder(small_dcae())
    load_weights(module, read_state_dict(tmp_path / "x.pt"), "x.pt", assign=True)
    weights = list(module.parameters())
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)


def test_one_name_of_shared_weights_is_enough(tmp_path: Path) -> None:
    module, twin = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    module[1].weight, twin[1].weight = module[0].weight, twin[0].weight
    save_model(module, str(tmp_path / "a.safetensors"))
    state = read_state_dict(tmp_path / "a.safetensors")
    assert len(state) == 3
    load_weights(twin, state, "a.safetensors")
    assert twin[1].weight is twin[0].weight
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))
    other = {**module.state_dict(), "1.weight": torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match=r"0\.weight and 1\.weight are one weight .* and differ in the file"):
        load_weights(twin, other, "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1\.weight is \[2, 2\] in the file and \[4, 4\]"):
        load_weights(twin, {**state, "0.weight": torch.ones(4, 4), "1.weight": torch.ones(2, 2)}, "a.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_weights(
            twin, {**module.state_dict(), **dict.fromkeys(("0.weight", "1.weight"), Z.new_full((4, 4), torch.nan))}, "x"
        )
    twin.register_buffer("table", torch.ones(2))
    twin[0].register_buffer("table", twin.table, persistent=False)  # no file has it
    load_weights(twin, twin.state_dict(), "a.safetensors")


def test_tied_and_unfit_weights_when_saving(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module[1].bias = nn.Parameter(module[0].bias.detach()[:])
    path = save_weights(module, tmp_path / "a.safetensors")
    twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    load_weights(twin, read_state_dict(path), path)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))
    before = path.read_bytes()
    module.register_buffer("scale", torch.tensor([70000.0]))
    with pytest.raises(CheckpointError, match=r"scale has values that are not finite .* in float16; use bf16 or fp32"):
        save_weights(module, path, dtype=torch.float16)
    module.register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match=r"table is torch\.sparse_coo"):
        save_weights(module, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
