"""The world-model configs: shipped files load, mistakes are named, and each trainer states what it needs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from owl_wms.configs import (
    TRAINER_REQUIRED,
    TrainingConfig,
    WorldModelConfig,
    load_world_config,
    missing_trainer_keys,
    require_trainer_keys,
)
from owl_wms.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [*sorted(CONFIGS.glob("*.yml")), *sorted((CONFIGS.parent / "examples" / "world").glob("*.yml"))]
DIT_V4 = yaml.safe_load((CONFIGS / "dit_v4.yml").read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_load_and_satisfy_their_trainer(path: Path) -> None:
    cfg = load_world_config(path)
    require_trainer_keys(cfg.train, path=path)
    for name in (cfg.train.vae_cfg_path, cfg.train.audio_vae_cfg_path, cfg.train.teacher_cfg):
        assert name is None or (CONFIGS.parent / name).is_file()


def test_known_ids_are_the_registered_ones() -> None:
    from owl_wms.configs.world import DataId, SamplerId, TrainerId
    from owl_wms.data.loaders import DATA_IDS
    from owl_wms.models import MODELS
    from owl_wms.sampling import SAMPLERS
    from owl_wms.trainers import TRAINERS

    assert set(get_args(DataId)) == set(DATA_IDS)
    assert set(get_args(SamplerId)) == set(SAMPLERS)
    assert set(get_args(TrainerId)) == set(TRAINERS)
    assert set(get_args(WorldModelConfig.model_fields["model_id"].annotation)) == set(MODELS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_loader_and_sampler_of_shipped_files_take_their_arguments(path: Path) -> None:
    from owl_wms.data.loaders import get_loader
    from owl_wms.errors import DataError
    from owl_wms.sampling import get_sampler_cls

    train = load_world_config(path).train
    get_sampler_cls(str(train.sampler_id))(**(train.sampler_kwargs or {}))
    for data_id, kwargs in ((train.data_id, train.data_kwargs), (train.sample_data_id, train.sample_data_kwargs)):
        problem = ""
        try:
            get_loader(str(data_id), train.batch_size, **(kwargs or {}))
        except DataError as error:  # the data itself is not shipped
            problem = str(error)
        assert not problem or "schema.json" in problem


def test_values_and_tensorrt_defaults() -> None:
    cfg = load_world_config(CONFIGS / "dit_v4.yml")
    assert (cfg.model.n_layers, cfg.model.n_heads, cfg.model.d_model, cfg.model.n_frames) == (16, 24, 1536, 1536)
    assert cfg.model.global_window is None
    assert cfg.train.vae_scale == 0.63
    assert cfg.train.sampler_kwargs == {
        "n_steps": 16, "cfg_scale": 1.0, "num_frames": 900, "noise_prev": 0.2, "only_return_generated": False,
    }  # fmt: skip
    train = TrainingConfig()
    assert (train.use_tensorrt, train.tensorrt_fallback) == (True, True)
    assert (train.tensorrt_precision, train.tensorrt_cache_dir) == (None, None)
    assert cfg.wandb.project is None


def test_numbers_of_numpy_are_plain_numbers() -> None:
    """A sweep in a notebook draws them, and a checkpoint holds the configuration as JSON has it."""
    given = {"opt_kwargs": {"lr": np.float32(0.5), "betas": [np.float64(0.5), 0.75]}, "data_kwargs": {"n": np.int64(3)}}
    train = TrainingConfig(**given).model_dump(mode="json")
    assert train["opt_kwargs"] == {"lr": 0.5, "betas": [0.5, 0.75]}
    assert train["data_kwargs"] == {"n": 3}


def test_an_empty_section_of_wandb_is_one_without_keys(tmp_path: Path) -> None:
    (tmp_path / "w.yml").write_text(yaml.safe_dump({**DIT_V4, "wandb": None}))
    assert load_world_config(tmp_path / "w.yml").wandb.project is None


def test_the_golden_model_section_is_valid() -> None:
    golden = torch.load(CONFIGS.parent / "tests" / "data" / "gamerft_core.pt", weights_only=True)
    cfg = WorldModelConfig.model_validate(golden["motion"]["cfg"])
    assert cfg.local_window == 2
    assert cfg.gradient_checkpointing is False


def _changed(section: str, key: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(DIT_V4)
    if value is ...:
        del data[section][key]
    else:
        data[section][key] = value
    return data


MISTAKES = [
    (_changed("model", "model_id", "dcae"), "model.model_id", "'dcae' is an autoencoder; a world model's"),
    (_changed("model", "n_layer", 2), "model.n_layer", "did you mean 'n_layers'?"),
    (_changed("model", "uncond", ...), "model.uncond", "is missing"),
    (_changed("model", "global_window", ...), "model.global_window", "is missing"),
    (
        {"model": {"model_id": "game_rft"}, "train": {}},
        "model.uncond",
        "model.backbone, model.has_audio, ",
    ),
    ({"model": {"model_id": "game_rft"}, "train": {}}, "model.uncond", "global_window are missing, and they have no"),
    (_changed("model", "tokens_per_frame", 65), "model.tokens_per_frame", "must be sample_size**2 = 64, received 65"),
    (_changed("model", "n_heads", 7), "model.d_model", "multiple of n_heads (7), received 1536"),
    (_changed("model", "cfg_prob", 2), "model.cfg_prob", "within 0..1"),
    (_changed("model", "backbone", "dti"), "model.backbone", "did you mean 'dit'?"),
    (_changed("model", "causal", "yes please"), "model.causal", "valid boolean"),
    (_changed("train", "trainer_id", "sforce3"), "train.trainer_id", "did you mean 'sforce_vid'?"),
    (_changed("train", "tensorrt_precision", "fp61"), "train.tensorrt_precision", "did you mean 'fp16'?"),
    (_changed("train", "use_tensorrt", "true"), "train.use_tensorrt", "valid boolean, received 'true' (str)"),
    (_changed("train", "opt_kwargs", {"momentun": 1}), "train.opt_kwargs.momentun", "did you mean 'momentum'?"),
    (_changed("train", "opt_kwargs", 3), "train.opt_kwargs", "valid dictionary"),
    (_changed("train", "opt_kwargs", {"lr": "0.1"}), "train.opt_kwargs.lr", "'0.1' (str): leave out the quotes"),
    (
        _changed("train", "opt_kwargs", {"adamw_betas": [0.9, "0.95"]}),
        "train.opt_kwargs.adamw_betas",
        "received '0.95'",
    ),
    (
        _changed("train", "sampler_kwargs", {"only_return_generated": "False"}),
        "train.sampler_kwargs.only_return_generated",
        "must be a flag or a number, received 'False' (str)",
    ),
    (_changed("train", "seed", 2**62), "train.seed", "less than or equal to 4294967296"),
    (_changed("train", "seed", -(2**33)), "train.seed", "greater than or equal to -4294967296"),
    (_changed("train", "gen_p", 1.5), "train.gen_p", "within 0..1"),
    (_changed("train", "data_id", "cod_s3_audi"), "train.data_id", "did you mean 'cod_s3_audio'?"),
    (_changed("train", "sample_data_id", "cods"), "train.sample_data_id", "did you mean 'cod'?"),
    (_changed("train", "sampler_id", "av_cachin"), "train.sampler_id", "did you mean 'av_caching'?"),
    (_changed("train", "vae_scale", 0.0), "train.vae_scale", "must be above 0, received 0.0"),
    (_changed("train", "vae_scale", "0.63"), "train.vae_scale", "valid number"),
    (_changed("train", "levels", None), "train.levels", "must be a section, with keys of its own, received None"),
    (_changed("train", "student_levels", 0.5), "train.student_levels", "must be a list, received 0.5 (float)"),
    (_changed("train", "regression_weight", -1.0), "train.regression_weight", "must be at least 0, received -1.0"),
    (_changed("train", "teacher_max_level", 0.0), "train.teacher_max_level", "above 0 and at most 1, received 0.0"),
    (_changed("train", "fps", 2000), "train.fps", "must be at most 240, received 2000"),
    (_changed("model", "rope_base", 0.0), "model.rope_base", "must be at least 1, received 0.0"),
    (_changed("model", "predicts", "noise"), "model.predicts", "'velocity' or 'remainder'"),
    (
        _changed("model", "sink_noise", 0.1),
        "model.sink_noise",
        "needs sink_frames and must be within 0..1, received 0.1",
    ),
    (
        {"model": {**DIT_V4["model"], "causal": True, "global_window": None, "sink_frames": 2, "sink_noise": 1.5}}
        | {"train": {}},
        "model.sink_noise",
        "must be within 0..1, received 1.5",
    ),
    (
        {"model": {**DIT_V4["model"], "has_audio": True, "tokens_per_frame": 65, "predicts": "remainder"}, "train": {}},
        "model.predicts",
        "must be velocity for a model with audio",
    ),
]


@pytest.mark.parametrize(("data", "key", "words"), MISTAKES, ids=[key for _, key, _ in MISTAKES])
def test_mistakes_name_file_key_and_remedy(tmp_path: Path, data: dict, key: str, words: str) -> None:
    path = tmp_path / "w.yml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as caught:
        load_world_config(path)
    assert caught.value.key == key
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("trainer_id", TRAINER_REQUIRED)
def test_each_trainer_lists_what_is_missing(trainer_id: str) -> None:
    empty = TrainingConfig(trainer_id=trainer_id)  # type: ignore[arg-type]
    assert missing_trainer_keys(empty) == TRAINER_REQUIRED[trainer_id]
    first = TRAINER_REQUIRED[trainer_id][0]
    with pytest.raises(ConfigError, match=f"'{trainer_id}' needs train.{first}") as caught:
        require_trainer_keys(empty)
    assert caught.value.key == f"train.{first}"
    assert all(name in TrainingConfig.model_fields for name in TRAINER_REQUIRED[trainer_id])


def test_no_trainer_and_unknown_trainer() -> None:
    with pytest.raises(ConfigError, match="trainer_id: is missing; valid are av, causvid_vid"):
        missing_trainer_keys(TrainingConfig())
    with pytest.raises(ConfigError, match="did you mean 'causvid_vid'"):
        missing_trainer_keys(TrainingConfig(), "causvid")
