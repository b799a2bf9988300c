"""Strict, frozen configuration sections, and one clear error for each way in which a file can be wrong.

Why it exists: upstream's loader accepts a misspelt key and a string for an int, and fails later, deep inside construction.
Here an unknown key, a wrong type and a missing key each name the file, the dotted key and the nearest valid key.

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
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from owl_wms import env
from owl_wms.errors import ConfigError

T = TypeVar("T", bound=BaseModel)

# YAML 1.1, which PyYAML reads, takes `1e-4` for a string; YAML 1.2 and every author of these files take it for a number.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that `1e-4` is a float and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", key_node.start_mark)
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
FloatTuple = Annotated[tuple[float, ...], BeforeValidator(_to_tuple)]
Size = Annotated[int | tuple[int, int], BeforeValidator(_to_size)]
Kwargs = Annotated[dict[str, Any], BeforeValidator(lambda v: v if not isinstance(v, Mapping) else _freeze(v))]


class StrictModel(BaseModel):
    """Base of all sections: no coercion, no unknown keys, no changes after construction."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError("unknown_key", "{text}", {"key": str(key), "text": unknown(str(key), cls.model_fields)})
        return data


def nearest(name: str, names: Any) -> str | None:
    """The entry of `names` most like `name`, or None when nothing is alike."""
    found = difflib.get_close_matches(name, [str(n) for n in names], n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(name: str, names: Any, what: str = "key") -> str:
    """One sentence for an unknown name: the nearest valid one, or all of them."""
    close = nearest(name, names)
    hint = f"did you mean {close!r}?" if close else f"valid are {', '.join(sorted(map(str, names)))}"
    return f"unknown {what} {name!r}; {hint}"


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Parse a YAML file into a dict, with `${env:NAME}` in strings replaced.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a variable that is not set.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot read this configuration: {err}", path=path) from err
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader subclass)
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(err).split())}", path=path) from err
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold a mapping of sections, found {type(data).__name__}", path=path)
    return _resolve(data, path, "")


def _resolve(value: Any, path: Path, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _resolve(v, path, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, path, f"{key}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        found = env.read(match[1])
        if found is None:
            raise ConfigError(f"{path}: {key} refers to the environment variable {match[1]}, which is not set", path=path, key=key)
        return found

    return _ENV.sub(lookup, value)


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
    if error["type"] == "unknown_key":
        loc.append(error["ctx"]["key"])
    key = ".".join([prefix, *loc] if prefix else loc)
    if error["type"] == "missing":
        return key, f"{key} is missing, and it has no default"
    received = "" if error["type"] == "unknown_key" else f", received {error['input']!r} ({type(error['input']).__name__})"
    text = error["msg"] if error["type"] != "value_error" else str(error["ctx"]["error"])
    return key, f"{key}: {text[0].lower() + text[1:]}{received}"
