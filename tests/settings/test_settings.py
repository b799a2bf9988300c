"""TensorRTConfig: environment over call over config, and every bad value named with the valid ones."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from owl_wms import env
from owl_wms.errors import ConfigError
from owl_wms.settings import EIGHT_BITS, PRECISIONS, TensorRTConfig, default_cache_dir


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in env.TENSORRT_VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


def test_order_is_environment_call_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TensorRTConfig(precision="fp32", max_batch_size=3)
    assert TensorRTConfig.resolve(config).precision == "fp32"
    assert TensorRTConfig.resolve(config, precision="bf16").precision == "bf16"
    monkeypatch.setenv("TENSORRT_PRECISION", " FP16 ")
    resolved = TensorRTConfig.resolve(config, precision="bf16")
    assert (resolved.precision, resolved.max_batch_size) == ("fp16", 3)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("TENSORRT_ENABLED", "false", "enabled", False),
        ("TENSORRT_ENABLED", "1", "enabled", True),
        ("TENSORRT_FALLBACK", "error", "fallback_on_error", False),
        ("TENSORRT_FALLBACK", "PyTorch", "fallback_on_error", True),
        ("TENSORRT_BUILD", "Background", "build", "background"),
        ("TENSORRT_CACHE_DIR", "/x/y", "cache_dir", Path("/x/y")),
        ("TENSORRT_CACHE_DIR", "  ", "cache_dir", None),
    ],
)
def test_variables(monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: Any) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(TensorRTConfig.resolve(), field) == value


@pytest.mark.parametrize(
    ("variable", "text", "valid"),
    [
        ("TENSORRT_ENABLED", "maybe", "true"),
        ("TENSORRT_PRECISION", "half", "fp16"),
        ("TENSORRT_FALLBACK", "x", "error"),
        ("TENSORRT_BUILD", "later", "wait, background"),
    ],
)
def test_a_bad_variable_names_itself_and_the_valid_values(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, valid: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError) as caught:
        TensorRTConfig.resolve()
    assert variable in str(caught.value)
    assert valid in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enabled", 2), ("precision", "tf32"), ("precision", None), ("max_batch_size", 0), ("max_batch_size", 1.5),
        ("max_batch_size", True), ("workspace_size", -1), ("cache_max_bytes", 0), ("fallback_on_error", "no"),
        ("plans", 3), ("plans", ("",)), ("cache_dir", ""), ("cache_dir", 5), ("cache_dir", "a\0b"),
    ],
)  # fmt: skip
def test_bad_values(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TensorRTConfig(**{field: value})
    assert caught.value.key == field


@pytest.mark.parametrize("field", ["cache_dir", "calibration"])
def test_a_home_that_cannot_be_found_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a .* path; got '~nobody-of-that-name/x', whose home"):
        TensorRTConfig(**{field: "~nobody-of-that-name/x"})  # type: ignore[arg-type]


def test_a_variable_with_a_home_that_cannot_be_found_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_DIR", "~nobody-of-that-name/x")
    with pytest.raises(ConfigError, match=r"TENSORRT_CACHE_DIR: cache_dir .*'~nobody-of-that-name/x', whose home"):
        TensorRTConfig.resolve()
    monkeypatch.setenv("TENSORRT_CACHE_DIR", "~/x")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert TensorRTConfig.resolve().cache_dir == Path("/home/somebody/x")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it answers to a uid without an account
    with pytest.raises(ConfigError, match=r"TENSORRT_CACHE_DIR: cache_dir .*'~/x', whose home"):
        TensorRTConfig.resolve()


def test_calibration_wants_a_precision_that_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("latents.safetensors")
    for precision in ("auto", "bf16"):
        with pytest.raises(ConfigError, match=f"'{file}' with precision '{precision}'") as caught:
            TensorRTConfig.resolve(precision=precision, calibration=file)
        assert caught.value.key == "calibration"
    with pytest.raises(ConfigError, match="with precision 'auto'"):
        TensorRTConfig.resolve(calibration=file)
    for precision in EIGHT_BITS:
        assert TensorRTConfig.resolve(precision=precision.upper(), calibration=file).calibration == file
    monkeypatch.setenv("TENSORRT_PRECISION", "fp8")
    assert TensorRTConfig.resolve(calibration=file).calibration == file


def test_who_replaces_an_8_bit_precision_replaces_its_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TensorRTConfig(precision="fp8", calibration=Path("latents.safetensors"))
    assert TensorRTConfig.resolve(config, precision="int8").calibration == config.calibration
    assert TensorRTConfig.resolve(config, precision="bf16").calibration is None
    with pytest.raises(ConfigError, match="with precision 'bf16'"):
        TensorRTConfig.resolve(config, precision="bf16", calibration=config.calibration)
    monkeypatch.setenv("TENSORRT_PRECISION", "bf16")
    assert TensorRTConfig.resolve(config).calibration is None, "an operator's switch needs no other change"


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'precision'\? valid settings: enabled"):
        TensorRTConfig.resolve(precison="fp16")
    with pytest.raises(ConfigError, match="unknown TensorRT setting"):
        TensorRTConfig.resolve({"use_cash": True})


def test_training_configuration_fields() -> None:
    train = types.SimpleNamespace(
        use_tensorrt=False, tensorrt_precision="bf16", tensorrt_cache_dir=None, tensorrt_fallback=False
    )
    resolved = TensorRTConfig.resolve(train)
    assert (resolved.enabled, resolved.precision, resolved.cache_dir) == (False, "bf16", None)
    assert resolved.fallback_on_error is False
    assert TensorRTConfig.resolve({"tensorrt_precision": "fp32", "use_cache": False}).use_cache is False
    with pytest.raises(ConfigError, match="use_tensorrt"):
        TensorRTConfig.resolve(object())


def test_frozen_and_equal() -> None:
    with pytest.raises(AttributeError):
        TensorRTConfig().precision = "fp32"  # type: ignore[misc]
    assert TensorRTConfig(plans=["a"]) == TensorRTConfig(plans=("a",))  # type: ignore[arg-type]


def test_default_directory_in_a_checkout_and_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    top = Path(__file__).parents[2]
    assert default_cache_dir() == top / "trt_cache"
    assert TensorRTConfig().cache_directory().is_absolute()
    installed = tmp_path / "site-packages" / "owl_wms" / "settings.py"
    monkeypatch.setattr("owl_wms.settings.__file__", str(installed))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / "owl_wms" / "trt_cache"
    monkeypatch.setenv("OWL_PLACE", "home")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/$OWL_PLACE")  # from a file that no shell reads
    assert default_cache_dir() == tmp_path / "home" / "owl_wms" / "trt_cache"


@given(st.text())
def test_any_text_is_a_precision_or_a_config_error(text: str) -> None:
    if text.strip().lower() in PRECISIONS:
        assert TensorRTConfig(precision=text).precision in PRECISIONS
    else:
        with pytest.raises(ConfigError, match="auto, fp16, bf16"):
            TensorRTConfig(precision=text)
