"""Typed configurations of the autoencoders, from upstream's YAML schema (sections `model`, `train`, `wandb`).

Why one class per `model_id`: each autoencoder reads its own keys, and a key that nothing reads is most often a typo.

Usage:
    cfg = load_vae_config("configs/vae/dec_dist.yml")
    cfg.model.latent_channels          # 128
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from owl_wms.configs.paths import PathText
from owl_wms.configs.strict import (
    DataKwargs,
    IntTuple,
    Kwargs,
    PositiveInt,
    Size,
    StrictModel,
    ThreeSwitches,
    parse,
    read_yaml,
    shown,
    suggestion,
    unknown,
)
from owl_wms.errors import ConfigError

_log = logging.getLogger(__name__)

HUB_VAE_ID = "dcae"
TAEHV_VAE_ID = "taehv"
"""Values of `train.vae_id` that need no YAML file of the autoencoder; see `owl_wms.vae.load`."""


class WandbConfig(StrictModel):
    """Names where runs are logged: entity, project and run name."""

    name: str | None = None
    project: str | None = None
    run_name: str | None = None


class _ImageModel(StrictModel):
    """Keys that both image autoencoders share. Sizes are pixels (height, width); an int is a square.

    `latent_size`, `noise_decoder_inputs`, `attn_size` and `attn_d_model` are accepted because shipped files have them;
    no decoder reads them.
    """

    sample_size: Size
    channels: PositiveInt = 3
    latent_channels: PositiveInt
    ch_0: PositiveInt
    ch_max: PositiveInt
    encoder_blocks_per_stage: IntTuple
    decoder_blocks_per_stage: IntTuple
    use_middle_block: bool = False
    skip_logvar: bool = False
    latent_size: PositiveInt | None = None
    noise_decoder_inputs: float = 0.0
    attn_size: int | None = None
    attn_d_model: int | None = None
    checkpoint_grads: bool = False
    discriminator: Kwargs | None = None


class DCAEConfig(_ImageModel):
    """`model_id: dcae`. The last three keys belong to the later revision (learned shortcuts) only."""

    model_id: Literal["dcae"]
    skip_residuals: bool = False
    normalize_mu: bool = False
    do_channel_mask: bool = False


class DistillVAEConfig(_ImageModel):
    """`model_id: distill_vae`: fixed topology, x64 in space, so `ch_max` must be `16 * ch_0`."""

    model_id: Literal["distill_vae"]


class AudioAEConfig(StrictModel):
    """`model_id: audio_ae`: 1-D autoencoder.

    One latent is `prod(strides)` samples. `eq` and `sample_rate` are not read.
    """

    model_id: Literal["audio_ae"]
    channels: PositiveInt = 2
    latent_channels: PositiveInt
    ch_0: PositiveInt
    ch_max: PositiveInt
    strides: IntTuple
    eq: bool = False
    checkpoint_grads: bool = False
    sample_size: Size | None = None
    latent_size: PositiveInt | None = None
    encoder_blocks_per_stage: IntTuple | None = None
    decoder_blocks_per_stage: IntTuple | None = None
    discriminator: Kwargs | None = None


class TAEHVConfig(StrictModel):
    """`model_id: taehv`: the tiny video autoencoder of Ollin Boer Bohan (github.com/madebyollin/taehv, MIT licence).

    The released checkpoints are `latent_channels` 16 for Wan 2.1 and Qwen, 48 and `patch_size` 2 for Wan 2.2, 32 and 2
    for Hunyuan 1.5, 128 and 4 with `time_upscale` [true, true, true] for LTX-2.

    Attributes:
        latent_channels: channels of one latent.
        patch_size: the last step is a pixel shuffle by this factor.
        form: "normal", or "super" for the larger decoder.
        time_upscale: which of the three stages make two frames of one.
        space_upscale: which of the three stages double height and width.
    """

    model_id: Literal["taehv"]
    latent_channels: PositiveInt
    patch_size: PositiveInt = 1
    form: Literal["normal", "super"] = "normal"
    time_upscale: ThreeSwitches = (False, True, True)
    space_upscale: ThreeSwitches = (True, True, True)

    @property
    def frames_per_latent(self) -> int:
        """Frames that one latent becomes."""
        return int(2 ** sum(self.time_upscale))


VAEModelConfig = DCAEConfig | DistillVAEConfig | AudioAEConfig | TAEHVConfig
MODEL_CONFIGS: dict[str, type[StrictModel]] = {
    get_args(section.model_fields["model_id"].annotation)[0]: section for section in get_args(VAEModelConfig)
}
"""The sections by the `model_id` that each of them allows."""
WorldModelId = Literal["game_rft", "game_rft_audio"]
"""Stands here because a world model's file, given as an autoencoder's, is refused by name."""


class VAETrainConfig(StrictModel):
    """Upstream's training section for autoencoders.

    Kept so that its files load, and as a record of how weights arose. Nothing here reads it, so `load_vae_config` drops
    the keys that only a trainer of upstream's knows.
    """

    trainer_id: str
    data_id: str | None = None
    data_kwargs: DataKwargs | None = None
    target_batch_size: PositiveInt = 128
    batch_size: PositiveInt = 2
    epochs: PositiveInt = 200
    opt: str = "AdamW"
    opt_kwargs: Kwargs | None = None
    d_opt_kwargs: Kwargs | None = None
    loss_weights: Kwargs | None = None
    scheduler: str | None = None
    scheduler_kwargs: Kwargs | None = None
    checkpoint_dir: PathText = "checkpoints/v0"
    resume_ckpt: PathText | None = None
    output_path: PathText | None = None
    sample_interval: PositiveInt = 1000
    save_interval: PositiveInt = 1000
    teacher_cfg: PathText | None = None
    teacher_ckpt: PathText | None = None
    student_cfg: PathText | None = None
    student_ckpt: PathText | None = None
    latent_scale: float = 1.0
    lpips_type: str | None = None
    lpips_id: str | None = None
    delay_adv: int = 20000
    warmup_adv: int = 5000
    warmup_crt: int = 1000
    use_teacher_decoder: bool = False
    filepath: PathText | None = None
    sample_rate: PositiveInt | None = None
    n_fft_list: IntTuple | None = None


class VAEConfig(StrictModel):
    """One autoencoder file. `train` and `wandb` may be absent: decoding reads `model` alone."""

    model: VAEModelConfig
    train: VAETrainConfig | None = None
    wandb: WandbConfig | None = None


def parse_vae_model(data: Mapping[str, Any], *, path: Path | str | None = None) -> VAEModelConfig:
    """Returns the `model` section as the class that its `model_id` names.

    Raises:
        ConfigError: unknown id, unknown key, wrong type, missing key.
    """
    where = f"{path}: " if path is not None else ""
    if not isinstance(data, Mapping):
        text = f"must be a mapping, received {shown(data)}"
        raise ConfigError(f"{where}model: {text}", path=path, key="model")
    model_id = data.get("model_id")
    if not isinstance(model_id, str) or model_id not in MODEL_CONFIGS:
        text = f"is missing; {suggestion('', MODEL_CONFIGS)}"
        if model_id in get_args(WorldModelId):
            text = f"{model_id!r} is a world model; the autoencoder's file is wanted, which train.vae_cfg_path names"
        elif "model_id" in data:
            text = unknown(model_id, MODEL_CONFIGS, "autoencoder")
        raise ConfigError(f"{where}model.model_id: {text}", path=path, key="model.model_id")
    return parse(MODEL_CONFIGS[model_id], data, path=path, prefix="model")  # type: ignore[return-value]


def load_vae_model(path: Path | str) -> VAEModelConfig:
    """Read the `model` section alone of an autoencoder's YAML file, which is all that encoding and decoding need.

    Why: upstream's files have keys in `train` that only its trainers know.

    Raises:
        ConfigError: as `load_vae_config`, for the section `model`.
    """
    data = read_yaml(path, optional_env=("train", "wandb"), only="model")
    return parse_vae_model(data.get("model", {}), path=path)


def pictures_of(path: Path | str) -> tuple[int, tuple[int, int]]:
    """Read from an autoencoder's YAML file the channels, and height and width in pixels, of the pictures that it takes.

    Raises:
        ConfigError: as `load_vae_model`, or the autoencoder does not take pictures.
    """
    model = load_vae_model(path)
    size = getattr(model, "sample_size", None)
    if size is None or model.model_id == "audio_ae":
        text = f"{path}: {model.model_id} does not take pictures; name another autoencoder"
        raise ConfigError(text, path=path, key="model.model_id")
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(model, "channels", 3), (height, width)


def load_vae_config(path: Path | str) -> VAEConfig:
    """Read an autoencoder's YAML file. Keys of `train` that are unknown are logged once per file and ignored.

    Raises:
        ConfigError: naming the file, the dotted key and, for a misspelling, the nearest valid key.
    """
    data = read_yaml(path, optional_env=("train", "wandb"))
    if "model" in data:
        data = {**data, "model": parse_vae_model(data["model"], path=path)}
    train = data.get("train")
    if isinstance(train, Mapping):
        foreign = tuple(sorted(str(key) for key in train if key not in VAETrainConfig.model_fields))
        data = {**data, "train": {key: value for key, value in train.items() if key in VAETrainConfig.model_fields}}
        if foreign:
            _tell_foreign(str(path), foreign)
    return parse(VAEConfig, data, path=path)


@functools.cache
def _tell_foreign(path: str, keys: tuple[str, ...]) -> None:
    _log.warning("%s: ignored in train: %s", path, "; ".join(unknown(key, VAETrainConfig.model_fields) for key in keys))
