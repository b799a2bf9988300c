"""The autoencoder configs: shipped files load, and each mistake is one error that names file, key and nearest key."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from owl_wms.configs import AudioAEConfig, DCAEConfig, DistillVAEConfig, load_vae_config, parse_vae_model
from owl_wms.configs.world import parse_world
from owl_wms.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "vae"
WORLD = yaml.safe_load((CONFIGS.parents[1] / "examples" / "world" / "game_rft.yml").read_text())
DEC_DIST = yaml.safe_load((CONFIGS / "dec_dist.yml").read_text())


def _write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "c.yml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_shipped_files_load_with_upstreams_values() -> None:
    loaded = {path.stem: load_vae_config(path).model for path in CONFIGS.glob("*.yml")}
    base, distilled = loaded["base"], loaded["dec_dist"]
    assert isinstance(base, DCAEConfig)
    assert (base.channels, base.latent_channels, base.ch_0, base.ch_max) == (4, 128, 256, 2048)
    assert base.sample_size == (360, 640)
    assert base.decoder_blocks_per_stage == (4,) * 6
    assert (distilled.channels, distilled.ch_0, distilled.ch_max) == (3, 96, 1536)
    assert isinstance(loaded["cod_64x_c64_depth_distill_dec"], DistillVAEConfig)
    audio = loaded["audio_ae_2"]
    assert isinstance(audio, AudioAEConfig)
    assert audio.strides == (3, 5, 7, 7)
    assert loaded["waypoint_1_base"].do_channel_mask
    train = load_vae_config(CONFIGS / "dec_dist.yml").train
    assert train is not None
    assert train.loss_weights == {"l2": 1.0, "lpips": 12.0, "gan": 0.0, "feature_matching": 0.0}


def _changed(*path: str, value: Any = None, remove: bool = False) -> dict[str, Any]:
    data = copy.deepcopy(DEC_DIST)
    node = data
    for key in path[:-1]:
        node = node[key]
    if remove:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


MISTAKES = [
    (_changed("model", "ch_mx", value=3), "model.ch_mx", "unknown key 'ch_mx'; did you mean 'ch_max'?"),
    (_changed("trian", value={}), "trian", "did you mean 'train'?"),
    (_changed("model", "zzzzzzzz", value=3), "model.zzzzzzzz", "valid are attn_d_model, attn_size, ch_0"),
    (_changed("model", "ch_max", value="1536"), "model.ch_max", "must be a valid integer, received '1536' (str)"),
    (_changed("model", "ch_max", value=1536.0), "model.ch_max", "valid integer, received 1536.0 (float)"),
    (_changed("model", "ch_0", value=0), "model.ch_0", "greater than 0, received 0"),
    (_changed("model", "use_middle_block", value=1), "model.use_middle_block", "valid boolean, received 1 (int)"),
    (_changed("model", "sample_size", value=[360]), "model.sample_size", "[height, width] pair"),
    (_changed("model", "sample_size", value=[360, -1]), "model.sample_size", "[height, width] pair"),
    (_changed("model", "decoder_blocks_per_stage", value=[1, "a"]), "model.decoder_blocks_per_stage.1", "received 'a'"),
    (_changed("model", "decoder_blocks_per_stage", value=6), "model.decoder_blocks_per_stage", "received 6 (int)"),
    (_changed("model", "ch_0", remove=True), "model.ch_0", "is missing, and it has no default"),
    (
        _changed("model", "model_id", remove=True),
        "model.model_id",
        "valid are audio_ae, dcae, distill_vae, taehv",
    ),
    (
        _changed("model", "model_id", value="game_rft"),
        "model.model_id",
        "'game_rft' is a world model; the",
    ),
    (_changed("model", "model_id", value="dcea"), "model.model_id", "did you mean 'dcae'?"),
    (_changed("model", "model_id", value=["dcae"]), "model.model_id", "unknown autoencoder"),
    (_changed("model", value=None), "model", "must be a mapping"),
    (_changed("model", remove=True), "model", "is missing"),
    (_changed("train", "latent_scale", value=float("nan")), "train.latent_scale", "finite number"),
]


@pytest.mark.parametrize("keys", [("bach_size",), ("skip_ind", "latent_shift", "encoder_cfg")])
def test_unknown_keys_of_train_are_told_once_and_ignored(
    tmp_path: Path, keys: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Files of upstream's autoencoder repository have keys that only its trainers know; decoding reads `model`."""
    data = _changed("train", keys[0], value=3)
    data["train"].update({key: [1, {"a": None}] for key in keys})
    path = _write(tmp_path, data)
    assert load_vae_config(path) == load_vae_config(path)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert all(key in record.getMessage() for key in (str(path), *keys))
    if keys[0] == "bach_size":
        assert "did you mean 'batch_size'?" in record.getMessage()


@pytest.mark.parametrize(("data", "key", "words"), MISTAKES, ids=[key for _, key, _ in MISTAKES])
def test_mistakes_name_file_key_and_remedy(tmp_path: Path, data: dict, key: str, words: str) -> None:
    path = _write(tmp_path, data)
    with pytest.raises(ConfigError) as caught:
        load_vae_config(path)
    assert caught.value.key == key
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    assert key in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("size", [(1 << 31) + 8, 1 << 63, 10**30])
@pytest.mark.parametrize("key", ["ch_0", "ch_max", "channels", "latent_channels", "decoder_blocks_per_stage"])
def test_widths_beyond_what_torch_counts_in_are_refused(key: str, size: int) -> None:
    model = {**DEC_DIST["model"], key: [size] if key.endswith("stage") else size}
    with pytest.raises(ConfigError, match=rf"model\.{key}.*2147483648"):
        parse_vae_model(model)
    with pytest.raises(ConfigError, match=r"train\.batch_size.*2147483648"):
        parse_world({**WORLD, "train": {**WORLD["train"], "batch_size": size}})


def test_several_mistakes_are_all_listed(tmp_path: Path) -> None:
    data = _changed("model", "ch_max", value="x")
    del data["model"]["latent_channels"]
    with pytest.raises(
        ConfigError, match=r"model\.ch_max: .*; model\.latent_channels is missing|missing.*; model\.ch_max"
    ):
        load_vae_config(_write(tmp_path, data))


def test_environment_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _changed("train", "checkpoint_dir", value="${env:OWL_TEST_ROOT}/x")
    data["wandb"] = {"name": "${env:OWL_TEST_NAME}", "project": "p", "run_name": "r"}
    monkeypatch.setenv("OWL_TEST_ROOT", "/somewhere")
    monkeypatch.delenv("OWL_TEST_NAME", raising=False)
    cfg = load_vae_config(_write(tmp_path, data))
    assert cfg.train is not None
    assert cfg.wandb is not None
    assert cfg.train.checkpoint_dir == "/somewhere/x"
    # Logging is optional: decoding with upstream's own file must not need its W&B user.
    assert cfg.wandb.name is None
    data["model"]["model_id"] = "${env:OWL_TEST_NAME}"
    with pytest.raises(ConfigError, match="OWL_TEST_NAME, which is not set") as caught:
        load_vae_config(_write(tmp_path, data))
    assert caught.value.key == "model.model_id"


def test_frozen_and_picklable() -> None:
    cfg = load_vae_config(CONFIGS / "dec_dist.yml")
    with pytest.raises(ValidationError, match="frozen"):
        cfg.model.ch_0 = 3  # type: ignore[misc]
    assert cfg.train is not None
    assert cfg.train.opt_kwargs is not None
    with pytest.raises(TypeError, match="immutable"):
        cfg.train.opt_kwargs["lr"] = 1.0
    with pytest.raises(TypeError, match="immutable"):
        cfg.train.opt_kwargs.update(lr=1.0)
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert dict(**cfg.train.opt_kwargs)["betas"] == (0.9, 0.95)
    assert parse_vae_model(cfg.model.model_dump()) == cfg.model
