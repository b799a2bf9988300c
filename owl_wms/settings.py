"""Settings of the compiled path: one frozen object, resolved in one order, every bad value named with its alternatives.

Why: a precision that is silently ignored or a misspelt variable costs a day. The order is environment > call > config,
so that an operator can switch a deployed program without editing it; `TensorRTConfig.resolve` is the only place where
the three meet.

Usage:
    settings = TensorRTConfig.resolve(train_config, precision="bf16")
    settings.cache_directory()          # where programs are stored
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import platformdirs

from owl_wms import env
from owl_wms.configs.paths import expanded
from owl_wms.configs.world import Precision
from owl_wms.errors import ConfigError

PRECISIONS: tuple[str, ...] = get_args(Precision)
EIGHT_BITS = ("fp8", "int8")
"""The precisions that are calibrated."""
BUILDS = ("wait", "background")
FALLBACKS = {"pytorch": True, "error": False}
GIB = 1024**3

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
# What the training configuration calls the same settings; its field names are upstream-style and prefixed.
_TRAINING_FIELDS = {
    "use_tensorrt": "enabled",
    "tensorrt_precision": "precision",
    "tensorrt_cache_dir": "cache_dir",
    "tensorrt_fallback": "fallback_on_error",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorRTConfig:
    """Settings of the compiled path: whether a decoder is compiled, and how.

    Attributes:
        enabled: False decodes with plain PyTorch and touches neither TensorRT nor the cache.
        precision: `auto` takes fp16 when every output is finite and parity holds, else bf16; the others are taken as
            said.
        max_batch_size: largest static batch a program is built for, >= 1; a larger requested batch is decoded in chunks
            of this size.
        use_cache: False builds in a temporary directory and keeps nothing.
        fallback_on_error: False turns every failure of the compiled path into FastPathError.
        build: `wait`: the first decode of a latent shape waits until its program is built. `background`: PyTorch
            decodes until then, and the program takes over between two calls. A program in the cache is waited for
            either way.
        workspace_size: bytes of scratch memory TensorRT may plan with; 0 leaves it to TensorRT.
        plans: names of the plans to build and compare; empty means every plan that applies.
        calibration: `.safetensors` file of latents (`[..., c, h, w]`, called `latents`) that fp8 and int8 are
            calibrated on; None takes seeded normal ones. Any other precision with a file is an error.
        cache_dir: directory of the programs; None means `default_cache_dir()`.
        cache_max_bytes: size the cache is pruned to, least recently used first.
    """

    enabled: bool = True
    precision: str = "auto"
    max_batch_size: int = 64
    use_cache: bool = True
    fallback_on_error: bool = True
    build: str = "wait"
    workspace_size: int = 0
    plans: tuple[str, ...] = ()
    calibration: Path | None = None
    cache_dir: Path | None = None
    cache_max_bytes: int = 20 * GIB

    def __post_init__(self) -> None:
        put = object.__setattr__  # the usual way to normalise inside a frozen dataclass
        put(self, "enabled", _parse_flag("enabled", self.enabled))
        put(self, "use_cache", _parse_flag("use_cache", self.use_cache))
        put(self, "fallback_on_error", _parse_fallback(self.fallback_on_error))
        put(self, "precision", _parse_choice("precision", self.precision, PRECISIONS))
        put(self, "build", _parse_choice("build", self.build, BUILDS))
        put(self, "max_batch_size", _parse_count("max_batch_size", self.max_batch_size, minimum=1))
        put(self, "workspace_size", _parse_count("workspace_size", self.workspace_size, minimum=0))
        put(self, "cache_max_bytes", _parse_count("cache_max_bytes", self.cache_max_bytes, minimum=1))
        put(self, "plans", _parse_plans(self.plans))
        put(self, "calibration", _parse_path("calibration", self.calibration))
        put(self, "cache_dir", _parse_path("cache_dir", self.cache_dir))
        if self.calibration is not None and self.precision not in EIGHT_BITS:
            raise ConfigError(
                f"calibration is used by precision {' and '.join(EIGHT_BITS)} only; got calibration "
                f"{str(self.calibration)!r} with precision {self.precision!r}",
                key="calibration",
            )

    @classmethod
    def resolve(cls, config: Any = None, **call: Any) -> TensorRTConfig:
        """Merge the three sources, environment > call > config.

        If a stronger source changes the precision from fp8 or int8 to another, the weaker one's calibration is dropped.

        Args:
            config: None, a TensorRTConfig, a mapping of its fields, or an object with training-config fields
                (`use_tensorrt`, `tensorrt_precision`, `tensorrt_cache_dir`, `tensorrt_fallback`). None values in it
                mean "not said".
            call: fields given at the call; None means "not said".

        Raises:
            ConfigError: an unknown field, or a value outside its range; the message lists the valid ones.
        """
        merged = _fields_of(config)
        _lay_over(merged, {key: value for key, value in call.items() if value is not None})
        overrides = env.tensorrt_overrides()
        for key, text in overrides.items():
            try:
                cls(**cast(Any, {key: text}))
            except ConfigError as error:
                raise ConfigError(f"{env.TENSORRT_VARIABLES[key]}: {error}", key=env.TENSORRT_VARIABLES[key]) from None
        _lay_over(merged, overrides)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in merged:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                raise ConfigError(f"unknown TensorRT setting {key!r}{hint} valid settings: {', '.join(known)}", key=key)
        return cls(**merged)

    def cache_directory(self) -> Path:
        """Absolute directory of the cached programs."""
        return (default_cache_dir() if self.cache_dir is None else self.cache_dir).absolute()


def default_cache_dir() -> Path:
    """`trt_cache/` at the top of a source checkout, the user's cache folder (platformdirs) when the package is
    installed elsewhere.
    """
    top = Path(__file__).resolve().parent.parent
    if (top / "setup.py").is_file() and (top / "trt_cache").is_dir():
        return top / "trt_cache"
    try:
        place = Path(platformdirs.user_cache_dir("owl_wms", appauthor=False))
    except RuntimeError:  # no HOME and a uid without an account, as in some containers
        return Path(tempfile.gettempdir()) / f"owl_wms_trt_cache_{os.getuid()}"
    with contextlib.suppress(ValueError):
        place = expanded(place)  # XDG_CACHE_HOME may come from a file in which no shell replaced `$USER`
    return place / "trt_cache"


def _lay_over(merged: dict[str, Any], source: Mapping[str, Any]) -> None:
    precision = str(source.get("precision", "fp8")).strip().lower()
    if precision not in EIGHT_BITS and str(merged.get("precision")).strip().lower() in EIGHT_BITS:
        merged.pop("calibration", None)
    merged.update(source)


def _fields_of(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, TensorRTConfig):
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {_TRAINING_FIELDS.get(str(key), str(key)): value for key, value in config.items() if value is not None}
    found = {ours: getattr(config, theirs, None) for theirs, ours in _TRAINING_FIELDS.items()}
    if all(not hasattr(config, theirs) for theirs in _TRAINING_FIELDS):
        names = ", ".join(_TRAINING_FIELDS)
        raise ConfigError(
            f"config must be a TensorRTConfig, a mapping, or have one of {names}; got {type(config).__name__}"
        )
    return {key: value for key, value in found.items() if value is not None}


def _parse_flag(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"{key} must be one of {', '.join(_TRUE + _FALSE)}; got {value!r}", key=key)


def _parse_fallback(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text not in FALLBACKS:
        raise ConfigError(
            f"fallback must be one of {', '.join(FALLBACKS)} (or a bool); got {value!r}", key="fallback_on_error"
        )
    return FALLBACKS[text]


def _parse_choice(key: str, value: Any, valid: tuple[str, ...]) -> str:
    text = value.strip().lower() if isinstance(value, str) else value
    if text not in valid:
        raise ConfigError(f"{key} must be one of {', '.join(valid)}; got {value!r}", key=key)
    return text


def _parse_count(key: str, value: Any, *, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key} must be an integer >= {minimum}; got {value!r}", key=key)
    return value


def _parse_plans(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple, set)) else (None,)
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise ConfigError(
            f"plans must be names of plans, for example ('tensorrt', 'tensorrt+ops'); got {value!r}", key="plans"
        )
    return tuple(name.strip() for name in names)


def _parse_path(key: str, value: Any) -> Path | None:
    if value is None:
        return None
    kind = "directory" if key == "cache_dir" else "file"
    try:
        if not isinstance(value, (str, Path)):
            raise ValueError("which is no text")
        return expanded(value)
    except ValueError as error:
        text = f"{key} must be a {kind} path; got {str(value)!r:.200}, {error}"
        raise ConfigError(text, key=key) from None
