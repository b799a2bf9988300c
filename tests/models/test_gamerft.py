"""GameRFT against upstream's own outputs, its size, its masks, and its loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from owl_wms.configs.world import parse_world
from owl_wms.errors import ConfigError
from owl_wms.models import GameRFT, get_model_cls, make_model
from owl_wms.models.flow import drop_controls
from owl_wms.models.size import count_parameters
from tests.world import golden, inputs, relative, tiny_config, tiny_core

DIT_V4 = {
    "sample_size": 8,
    "channels": 128,
    "n_layers": 16,
    "n_heads": 24,
    "d_model": 1536,
    "tokens_per_frame": 64,
    "n_frames": 1536,
    "control_hidden": 2048,
    "local_window": 16,
}
FIXED = {"model_id": "game_rft", "uncond": False, "backbone": "dit", "has_audio": False, "global_window": None}


@pytest.fixture(scope="module")
def upstream():
    data = golden()
    model = GameRFT(SimpleNamespace(**data["cfg"]))
    model.load_state_dict(data["state_dict"], strict=True)
    return model.core.eval(), data


def test_keys_are_upstreams_in_their_order(upstream) -> None:
    core, data = upstream
    assert [f"core.{key}" for key in core.state_dict()] == list(data["state_dict"])


@torch.no_grad()
def test_outputs_are_upstreams(upstream) -> None:
    core, data = upstream
    x, t, mouse, btn = data["x"], data["t"], data["mouse"], data["btn"]
    assert relative(core(x, t, mouse, btn), data["y"]) < 1e-4
    assert relative(core(x, t, mouse, btn, data["doc_id"]), data["y_doc"]) < 1e-4
    hidden = torch.zeros(1, dtype=torch.bool)
    assert relative(core(x, t, mouse, btn, has_controls=hidden), data["y_nocontrol"]) < 1e-4
    assert relative(core(x, t), data["y_nocontrol"]) < 1e-4, "mouse=None means no controls"
    assert relative(data["y_doc"], data["y"]) > 0.1
    assert relative(data["y_nocontrol"], data["y"]) > 0.1


def test_dit_v4_has_upstreams_size() -> None:
    with torch.device("meta"):
        model = GameRFT(tiny_config(**DIT_V4))
    assert sum(p.numel() for p in model.parameters()) == 704_921_728
    assert len(model.state_dict()) == 274


@torch.no_grad()
def test_every_batch_item_has_its_own_documents() -> None:
    core = tiny_core()
    x, t, mouse, btn = inputs(2, 8)
    doc_id = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    both = core(x, t, mouse, btn, doc_id)
    for item in range(2):
        alone = core(*(a[item : item + 1] for a in (x, t, mouse, btn, doc_id)))
        assert relative(both[item : item + 1], alone) < 1e-4
    second = core(x[1:, 2:], t[1:, 2:], mouse[1:, 2:], btn[1:, 2:])
    assert relative(both[1:, 2:], second) < 1e-4, "a document is a sequence of its own"
    with pytest.raises(ValueError, match="doc_id must be"):
        core(x, t, mouse, btn, doc_id[:1])


@torch.no_grad()
@pytest.mark.parametrize(("causal", "changed"), [(True, slice(5, 9)), (False, slice(2, 9))])
def test_a_frame_reaches_its_window_and_no_further(causal: bool, changed: slice) -> None:
    core = tiny_core(n_layers=1, local_idx=1, global_window=4, causal=causal)
    x, t, mouse, btn = inputs(1, 12)
    other = x.clone()
    other[:, 5] += 1
    moved = (core(x, t, mouse, btn) - core(other, t, mouse, btn)).abs().amax(dim=(0, 2, 3, 4)) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(12))[changed]


def test_one_step_of_training_lowers_the_loss() -> None:
    model = GameRFT(tiny_config())
    x, _, mouse, btn = inputs(2, 6)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)
        out = model(x, mouse, btn, return_dict=True, cfg_prob=0.0)
        optimiser.zero_grad()
        out["diffusion_loss"].backward()
        optimiser.step()
        losses.append(float(out["diffusion_loss"].detach()))
    assert losses[-1] < losses[0]
    assert out["ts"].shape == (2, 6)
    assert torch.allclose(out["lerpd_video"], x.lerp(out["z_video"], out["ts"][:, :, None, None, None]))
    assert out["cfg_mask"].all()


def test_checkpointing_changes_no_gradient() -> None:
    plain, saving = GameRFT(tiny_config()), GameRFT(tiny_config(gradient_checkpointing=True))
    saving.load_state_dict(plain.state_dict())
    x, _, mouse, btn = inputs(1, 4)
    for model in (plain, saving):
        torch.manual_seed(0)
        model(x, mouse, btn).backward()
    assert relative(saving.core.proj_in.weight.grad, plain.core.proj_in.weight.grad) < 1e-5


@pytest.mark.parametrize(
    ("without", "probability", "expected"), [(0.0, 0.1, 0.1), (0.05, 0.3, 0.3), (0.5, 0.1, 0.5), (1.0, 0.1, 1.0)]
)
def test_controls_are_dropped_to_the_share_asked_for(without: float, probability: float, expected: float) -> None:
    items = 20_000
    has = torch.arange(items) >= without * items
    kept = drop_controls(has, probability)
    assert abs(float((~kept).float().mean()) - expected) < 0.015
    assert not (kept & ~has).any()


@torch.no_grad()
def test_a_model_that_predicts_the_remainder_ends_at_its_last_layers_frame() -> None:
    """One Euler step from level 1 to 0 gives what the last layer gives, whatever the noise was."""
    core, plain = (tiny_core(predicts=name) for name in ("remainder", "velocity"))
    x, t, mouse, btn = inputs(2, 4)
    t[:] = 1.0
    last = plain(x, t, mouse, btn)
    assert relative(x - core(x, t, mouse, btn), last) < 1e-5
    assert relative(x - last, last) > 0.1


def test_unconditional_models_have_no_control_embedding() -> None:
    core = tiny_core(uncond=True)
    assert not hasattr(core, "control_embed")
    x, t, mouse, btn = inputs(1, 3)
    with torch.no_grad():
        assert torch.equal(core(x, t, mouse, btn), core(x, t))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "mmdit"}, "'mmdit'"),
        ({"backbone": "uvit"}, "'uvit'"),
        ({"tokens_per_frame": 5}, "= 4, got 5"),
        ({"has_audio": True}, "has_audio must be False"),
        ({"n_heads": 3}, "64 / 3"),
    ],
)
def test_configurations_that_cannot_be_built(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GameRFT(tiny_config(**changes))


def test_bad_input_is_named() -> None:
    core = tiny_core()
    x, t, mouse, btn = inputs(1, 3)
    with pytest.raises(ValueError, match=r"\[b, n, 4, 2, 2\]"):
        core(x[:, :, :3], t, mouse, btn)
    with pytest.raises(ValueError, match="both"):
        core(x, t, mouse, None)
    with pytest.raises(ConfigError, match="41 frames exceed the 40"):
        core(*inputs(1, 41))


def test_unknown_ids_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'game_rft'.*game_rft_audio"):
        get_model_cls("game_rtf")


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 2**31},
        {"d_model": 24 * 2**26},
        {"control_hidden": 2**31},
        {"n_buttons": 2**31},
        {"channels": 2**31},
        {"n_frames": 2**31},
        {"sample_size": 2**15, "tokens_per_frame": 2**30},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_model_larger_than_memory_is_one_line_before_anything_is_allocated(change: dict[str, int]) -> None:
    config = parse_world({"model": {**DIT_V4, **FIXED, **change}, "train": {}}).model
    with pytest.raises(ConfigError, match=r"GiB, and this process may have .* GiB; lower d_model") as caught:
        make_model(config)
    assert "\n" not in str(caught.value)


def test_weights_are_counted_from_the_configuration_alone() -> None:
    config = parse_world({"model": {**DIT_V4, **FIXED}, "train": {}}).model
    for given in (config, config.model_copy(update={"uncond": True, "n_layers": 3, "sink_frames": 2})):
        with torch.device("meta"):
            assert count_parameters(given) == sum(p.numel() for p in make_model(given).parameters())
