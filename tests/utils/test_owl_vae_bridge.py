"""The bridge: upstream's names, positions and results; shapes by hypothesis; nothing imported that is not needed."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from owl_wms.cache.key import is_entry_name
from owl_wms.errors import CheckpointError, ConfigError, LatentShapeError
from owl_wms.utils import owl_vae_bridge as bridge
from owl_wms.vae import fold_weight_norm
from tests.runtime.toolchains import TinyDecoder

DECODER = fold_weight_norm(TinyDecoder()).eval()
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Configuration and checkpoint of the golden decoder."""
    golden = torch.load(Path(__file__).parents[1] / "data" / "dcae_pin_square.pt", weights_only=True)
    config, checkpoint = tmp_path / "c.yml", tmp_path / "d.pt"
    config.write_text(json.dumps({"model": golden["cfg"]}), encoding="utf-8")
    torch.save(golden["decoder"], checkpoint)
    return config, checkpoint


def test_upstreams_signatures_stand_and_news_are_keyword_only() -> None:
    upstream = {
        "get_decoder_only": [("vae_id", None), ("cfg_path", None), ("ckpt_path", None)],
        "make_batched_decode_fn": [("decoder", None), ("batch_size", 8), ("use_tensorrt", True)],
        "make_batched_audio_decode_fn": [("decoder", None), ("batch_size", 8)],
        "get_engine_cache_path": [("model_key", None), ("input_shape", None), ("precision", "fp16")],
    }
    for name, expected in upstream.items():
        parameters = list(inspect.signature(getattr(bridge, name)).parameters.values())
        positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        given_ = [(p.name, None if p.default is inspect.Parameter.empty else p.default) for p in positional]
        assert given_ == expected
        rest = [p for p in parameters if p not in positional]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is not inspect.Parameter.empty for p in rest)


def test_get_decoder_only_gives_upstreams_module(files: tuple[Path, Path]) -> None:
    decoder = bridge.get_decoder_only(None, *files, device="cpu")
    tensors = list(decoder.parameters())
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert not decoder.training
    assert not any(tensor.requires_grad for tensor in tensors)
    assert not any("parametrizations" in name for name in decoder.state_dict()), "weight norm is folded"
    golden = torch.load(Path(__file__).parents[1] / "data" / "dcae_pin_square.pt", weights_only=True)
    wide = bridge.get_decoder_only(None, *map(str, files), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(wide(golden["z"]), golden["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [bridge.make_batched_decode_fn, bridge.make_batched_audio_decode_fn])
def test_a_batch_size_is_an_integer(make: Any) -> None:
    for wrong in (4.0, None, "8", torch.ones(2), 0, -1):
        with pytest.raises(ValueError, match="batch_size must be"):
            make(DECODER, wrong)
    for right in (np.int64(3), np.uint8(3), torch.tensor(3), 3):
        decode = make(DECODER, right)
        assert type(decode.batch_size) is int
        assert decode.batch_size == 3


def test_get_decoder_only_takes_this_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {(0, None): 0, (0, "3"): 3, (0, "9"): 0, (2, "3"): 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for (current, rank), expected in cases.items():
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert bridge._own_device() == torch.device("cuda", expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bridge._own_device() == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "abc")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(ConfigError, match=r"LOCAL_RANK must be a whole number >= 0, .* got 'abc'"):
            bridge._own_device()


def test_bad_files_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt"):
        bridge.get_decoder_only(None, files[0], tmp_path / "nowhere.pt")
    with pytest.raises(ConfigError):
        bridge.get_decoder_only(None, tmp_path / "nowhere.yml", files[1])


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(1, 4), st.integers(1, 5)),
    batch_size=st.integers(1, 9),
    order=st.permutations(range(5)),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_strides_and_ragged_sizes(
    sizes: tuple[int, int, int, int], batch_size: int, order: list[int], step: int, dtype: torch.dtype
) -> None:
    b, n, h, w = sizes
    shape = [b, n * step, 4, h, w]
    # Memory laid out in a random order of axes, then strided along time: neither contiguous nor view-compatible.
    stored = torch.randn([shape[axis] for axis in order]).mul(3).to(dtype)
    latents = stored.permute([order.index(axis) for axis in range(5)])[:, ::step]
    assert latents.shape == (b, n, 4, h, w)
    frames = bridge.make_batched_decode_fn(DECODER, batch_size, use_tensorrt=False)(latents)
    assert frames.shape == (b, n, 3, 2 * h, 2 * w)
    assert frames.dtype == torch.bfloat16
    if frames.numel():
        with torch.no_grad():
            expected = DECODER(latents.reshape(-1, 4, h, w).float()).reshape(frames.shape)
        torch.testing.assert_close(frames.float(), expected, rtol=1e-2, atol=1e-2)


@given(shape=st.lists(st.integers(0, 5), max_size=7))
def test_every_wrong_shape_is_a_value_error(shape: list[int]) -> None:
    decode = bridge.make_batched_decode_fn(DECODER, 2, use_tensorrt=False)
    latents = torch.zeros(shape)
    if len(shape) == 5 and shape[2] == 4 and shape[3] and shape[4]:
        assert decode(latents).shape[:2] == tuple(shape[:2])
    else:
        with pytest.raises(LatentShapeError) as caught:
            decode(latents)
        assert str(list(shape)) in str(caught.value)
        assert caught.value.expected in str(caught.value)


def test_config_off_is_not_overruled_by_the_default_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_ENABLED", raising=False)
    off = bridge.TensorRTConfig(enabled=False)
    assert not bridge.make_batched_decode_fn(DECODER, config=off).settings.enabled
    assert bridge.make_batched_decode_fn(DECODER).settings.enabled
    assert not bridge.make_batched_decode_fn(DECODER, 8, False).settings.enabled


def test_cache_path_of_an_unbuilt_program_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path))
    path = bridge.get_engine_cache_path("dcae", (8, 128, 8, 8))
    assert path == bridge.get_engine_cache_path("dcae", [8, 128, 8, 8], "fp16")
    assert path.parent.parent == tmp_path
    assert path != bridge.get_engine_cache_path("dcae", (8, 128, 8, 8), "bf16")
    assert not path.exists()
    with pytest.raises(ConfigError, match="bf16"):
        bridge.get_engine_cache_path("dcae", (8, 128, 8, 8), "fp17")
    for shape in ("8x128", (8, None), 8):
        with pytest.raises(ConfigError, match="input_shape must be integers"):
            bridge.get_engine_cache_path("dcae", shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_key", ["../../etc/x", "/etc/x", "..", "", "a/b", "x" * 300])
def test_cache_path_stays_in_the_cache_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_key: str
) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path))
    path = bridge.get_engine_cache_path(model_key, (8, 128, 8, 8))
    assert path.parent.parent == tmp_path
    assert is_entry_name(path.parent.name)
    assert ".." not in path.parts


def test_reading_the_lazy_names_imports_no_tensorrt_without_a_gpu() -> None:
    code = (
        "import sys; from owl_wms.utils import owl_vae_bridge as b; before = 'torch_tensorrt' in sys.modules; "
        "print(before, b.TENSORRT_CACHE_DIR.name, b.TENSORRT_AVAILABLE in (True, False))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", bridge.TENSORRT_CACHE_DIR.name, "True"]
    with pytest.raises(AttributeError, match="TENSORT"):
        bridge.TENSORT_AVAILABLE  # noqa: B018
