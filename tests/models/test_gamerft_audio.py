"""GameRFTAudio: shapes, its loss, its cache, and that picture and sound see each other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from owl_wms.models import GameRFTAudio
from owl_wms.models.load import load_model
from owl_wms.nn.kv_cache import KVCache
from tests.world import inputs, relative, tiny_config, tiny_core

DATA = Path(__file__).parents[1] / "data"
AUDIO = {"model_id": "game_rft_audio"}


@torch.no_grad()
def test_picture_and_sound_see_each_other_and_only_the_past() -> None:
    core = tiny_core(**AUDIO)
    x, t, mouse, btn = inputs(2, 5)
    audio = torch.randn(2, 5, 3)
    video, sound = core(x, audio, t, mouse, btn)
    assert (video.shape, sound.shape) == (x.shape, audio.shape)
    other = audio.clone()
    other[:, 2] += 1
    video_2, _ = core(x, other, t, mouse, btn)
    assert (video - video_2)[:, :2].abs().max() < 1e-5
    assert (video - video_2)[:, 2].abs().max() > 1e-3
    louder = x.clone()
    louder[:, 3] += 1
    assert (core(louder, audio, t, mouse, btn)[1] - sound)[:, 3].abs().max() > 1e-3


@torch.no_grad()
def test_cached_equals_uncached() -> None:
    core = tiny_core(**AUDIO)
    x, t, mouse, btn = inputs(1, 7)
    audio = torch.randn(1, 7, 3)
    whole = core(x, audio, t, mouse, btn)
    cache, cuts = KVCache(core.config), [0, 3, 4, 7]
    parts = [core(*(a[:, i:j] for a in (x, audio, t, mouse, btn)), kv_cache=cache) for i, j in pairwise(cuts)]
    for index in range(2):
        assert relative(torch.cat([p[index] for p in parts], 1), whole[index]) < 1e-4


def test_losses_add_up() -> None:
    model = GameRFTAudio(tiny_config(**AUDIO))
    x, _, mouse, btn = inputs(2, 4)
    total, video, audio = model(x, torch.randn(2, 4, 3), mouse, btn)
    assert torch.equal(total, video + audio)
    total.backward()
    assert model.core.audio_proj_in.weight.grad.abs().sum() > 0
    named = model(x, torch.randn(2, 4, 3), mouse, btn, return_dict=True, has_controls=torch.zeros(2, dtype=torch.bool))
    assert not named["cfg_mask"].any()
    assert named["pred_audio"].shape == (2, 4, 3)


def test_upstreams_files_without_has_audio_still_mean_audio() -> None:
    config = tiny_config(**AUDIO)
    del config.has_audio
    assert GameRFTAudio(config).core.transformer.rope.cos.shape[1] == 5, "four of the picture, one of the sound"


def test_audio_of_another_length_is_refused() -> None:
    core = tiny_core(**AUDIO)
    x, t, mouse, btn = inputs(1, 3)
    with pytest.raises(ValueError, match=r"audio must be \[b, n, 3\]"):
        core(x, torch.randn(1, 4, 3), t, mouse, btn)


@torch.no_grad()
def test_upstreams_own_core() -> None:
    """Upstream's main, with its own weights and inputs; `cond` is the condition of the full vector, which the vectors
    of GameRFT cover (`tests/models/test_gamerft.py`).
    """
    golden = torch.load(DATA / "gamerft_audio_core.pt", weights_only=True)
    for normed in (True, False):
        core = GameRFTAudio(SimpleNamespace(**golden["cfg"], video_head_norm=normed)).core.eval()
        core.load_state_dict(golden["state_dict"], strict=False)
        core.condition = lambda *_: golden["cond"]
        video, audio = core(golden["x"], golden["audio"], golden["t"])
        assert relative(audio, golden["audio_out"]) < 1e-5
        assert relative(video, golden["video"]) < 1e-5 if normed else relative(video, golden["video"]) > 0.05


def test_loading_says_which_head_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {**vars(tiny_config(**AUDIO)), "global_window": 8}
    weights = GameRFTAudio(tiny_config(**AUDIO)).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    for name, head in (("silent", {}), ("old", {"video_head_norm": False}), ("new", {"video_head_norm": True})):
        (tmp_path / f"{name}.yml").write_text(json.dumps({"model": {**values, **head}, "train": {"trainer_id": "av"}}))
        core = load_model(tmp_path / f"{name}.yml", tmp_path / "w.pt").core
        assert core.video_head_norm is (name != "old")
    said = [record.getMessage() for record in caplog.records if "picture head" in record.getMessage()]
    assert ["after a layer norm" in text for text in said] == [True, False, True]
    assert ["which it does not say" in text for text in said] == [True, False, False]
