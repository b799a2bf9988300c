"""Typed configurations of the world model and its trainers, from upstream's YAML schema (`model`, `train`, `wandb`).

Why one training section for six trainers: upstream's files have one, and most of its keys are shared. What a trainer
needs beyond the defaults is a table here (`TRAINER_REQUIRED`) instead of a surprise inside the trainer.

Usage:
    cfg = load_world_config("configs/dit_v4.yml")
    require_trainer_keys(cfg.train)        # ConfigError naming the first key its trainer lacks
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from owl_wms.configs.levels import LevelsConfig
from owl_wms.configs.paths import PathText, find_beside
from owl_wms.configs.strict import (
    DataKwargs,
    Floats,
    Kwargs,
    NonNegativeInt,
    PositiveInt,
    Seed,
    Size,
    StrictModel,
    parse,
    read_yaml,
    rule,
    suggestion,
)
from owl_wms.configs.vae import MODEL_CONFIGS, WandbConfig, WorldModelId
from owl_wms.errors import ConfigError

Precision = Literal["auto", "fp16", "bf16", "fp32", "fp8", "int8"]
TrainerId = Literal["rft", "av", "mixed_av", "causvid_vid", "sforce_vid", "ode_distill_vid"]
# Spelt out as well as registered, because reading a configuration must not import torch; a test compares the two.
DataId = Literal["cod", "sequence_packing", "cod_s3", "cod_s3_audio", "cod_s3_mixed"]
SamplerId = Literal["av_window", "av_causal", "av_causal_no_cfg", "av_caching", "av_caching_one_step"]

# Files that a training run reads besides its data and its own checkpoints.
_READ = (
    *("vae_cfg_path", "vae_ckpt_path", "audio_vae_cfg_path", "audio_vae_ckpt_path"),
    *("teacher_cfg", "teacher_ckpt", "student_ckpt", "init_ckpt", "latent_transform"),
)
_ALWAYS = ("data_id", "data_kwargs", "sample_data_id", "sample_data_kwargs", "sampler_id", "sampler_kwargs")
_AUDIO = (*_ALWAYS, "audio_vae_scale")
_DISTILL = (*_ALWAYS, "teacher_cfg", "teacher_ckpt", "rollout_steps")
_CRITIC = (*_DISTILL, "student_ckpt", "d_opt_kwargs", "update_ratio")
TRAINER_REQUIRED: dict[str, tuple[str, ...]] = {
    "rft": _ALWAYS,
    "av": _AUDIO,
    "mixed_av": _AUDIO,
    "causvid_vid": (*_CRITIC, "regression_weight"),
    "sforce_vid": (*_CRITIC, "min_rollout_frames"),
    "ode_distill_vid": (*_DISTILL, "cfg_scale", "subsample", "gen_p"),
}
"""Keys of `train` without a usable default, by trainer. Decoder paths are not among them.

A run without decoded samples needs none.
"""

# What each optimiser understands; another name of torch.optim is passed through unchecked.
_ADAMW_KEYS = ("lr", "betas", "weight_decay", "eps", "amsgrad", "maximize", "foreach", "capturable", "fused")
_OPT_KEYS = {
    "AdamW": _ADAMW_KEYS,
    "Muon": ("lr", "momentum", "weight_decay", "adamw_lr", "adamw_wd", "adamw_eps", "adamw_betas", "adamw_keys"),
}


class WorldModelConfig(StrictModel):
    """Holds the `model` section. Windows and `n_frames` are in frames.

    `n_mouse_axes`, `patch_size` and `audio_tokens` are accepted because shipped files have them; no model reads them.

    Attributes:
        sample_size: height and width of a latent, or the side of a square one.
        rest_has_direction: False gives a mouse at rest no direction; upstream's weights were trained with True.
        predicts: of `game_rft`. With "remainder" the network predicts what the velocity leaves of the noisy frame,
            which at level 1 is the clean frame, so that a narrow network need not carry the noise from its input to its
            output. Upstream's weights predict the velocity.
        video_head_norm: of `game_rft_audio`. False for weights of upstream before 2025-07-28, whose picture head has no
            layer norm before it.
        sink_frames: so many frames at the beginning of a video are never forgotten. They are seen by the layers without
            a window, at the positions just before the others. Samplers begin with the last so many frames of the
            context and the whole context behind them; windows for training must begin with such frames too
            (examples/world/own_history.py).
        sink_noise: noise level at which those frames are shown; None is the level of the history. They are true frames,
            so they may be shown nearly clean.
        frame_limits: the weights hold a range for each cosine coefficient of each channel, and samplers keep finished
            frames in it (`owl_wms.nn.limits`). Whoever trains such a model fits the ranges to true frames.
    """

    model_id: WorldModelId
    sample_size: Size = 16
    channels: PositiveInt = 128
    audio_channels: PositiveInt = 64
    n_layers: PositiveInt = 12
    n_heads: PositiveInt = 12
    d_model: PositiveInt = 384
    tokens_per_frame: PositiveInt = 16
    n_buttons: PositiveInt = 8
    n_mouse_axes: PositiveInt = 2
    control_hidden: PositiveInt = 2048
    rest_has_direction: bool = True
    predicts: Literal["velocity", "remainder"] = "velocity"
    video_head_norm: bool = True
    n_frames: PositiveInt = 120
    sink_frames: NonNegativeInt = 0
    sink_noise: float | None = None
    frame_limits: bool = False
    cfg_prob: float = 0.1
    causal: bool = False
    uncond: bool
    backbone: Literal["dit", "mmdit", "uvit"]
    has_audio: bool
    rope_impl: Literal["ortho", "motion"] = "ortho"
    rope_ats_delta: float = 2.0
    rope_base: float = 10000.0
    rope_dim_t: PositiveInt | None = None
    rope_dim_x: PositiveInt | None = None
    rope_dim_y: PositiveInt | None = None
    local_window: PositiveInt | None
    global_window: PositiveInt | None
    local_idx: PositiveInt = 4
    gradient_checkpointing: bool = False
    patch_size: PositiveInt = 1
    audio_tokens: int = 0

    @model_validator(mode="after")
    def _fits(self) -> WorldModelConfig:
        self._require(self.d_model % self.n_heads == 0, "d_model", f"must be a multiple of n_heads ({self.n_heads})")
        size = self.sample_size
        product = "sample_size**2" if isinstance(size, int) else f"{size[0]} * {size[1]}"
        tokens = (size**2 if isinstance(size, int) else size[0] * size[1]) + int(self.has_audio)
        wanted = f"must be {product} {'+ 1 for audio ' if self.has_audio else ''}= {tokens}"
        self._require(self.tokens_per_frame == tokens, "tokens_per_frame", wanted)
        self._require(self.rope_base >= 1.0, "rope_base", "must be at least 1")
        self._require(0.0 <= self.cfg_prob <= 1.0, "cfg_prob", "must be within 0..1")
        remembers = self.causal and self.global_window is None
        self._require(self.sink_frames == 0 or remembers, "sink_frames", "needs causal true and global_window null")
        self._require(self.sink_frames < self.n_frames, "sink_frames", f"must be below n_frames ({self.n_frames})")
        noisy = self.sink_noise is None or (self.sink_frames > 0 and 0.0 <= self.sink_noise <= 1.0)
        self._require(noisy, "sink_noise", "needs sink_frames and must be within 0..1")
        silent = self.predicts == "velocity" or not self.has_audio
        self._require(silent, "predicts", "must be velocity for a model with audio")
        return self


class TrainingConfig(StrictModel):
    """Holds the `train` section of all six trainers; None means "not said". Intervals are in optimiser steps.

    `uncond` and `audio_vae_batch_size` are accepted because shipped files have them; nothing reads them.

    Attributes:
        fps: latents per second. A decoder that makes several frames of one latent makes clips of so many times more.
        init_ckpt: file of weights alone that a run starts from when it continues none.
        tensorboard: write the reports to `checkpoint_dir/tensorboard` as well.
        latent_transform: file that `owl_wms.models.latents` wrote; latents are divided by `vae_scale` and then
            transformed.
        levels: noise levels of `rft`, `av`, `mixed_av`.
        log_predictions: read by `causvid_vid` and `sforce_vid`. Evaluations then also decode a clip of the student and
            the clean clips that teacher and critic make of it.
        student_levels: noise levels at which a distilled student works, falling from 1. None: 1 and 0.5 for
            `causvid_vid`; `rollout_steps` even steps for `sforce_vid`; the teacher's own velocities at the teacher's
            own levels for `ode_distill_vid`, which with levels learns to jump from each of them to the end.
        context_noise: level of the history in distillation. None: the sampler's `noise_prev`, or 0.2.
        gen_p: share of frames that `ode_distill_vid` and `causvid_vid` (0.25 if None) generate.
        max_rollout_frames: longest rollout of `sforce_vid`. None: the window, or `min_rollout_frames` if longer.
        teacher_max_level: highest noise level that the teacher is told; see `max_level` of `owl_wms.sampling.guidance`.
        critic_start: the network that the critic of `causvid_vid` and `sforce_vid` starts as.
        shared_rollouts: let all critic updates of a step learn from the same rollouts of the student.
        judged_levels: whether teacher and critic judge a clip with a level of its own for each frame, or with one level
            for all. A causal teacher with levels per frame judges a drifted frame by its drifted history.
    """

    trainer_id: TrainerId | None = None
    data_id: DataId | None = None
    data_kwargs: DataKwargs | None = None
    sample_data_id: DataId | None = None
    sample_data_kwargs: DataKwargs | None = None
    target_batch_size: PositiveInt = 128
    batch_size: PositiveInt = 2
    epochs: PositiveInt = 200
    opt: str = "AdamW"
    opt_kwargs: Kwargs | None = None
    d_opt_kwargs: Kwargs | None = None
    scheduler: str | None = None
    scheduler_kwargs: Kwargs | None = None
    checkpoint_dir: PathText = "checkpoints/v0"
    output_path: PathText | None = None
    resume_ckpt: PathText | None = None
    init_ckpt: PathText | None = None
    tensorboard: bool = False
    sample_interval: PositiveInt = 1000
    save_interval: PositiveInt = 1000
    n_samples: PositiveInt = 8
    sampler_id: SamplerId | None = None
    sampler_kwargs: Kwargs | None = None
    eval_sample_dir: PathText | None = None
    seed: Seed = 0
    max_steps: PositiveInt | None = None
    fps: PositiveInt = 60
    levels: LevelsConfig = LevelsConfig()

    vae_id: str | None = None
    vae_cfg_path: PathText | None = None
    vae_ckpt_path: PathText | None = None
    vae_scale: float = 0.34
    latent_transform: PathText | None = None
    vae_batch_size: PositiveInt = 4
    audio_vae_id: str | None = None
    audio_vae_cfg_path: PathText | None = None
    audio_vae_ckpt_path: PathText | None = None
    audio_vae_scale: float | None = None
    audio_vae_batch_size: PositiveInt | None = None

    use_tensorrt: bool = True
    tensorrt_precision: Precision | None = None
    tensorrt_cache_dir: PathText | None = None
    tensorrt_fallback: bool = True

    teacher_cfg: PathText | None = None
    teacher_ckpt: PathText | None = None
    student_ckpt: PathText | None = None
    update_ratio: PositiveInt | None = None
    rollout_steps: PositiveInt | None = None
    min_rollout_frames: PositiveInt | None = None
    max_rollout_frames: PositiveInt | None = None
    student_levels: Floats | None = None
    context_noise: float | None = None
    teacher_max_level: float = 1.0
    critic_start: Literal["student", "teacher"] = "student"
    shared_rollouts: bool = False
    judged_levels: Literal["frame", "clip"] = "frame"
    log_predictions: bool = False
    regression_weight: float | None = None
    cfg_scale: float | None = None
    subsample: float | None = None
    gen_p: float | None = None
    uncond: bool | None = None

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        for name in ("opt_kwargs", "d_opt_kwargs"):
            # The critic of the distillation trainers is always AdamW.
            optimiser = self.opt if name == "opt_kwargs" else "AdamW"
            for key in getattr(self, name) or {}:
                known = _OPT_KEYS.get(optimiser, (key,))
                rule(key in known, f"{name}.{key}", f"unknown key for {optimiser}; {suggestion(key, known)}")
        for name in ("vae_scale", "audio_vae_scale"):
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "latents are divided by it: must be above 0")
        for name in ("subsample", "gen_p", "context_noise"):
            value = getattr(self, name)
            self._require(value is None or 0.0 <= value <= 1.0, name, "must be within 0..1")
        self._require(self.fps <= 240, "fps", "must be at most 240")
        weight, steps = self.regression_weight, self.student_levels
        self._require(weight is None or weight >= 0.0, "regression_weight", "must be at least 0")
        self._require(0.0 < self.teacher_max_level <= 1.0, "teacher_max_level", "must be above 0 and at most 1")
        falls = steps is None or (len(steps) > 0 and steps[0] == 1.0 and all(a > b for a, b in pairwise((*steps, 0.0))))
        self._require(falls, "student_levels", "must fall from 1.0 and end above 0")
        return self


class ButtonConfig(StrictModel):
    """One button of the model, for playing it in a browser.

    `name` is free, `key` is the browser's `KeyboardEvent.code` or Mouse0 to Mouse2, `label` says what the button does.
    """

    name: str
    key: str
    label: str

    @model_validator(mode="after")
    def _fits(self) -> ButtonConfig:
        named = bool(re.fullmatch(r"[\w-]{1,32}", self.name))
        rule(named, "name", f"must be 1 to 32 letters, digits, - or _, received {self.name!r}")
        rule(
            bool(re.fullmatch(r"[A-Z][A-Za-z]*[0-9]{0,2}", self.key)),
            "key",
            f"must be a KeyboardEvent.code such as KeyW, Space, ShiftLeft, or Mouse0, received {self.key!r}",
        )
        rule(len(self.label) <= 40, "label", f"must be at most 40 characters, received {len(self.label)}")
        return self


def _or_empty(section: Any) -> Any:
    return {} if section is None else section


class WorldConfig(StrictModel):
    """One world-model file; `controls` has one entry per button of the model, and is only needed to play it."""

    model: WorldModelConfig
    train: TrainingConfig
    wandb: Annotated[WandbConfig, BeforeValidator(_or_empty)] = WandbConfig()
    controls: list[ButtonConfig] | None = None


def load_world_config(path: Path | str) -> WorldConfig:
    """Read a world model's YAML file.

    Raises:
        ConfigError: naming the file, the dotted key and, for a misspelling, the nearest valid key.
    """
    return parse_world(read_yaml(path), path=path)


def load_world_model(path: Path | str) -> WorldModelConfig:
    """Read the `model` section alone of a world model's YAML file, which is all that making the model needs.

    Raises:
        ConfigError: as `load_world_config`, for that section.
    """
    return parse_world({**read_yaml(path, only="model"), "train": {}}, path=path).model


def parse_world(data: Mapping[str, Any], *, path: Path | str | None = None) -> WorldConfig:
    """Returns a world model's sections as one configuration.

    Raises:
        ConfigError: as `load_world_config`; an autoencoder's file is told as what it is, not key by key.
    """
    model = data.get("model")
    model_id = model.get("model_id") if isinstance(model, Mapping) else None
    if isinstance(model_id, str) and model_id in MODEL_CONFIGS:
        where = f"{path}: " if path is not None else ""
        text = f"model.model_id: {model_id!r} is an autoencoder; a world model's configuration is wanted"
        raise ConfigError(where + text, path=path, key="model.model_id")
    return parse(WorldConfig, data, path=path)


def with_files_found(cfg: WorldConfig, path: Path | str) -> WorldConfig:
    """Returns the configuration with the files of `_READ` found from any working directory (`find_beside`)."""
    found = {name: find_beside(getattr(cfg.train, name), path) for name in _READ}
    update = {name: None if file is None else str(file) for name, file in found.items()}
    return cfg.model_copy(update={"train": cfg.train.model_copy(update=update)})


def missing_trainer_keys(train: TrainingConfig, trainer_id: str | None = None) -> tuple[str, ...]:
    """Keys of `train` that the trainer needs and the file does not say, in the order of `TRAINER_REQUIRED`.

    Args:
        trainer_id: the trainer asked about; None takes the file's own.

    Raises:
        ConfigError: no trainer is named, or an unknown one.
    """
    wanted = trainer_id or train.trainer_id
    if wanted is None or wanted not in TRAINER_REQUIRED:
        found = "is missing" if wanted is None else f"no trainer {wanted!r}"
        text = f"train.trainer_id: {found}; {suggestion(wanted or '', TRAINER_REQUIRED)}"
        raise ConfigError(text, key="train.trainer_id")
    return tuple(key for key in TRAINER_REQUIRED[wanted] if getattr(train, key) is None)


def require_trainer_keys(
    train: TrainingConfig, trainer_id: str | None = None, *, path: Path | str | None = None
) -> None:
    """Check that everything the trainer needs is there.

    Raises:
        ConfigError: naming every missing key; `.key` is the first.
    """
    missing = missing_trainer_keys(train, trainer_id)
    if missing:
        where = f"{path}: " if path is not None else ""
        names = ", ".join(f"train.{key}" for key in missing)
        text = f"the trainer {trainer_id or train.trainer_id!r} needs {names}, which the file does not give"
        raise ConfigError(where + text, path=path, key=f"train.{missing[0]}")
