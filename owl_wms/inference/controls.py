"""Says which keys drive a model's buttons, and what each of them does.

The shipped models take the game's buttons. A configuration of another model lists its own under `controls:`.

Usage:
    controls = controls_for(load_world_config("world.yml"), "world.yml")    # one Button per input of the model
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from owl_wms.configs import WorldConfig
from owl_wms.errors import ConfigError
from owl_wms.game.buttons import BUTTONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Button:
    """One button of a model.

    Attributes:
        name: what messages call it.
        key: `KeyboardEvent.code` of the key that presses it, or `Mouse0`, `Mouse1`, `Mouse2`.
        label: what it does, in a word or two.
    """

    name: str
    key: str
    label: str


_GAME = {
    "W": ("KeyW", "forward"),
    "A": ("KeyA", "left"),
    "S": ("KeyS", "back"),
    "D": ("KeyD", "right"),
    "LSHIFT": ("ShiftLeft", "run"),
    "SPACE": ("Space", "jump"),
    "R": ("KeyR", "reload"),
    "F": ("KeyF", "lamp"),
    "E": ("KeyE", "pulse"),
    "LMB": ("Mouse0", "shoot"),
    "RMB": ("Mouse2", "zoom"),
}
GAME_CONTROLS = tuple(Button(name=name, key=_GAME[name][0], label=_GAME[name][1]) for name in BUTTONS)


def controls_for(config: WorldConfig, path: Path | str) -> tuple[Button, ...]:
    """Returns the buttons of a configuration's model, in the order of its inputs.

    Raises:
        ConfigError: the model has another number of buttons than the game, and `controls` does not list each of them.
    """
    wanted, given = config.model.n_buttons, config.controls
    if given is None:
        if wanted == len(GAME_CONTROLS):
            return GAME_CONTROLS
        raise ConfigError(
            f"{path}: the model has {wanted} buttons and the game {len(GAME_CONTROLS)}: list the model's under "
            "`controls:`, one line for each, such as `- {name: JUMP, key: Space, label: jump}`",
            path=path,
            key="controls",
        )
    if len(given) != wanted or len({button.name for button in given}) != wanted:
        raise ConfigError(
            f"{path}: controls: the model has {wanted} buttons, {len(given)} are listed; each needs its own name",
            path=path,
            key="controls",
        )
    return tuple(Button(name=button.name, key=button.key, label=button.label) for button in given)


def as_json(controls: tuple[Button, ...]) -> list[dict[str, Any]]:
    """Returns the buttons as the page reads them."""
    return [asdict(button) for button in controls]
