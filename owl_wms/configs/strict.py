"""Strict, frozen configuration sections, and one clear error for each way in which a file can be wrong.

Why it exists: upstream's loader accepts a misspelt key and a string for an int, and fails later, deep inside
construction. Here an unknown key, a wrong type and a missing key each name the file, the dotted key and the nearest
valid key.

Usage:
    class Model(StrictModel):
        width: PositiveInt
    data = read_yaml(path)
    cfg = parse(Model, data, path=path)      # ConfigError or a frozen Model
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from owl_wms import env
from owl_wms.errors import ConfigError

T = TypeVar("T", bound=BaseModel)

# YAML 1.1, which PyYAML reads, takes `1e-4` for a string; YAML 1.2 and every author of these files take it for a
# number.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
# Upstream's longest file has 4 KiB; PyYAML needs up to 5 ms a KiB, and reading a config must stay under 100 ms.
# (libyaml is faster, but recurses in C: deep nesting would end the process instead of raising RecursionError.)
MAX_BYTES = 1 << 14
# PyYAML's scanner takes time quadratic in unclosed brackets.
MAX_BRACKETS = 1000
MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_SHOWN = 80
_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that `1e-4` is a float and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class FrozenDict(dict[str, Any]):
    """A dict that refuses changes; it still unpacks with `**`, pickles and serialises as a dict."""

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError("configurations are immutable; build a changed copy with {**config, key: value}")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({str(k): _freeze(v) for k, v in value.items()})
    return tuple(_freeze(v) for v in value) if isinstance(value, (list, tuple)) else value


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _to_size(value: Any) -> Any:
    pair = _to_tuple(value)
    whole = [v for v in (pair if isinstance(pair, tuple) else (pair,)) if type(v) is int and v > 0]
    if (isinstance(pair, tuple) and len(pair) == len(whole) == 2) or (type(pair) is int and whole):
        return pair
    raise PydanticCustomError("size", "must be a positive int or a [height, width] pair of them")


PositiveInt = Annotated[int, Field(gt=0)]
IntTuple = Annotated[tuple[PositiveInt, ...], BeforeValidator(_to_tuple)]
ThreeSwitches = Annotated[tuple[bool, bool, bool], BeforeValidator(_to_tuple)]
Size = Annotated[int | tuple[int, int], BeforeValidator(_to_size)]
Kwargs = Annotated[dict[str, Any], AfterValidator(_freeze)]


class StrictModel(BaseModel):
    """Base of all sections: no coercion, no unknown keys, no changes after construction."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key",
                        "{text}",
                        {"key": str(key)[:MAX_SHOWN], "text": unknown(str(key), cls.model_fields)},
                    )
        return data


def rule(holds: bool, key: str, text: str) -> None:
    """Fail validation of a section's `key` (dotted below the section) with `text`, rule and value, unless `holds`."""
    if not holds:
        raise PydanticCustomError("rule", "{text}", {"text": text, "key": key})


def shown(value: Any) -> str:
    """`repr(value)`, shortened, and its type: what an error message says was received."""
    text = repr(value)
    return f"{text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'} ({type(value).__name__})"


def nearest(name: str, names: Any) -> str | None:
    """The entry of `names` most like `name`, or None when nothing is alike."""
    found = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(name: str, names: Any, what: str = "key") -> str:
    """One sentence for an unknown name: the nearest valid one, or all of them."""
    close = nearest(name, names)
    name = name[:MAX_SHOWN]
    hint = f"did you mean {close!r}?" if close else f"valid are {', '.join(sorted(map(str, names)))}"
    return f"unknown {what} {name!r}; {hint}"


def read_yaml(path: Path | str, *, optional_env: tuple[str, ...] = ("wandb",)) -> dict[str, Any]:
    """Parse a YAML file into a dict, with `${env:NAME}` in strings replaced.

    Args:
        path: the file, at most 16 KiB.
        optional_env: top-level sections in which a variable that is not set gives None instead of an error; logging is
            optional, a data path is not.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, too large, or a variable that is not set.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, which no configuration is", path=path)
        if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
            raise ConfigError(f"{path}: more than {MAX_BRACKETS} brackets, which no configuration has", path=path)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = (err.strerror or err) if isinstance(err, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"{path}: cannot read this configuration: {reason}", path=path) from err
    try:
        data = yaml.load(text, Loader=_Loader)
    except RecursionError as err:
        raise ConfigError(f"{path}: nested too deeply", path=path) from err
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError, LookupError) as err:
        # PyYAML lets a few plain exceptions through, for example for impossible dates.
        said = " ".join(str(err).replace('in "<unicode string>", ', "at ").split())  # the file is named already
        raise ConfigError(f"{path}: not valid YAML: {said}", path=path) from err
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{path}: must hold a mapping of sections, found {found}", path=path)
    result: dict[str, Any] = _Resolver(path, optional_env).resolve(data, "", 0)
    return result


class _Resolver:
    """Replaces `${env:NAME}`.

    And bounds what YAML aliases may expand to (a few lines can otherwise stand for gigabytes).
    """

    def __init__(self, path: Path, optional_env: tuple[str, ...]) -> None:
        self.path = path
        self.optional_env = optional_env
        self.left = MAX_VALUES

    def resolve(self, value: Any, key: str, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > MAX_DEPTH:
            text = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, which no configuration has"
            raise ConfigError(f"{self.path}: {text}", path=self.path)
        if isinstance(value, dict):
            return {k: self.resolve(v, f"{key}.{k}" if key else str(k), depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [self.resolve(v, f"{key}.{i}", depth + 1) for i, v in enumerate(value)]
        return self._text(value, key) if isinstance(value, str) else value

    def _text(self, value: str, key: str) -> str | None:
        unset = [name for name in _ENV.findall(value) if env.read(name) is None]
        if unset and key.split(".")[0] in self.optional_env:
            return None
        if unset:
            text = f"{key} refers to the environment variable {unset[0]}, which is not set"
            raise ConfigError(f"{self.path}: {text}", path=self.path, key=key)
        return _ENV.sub(lambda match: env.read(match[1]) or "", value)


def parse(cls: type[T], data: Mapping[str, Any], *, path: Path | str | None = None, prefix: str = "") -> T:
    """Validate `data` as `cls`.

    Args:
        path: the file it came from, for the message.
        prefix: dotted key of `data` inside that file.

    Raises:
        ConfigError: with `.key` set to the first offending dotted key; the message lists every problem found.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as err:
        problems = [_describe(e, prefix) for e in err.errors(include_url=False)]
    where = f"{path}: " if path is not None else ""
    raise ConfigError(where + "; ".join(text for _, text in problems), path=path, key=problems[0][0])


def _describe(error: Any, prefix: str) -> tuple[str, str]:
    """Dotted key and sentence of one pydantic error."""
    loc = [str(part) for part in error["loc"]]
    if error["type"] in ("unknown_key", "rule"):
        loc.append(error["ctx"]["key"])
    key = ".".join([prefix, *loc] if prefix else loc)
    if error["type"] == "missing":
        return key, f"{key} is missing, and it has no default"
    text = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] in ("unknown_key", "rule"):
        return key, f"{key}: {text}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = nearest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        text += f" (did you mean {close!r}?)" if close else ""
    return key, f"{key}: {text}, received {shown(error['input'])}"
