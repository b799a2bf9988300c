"""What a caller's process may have set for all of torch does not reach latents: losses, samplers, the rendered game.

With a default dtype of bfloat16, noise levels that nobody gave a dtype would lie up to 0.4 % off.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from owl_wms.game.controls import ScriptedPlayer, scripted_controls
from owl_wms.game.render import render
from owl_wms.game.world import GameWorld
from owl_wms.models import get_model_cls
from owl_wms.sampling import (
    AVCachingSampler,
    AVWindowSampler,
    CausalAVWindowSampler,
    batch_permute_to_length,
    custom_deltas,
    get_sd3_euler,
)
from tests.process_state import STATES, set_in_process
from tests.trt.test_ambient_state import digest
from tests.world import inputs, tiny_config, tiny_core

X, _, MOUSE, BUTTONS = inputs(2, 6)
SOUND = X.flatten(2)[..., :3].contiguous()
CORES = {model_id: tiny_core(model_id=model_id) for model_id in ("game_rft", "game_rft_audio")}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def caching() -> str:
    result = AVCachingSampler(3, 1.5, 2)(CORES["game_rft"], X[:, :4], MOUSE, BUTTONS, generator=seeded())
    return digest(result.latents)


def window(sampler: type[AVWindowSampler], model_id: str = "game_rft") -> str:
    sound = SOUND[:, :4] if model_id == "game_rft_audio" else None
    result = sampler(3, 1.5, 4, 2)(CORES[model_id], X[:, :4], sound, MOUSE, BUTTONS, generator=seeded())
    return digest(result.latents, result.mouse, result.buttons, *([result.latents_audio] if sound is not None else []))


def losses(model_id: str) -> str:
    model = get_model_cls(model_id)(tiny_config(model_id=model_id))
    model.core = CORES[model_id]
    torch.manual_seed(5)
    audio = (SOUND,) if model_id == "game_rft_audio" else ()
    made = model(X, *audio, MOUSE, BUTTONS, return_dict=True, cfg_prob=0.5)
    return digest(*made.values())


def game() -> str:
    world = GameWorld(7, 2)
    player = ScriptedPlayer(world)
    for _ in range(4):
        mouse, held = player.controls()
        world.step(mouse, torch.ones_like(held))
    return digest(mouse, held, world.floor_light, world.state.position, world.state.pulse, render(world, None, 36, 64))


NETWORKS: dict[str, Callable[[], str]] = {
    "caching": caching,
    "window": lambda: window(AVWindowSampler),
    "causal": lambda: window(CausalAVWindowSampler),
    "window with sound": lambda: window(AVWindowSampler, "game_rft_audio"),
    "loss": lambda: losses("game_rft"),
    "loss with sound": lambda: losses("game_rft_audio"),
}
PARTS: dict[str, Callable[[], str]] = {
    "game": game,
    "script": lambda: digest(*scripted_controls(3, 8)),
    "schedules": lambda: digest(get_sd3_euler(4), custom_deltas([1.0, 0.5])),
    "controls": lambda: digest(*batch_permute_to_length(MOUSE, BUTTONS, 20, seeded())),
}


@pytest.fixture(scope="module")
def neutral() -> dict[str, str]:
    return {name: part() for name, part in (NETWORKS | PARTS).items()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", PARTS)
def test_what_no_weights_make_is_the_same(name: str, state: str, neutral: dict[str, str]) -> None:
    with set_in_process(state):
        assert PARTS[name]() == neutral[name]


# In TF32 a product is another product, which is what that switch asks for.
@pytest.mark.parametrize("state", [state for state in STATES if state != "tf32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_networks_make_is_the_same(name: str, state: str, neutral: dict[str, str]) -> None:
    with set_in_process(state):
        assert NETWORKS[name]() == neutral[name]
