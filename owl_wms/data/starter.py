"""Writes the first configuration of a world model: sizes, rates, scale and buttons are those of a table and its VAE.

Usage:
    start = Start.of_table(NpyTable("data/mine"), vae_config=Path("vae.yml"), vae_checkpoint=Path("vae.pt"))
    text = start.configuration(Path("my_world"))      # YAML with comments, a valid `WorldConfig`
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from owl_wms.configs import load_vae_model, load_world_config
from owl_wms.configs.paths import EXAMPLES, find_beside
from owl_wms.configs.world import with_files_found
from owl_wms.data.npy_table import LATENT_COLUMN, NpyTable, read_source
from owl_wms.data.statistics import describe_table
from owl_wms.errors import ConfigError, DataError
from owl_wms.files import at_home
from owl_wms.media.read_facts import read_facts, weights_digest
from owl_wms.models.latents import LatentSpace
from owl_wms.vae.build import build_decoder, build_encoder

WINDOW, BATCH, SAMPLES = 24, 32, 4
"""Frames of a training window, windows of a step, clips of an evaluation; less where the table has less."""
_KNOWN_KEYS = {
    **{"UP": "KeyW", "FORWARD": "KeyW", "LEFT": "KeyA", "DOWN": "KeyS", "BACK": "KeyS", "RIGHT": "KeyD"},
    **{"JUMP": "Space", "SPACE": "Space", "RUN": "ShiftLeft", "SHIFT": "ShiftLeft", "LSHIFT": "ShiftLeft"},
    **{"FIRE": "Mouse0", "SHOOT": "Mouse0", "LMB": "Mouse0", "RMB": "Mouse2", "MMB": "Mouse1"},
}
# Keys in the order in which hands find them. The page itself needs P and N (pause, new world).
_KEYS = (
    *("KeyW", "KeyA", "KeyS", "KeyD", "Space", "ShiftLeft", "KeyE", "KeyQ", "KeyR", "KeyF", "Mouse0", "Mouse2"),
    *(f"Key{letter}" for letter in "CXZVTGYHUJIKOLBM"),
    *(f"Digit{digit}" for digit in "1234567890"),
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Holds what a first configuration says of its data.

    Attributes:
        table: folder of the table.
        grid: height and width of one latent.
        channels: of one latent.
        buttons: names of the model's buttons in their order; None means the game's, which need no key map.
        n_buttons: how many.
        fps: frames per second.
        scale: `train.vae_scale`.
        vae_config, vae_checkpoint: the autoencoder's files; None decodes nothing.
        window: frames of a training window.
        batch: windows of a step.
        samples: clips of an evaluation.
        remarks: sentences that whoever starts should read.
    """

    table: Path
    grid: tuple[int, int]
    channels: int
    n_buttons: int
    fps: int
    scale: float
    buttons: tuple[str, ...] | None = None
    vae_config: Path | None = None
    vae_checkpoint: Path | None = None
    window: int = WINDOW
    batch: int = BATCH
    samples: int = SAMPLES
    remarks: tuple[str, ...] = field(default=())

    @staticmethod
    def of_table(
        table: NpyTable,
        *,
        vae_config: Path | None = None,
        vae_checkpoint: Path | None = None,
        fps: float | None = None,
    ) -> Start:
        """Measures a table.

        Args:
            table: has latents, mouse and buttons.
            vae_config, vae_checkpoint: the autoencoder of the latents; both or none.
            fps: frames per second; it outranks what the table says.

        Raises:
            DataError: a table without clips, without one of the columns, of another layout, or of latents that are all
                equal.
            ConfigError: no frame rate, or an autoencoder of other latents.
        """
        path = table.path
        absent = [name for name in (LATENT_COLUMN, "mouse", "buttons") if name not in table.columns]
        if absent:
            text = f"has no column {' and no column '.join(absent)}, which training needs"
            remedy = "bring mouse [n, 2] and buttons [n, k] with every clip and import into another folder"
            remedy += ", with --no-mouse if there is no mouse"
            raise DataError(f"{path}: {text}: {remedy}", path=path)
        if not table.rows:
            raise DataError(f"{path}: holds no clips", path=path)
        channels, height, width = _latent_shape(table)
        found, facts = describe_table(table), read_facts(path)
        if found.vae_scale is None:
            raise DataError(f"{path}: all latents are equal: there is nothing to learn", path=path)
        stated = next(iter(found.rates), None) or facts.fps
        rate = fps or stated
        if rate is None:
            raise ConfigError(f"{path}: does not say its frames per second; say them with --fps", key="fps")
        remarks: list[str] = []
        if round(rate) != (stated or rate):
            remarks.append(f"the data have {stated or rate:g} frames per second, the configuration says {round(rate)}")
        if vae_config is not None and vae_checkpoint is not None:
            require_vae_of(vae_config, (channels, height, width), str(path))
            if facts.vae_sha256 is not None and facts.vae_sha256 != weights_digest(vae_checkpoint):
                name = facts.vae or "another file"
                remarks.append(f"{vae_checkpoint} is not the file that encoded the data ({name}): compare their frames")
        window = _window([row.length for row in table.rows])
        windows = sum(row.length // window for row in table.rows)
        return Start(
            table=path,
            grid=(height, width),
            channels=channels,
            n_buttons=len(found.pressed),
            buttons=button_names(path, len(found.pressed)),
            fps=max(1, round(rate)),
            scale=found.vae_scale,
            vae_config=vae_config,
            vae_checkpoint=vae_checkpoint,
            window=window,
            batch=1 << (min(BATCH, windows).bit_length() - 1),
            samples=min(SAMPLES, windows),
            remarks=tuple(remarks),
        )

    @staticmethod
    def of_game(table: Path) -> Start:
        """Returns what `owl-wms data make` writes by default, for a table that need not exist yet.

        Raises:
            ConfigError: the shipped configuration is not there.
        """
        shipped = EXAMPLES / "world" / "game_rft.yml"
        world = with_files_found(load_world_config(shipped), shipped)
        model, train = world.model, world.train
        side = model.sample_size
        return Start(
            table=table,
            grid=(side, side) if isinstance(side, int) else side,
            channels=LatentSpace.of(train).stored_channels(model.channels),
            n_buttons=model.n_buttons,
            fps=train.fps,
            scale=train.vae_scale,
            vae_config=find_beside(train.vae_cfg_path, shipped),
            vae_checkpoint=find_beside(train.vae_ckpt_path, shipped),
        )

    def configuration(self, folder: Path) -> str:
        """Returns the YAML of a configuration whose run lives in `folder`; its paths are absolute."""
        height, width = self.grid
        tokens = height * width
        place, seconds = folder.resolve(), f"{self.window / self.fps:.1f}"
        values = {
            "table": _text(_absolute(self.table)),
            "size": height if height == width else [height, width],
            "tokens": tokens,
            "channels": self.channels,
            "n_buttons": self.n_buttons,
            "window": self.window,
            "seconds": seconds,
            "batch": self.batch,
            "samples": self.samples,
            "clip": 4 * self.fps,
            "local": min(8, self.window),
            "fps": self.fps,
            "scale": f"{self.scale:g}",
            "checkpoints": _text(place / "checkpoints"),
            "weights": _text(place / "world.safetensors"),
            "vae": self._vae(),
        }
        return _TEMPLATE.format(**values) + self._controls()

    def readme(self) -> str:
        """Returns the README of the run's folder: what stands in it, and the commands to run there."""
        made = "" if self.buttons is not None else f"    owl-wms data make {_absolute(self.table)} --fps {self.fps}\n"
        begin = f" --context {_absolute(self.table)}#0" if self.buttons is not None else ""
        return _README.format(table=_absolute(self.table), made=made, begin=begin)

    def _vae(self) -> str:
        if self.vae_config is None or self.vae_checkpoint is None:
            said = "the autoencoder that decodes clips; without it there are none"
            return f"  # vae_cfg_path: vae.yml  # {said}\n  # vae_ckpt_path: vae.pt"
        config, weights = _absolute(self.vae_config), _absolute(self.vae_checkpoint)
        return f"  vae_cfg_path: {_text(config)}\n  vae_ckpt_path: {_text(weights)}"

    def _controls(self) -> str:
        if self.buttons is None:
            return ""
        if len(self.buttons) > len(_KEYS):
            return f"# controls: has to list a key for each of the {len(self.buttons)} buttons before `owl-wms play`.\n"
        lines = "".join(
            f"  - {{name: {_text(name)}, key: {key}, label: {_text(name.lower())}}}\n"
            for name, key in zip(self.buttons, keys_of(self.buttons), strict=True)
        )
        said = (
            "# The keys of `owl-wms play`, a line per button in their order: KeyboardEvent.code, or Mouse0 to Mouse2.\n"
        )
        return f"{said}controls:\n{lines}"


def require_vae_of(config: Path, latent: tuple[int, int, int], source: str) -> None:
    """Refuses an autoencoder whose latents have another shape than the data's.

    Args:
        config: its YAML.
        latent: channels, height, width of the data's latents.
        source: names the data in the message.

    Raises:
        ConfigError: they differ, or the autoencoder makes no pictures.
    """
    model: Any = load_vae_model(config)
    if model.model_id == "audio_ae":
        raise ConfigError(f"{config}: {model.model_id} does not make pictures", path=config, key="model.model_id")
    own: tuple[int, ...] = (model.latent_channels, *latent[1:])
    size = getattr(model, "sample_size", None)
    with torch.device("meta"), torch.no_grad():
        if size is not None:
            size = (size, size) if isinstance(size, int) else size
            own = tuple(build_encoder(model).eval()(torch.zeros(1, model.channels, *size)).shape[1:])
        else:
            build_decoder(model)
    if own != latent:
        text = f"latents of {source} are {list(latent)} (channels, height, width), this autoencoder's are {list(own)}"
        raise ConfigError(f"{config}: {text}; give the configuration of the one that encoded them", path=config)


def keys_of(names: Sequence[str]) -> list[str]:
    """Returns a key for each button: by its name where that is known, else the next one that is free.

    Args:
        names: at most as many as there are keys.
    """
    wanted = [_KNOWN_KEYS.get(name.upper(), f"Key{name.upper()}" if len(name) == 1 else "") for name in names]
    chosen: list[str] = []
    for key in wanted:
        chosen.append(key if key in (*_KEYS, "Mouse1") and key not in chosen else "")
    free = [key for key in _KEYS if key not in chosen]
    return [key or free.pop(0) for key in chosen]


def _latent_shape(table: NpyTable) -> tuple[int, int, int]:
    shape = table.slice(0, LATENT_COLUMN, 0, 1).shape[1:]
    if len(shape) != 3:
        raise DataError(f"{table.path}: latents must be [n, c, h, w], got [n, {', '.join(map(str, shape))}]")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _window(lengths: Sequence[int]) -> int:
    """Returns a window that nine in ten of the clips hold."""
    return min(WINDOW, sorted(lengths)[len(lengths) // 10])


def button_names(path: Path, count: int) -> tuple[str, ...]:
    """Returns the names that an import stored, else B0, B1, ..."""
    try:
        held = (read_source(path) or {}).get("buttons")
    except (OSError, DataError):  # it was damaged since
        held = None
    names = [re.sub(r"[^\w-]", "_", str(name))[:32] for name in held] if isinstance(held, list) else []
    good = len(names) == count == len(set(names)) and all(names)
    return tuple(names) if good else tuple(f"B{number}" for number in range(count))


def _absolute(path: Path) -> Path:
    """Returns the whole path under its own name: that of the file behind a link may say neither form nor part."""
    path = at_home(path)
    return Path(os.path.realpath(path.parent), path.name)


def _text(value: object) -> str:
    """Returns a text as YAML reads it back: JSON's strings are YAML's."""
    return json.dumps(str(value), ensure_ascii=False)


_TEMPLATE = """\
# A first configuration for the data in {table}.
# `owl-wms train` of this file works as it is; --set section.key=value tries another value without an edit.
model:
  model_id: game_rft
  sample_size: {size}  # height and width of one latent, or the side of a square one
  tokens_per_frame: {tokens}  # height * width
  channels: {channels}  # of one latent
  n_buttons: {n_buttons}
  # About four million parameters: good enough to see whether the data can be learnt. For more, raise n_layers and
  # d_model; d_model / n_heads has to stay a multiple of 16.
  n_layers: 5
  n_heads: 6
  d_model: 192
  control_hidden: 256
  n_frames: 96  # longest sequence of frames in training
  causal: true  # needed to play
  uncond: false
  cfg_prob: 0.1  # share of clips that learn without controls, for guidance
  backbone: dit
  has_audio: false
  rope_impl: motion
  local_window: {local}  # frames that most layers see; every local_idx-th sees all
  global_window: null
  local_idx: 2
train:
  trainer_id: rft
  data_id: cod
  data_kwargs: &data
    dataset_path: {table}
    window_length: {window}  # {seconds} s
    batch_columns: [depth_latent, mouse, buttons]
  sample_data_id: cod
  sample_data_kwargs: *data
  batch_size: {batch}  # windows at once; lower it if memory runs out
  target_batch_size: {batch}  # windows per step, gathered over several batches if larger
  epochs: 1000000
  max_steps: 10000
  opt: Muon
  opt_kwargs:
    lr: 0.01
    momentum: 0.95
    adamw_lr: 1.0e-3
    adamw_wd: 1.0e-4
    adamw_eps: 1.0e-15
    adamw_betas: [0.9, 0.95]
    adamw_keys: [core.proj_in, core.proj_out.proj, core.t_embed, core.control_embed, gate, adaln]
  checkpoint_dir: {checkpoints}
  output_path: {weights}  # averaged weights alone, for sample and play
  sample_interval: 1000  # steps between evaluation clips
  save_interval: 500
  n_samples: {samples}
  fps: {fps}
  sampler_id: av_caching
  sampler_kwargs: {{n_steps: 8, cfg_scale: 1.5, num_frames: {clip}, noise_prev: 0.15, max_window: {window}}}
  vae_scale: {scale}  # latents are divided by it: their standard deviation, so that they have that of noise
{vae}
  vae_batch_size: 4
"""

_README = """\
# A world model

`world.yml` is its configuration; the comments in it say what each value is for. The clips are in {table}.
Run in this folder:

{made}    owl-wms train world.yml
    owl-wms report checkpoints
    owl-wms sample world.yml world.safetensors{begin} --out clip.mp4
    owl-wms play world.yml world.safetensors{begin}

`train` can be stopped at any time (Ctrl-C) and goes on with `owl-wms train world.yml --resume`. It writes
`checkpoints/` (whole steps, and evaluation clips under `samples/`) and `world.safetensors` (averaged weights alone).
`sample` and `play` need the autoencoder, `train.vae_cfg_path` and `train.vae_ckpt_path`.
"""
