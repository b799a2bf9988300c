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
import errno
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from owl_wms.configs.interpolation import Resolver
from owl_wms.configs.paths import path_text
from owl_wms.configs.yaml12 import YamlError, is_flag_or_number, parse_yaml
from owl_wms.errors import ConfigError
from owl_wms.files import one_line, read_regular

T = TypeVar("T", bound=BaseModel)
_Choice = TypeVar("_Choice")

# Upstream's longest file has 4 KiB; PyYAML needs up to 5 ms a KiB, and reading a config must stay under 100 ms.
# (libyaml is faster, but recurses in C: deep nesting would end the process instead of raising RecursionError.)
MAX_BYTES = 1 << 14
# PyYAML takes most of its time for these: up to 27 us for a mark that begins or ends a value, more for a bracket.
MAX_BRACKETS = 1000
MAX_MARKS = 2000
_MARK = re.compile(r"[\[\]{},]|[:?](?=\s)|^ *-(?=\s)", re.M)
MAX_SHOWN = 80
# Pydantic names Python's types, and the file has others.
_IN_YAML = {"model_type": "must be a section, with keys of its own", "tuple_type": "must be a list"}


class FrozenDict(dict[str, Any]):
    """Refuses changes; it still unpacks with `**`, pickles and serialises as a dict."""

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError("configurations are immutable; build a changed copy with {**config, key: value}")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({str(k): _freeze(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if getattr(value, "ndim", None) == 0:  # a number of numpy's, which a checkpoint could not hold
        return value.item()
    return str(value) if isinstance(value, str) else value  # a plain str: checkpoints hold configurations


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _to_size(value: Any) -> Any:
    pair = _to_tuple(value)
    whole = [v for v in (pair if isinstance(pair, tuple) else (pair,)) if type(v) is int and v > 0]
    if (isinstance(pair, tuple) and len(pair) == len(whole) == 2) or (type(pair) is int and whole):
        return pair
    raise PydanticCustomError("size", "must be a positive int or a [height, width] pair of them")


PositiveInt = Annotated[int, Field(gt=0, le=1 << 31)]  # products of larger ones overflow in torch
NonNegativeInt = Annotated[int, Field(ge=0, le=1 << 31)]
IntTuple = Annotated[tuple[PositiveInt, ...], BeforeValidator(_to_tuple)]
FloatPair = Annotated[tuple[float, float], BeforeValidator(_to_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_to_tuple)]
ThreeSwitches = Annotated[tuple[bool, bool, bool], BeforeValidator(_to_tuple)]
Size = Annotated[int | tuple[int, int], BeforeValidator(_to_size)]
Seed = Annotated[int, Field(ge=-(1 << 32), le=1 << 32)]  # of a step: times 1,000,003 and the ranks, within 64 bits


def _without_quotes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuses flags and numbers that came as text: "false" would count as true."""
    for key, value in kwargs.items():
        odd = next((v for v in (value if isinstance(value, list) else [value]) if _is_quoted(v)), None)
        remedy = "leave out the quotes; a variable is always text, so give its value with --set"
        rule(odd is None, key, f"must be a flag or a number, received {shown(odd)}: {remedy}")
    return kwargs


def _is_quoted(value: Any) -> bool:
    return isinstance(value, str) and is_flag_or_number(value)


Kwargs = Annotated[dict[str, Any], AfterValidator(_without_quotes), AfterValidator(_freeze)]


def _with_path(kwargs: dict[str, Any]) -> dict[str, Any]:
    path = kwargs.get("dataset_path")
    return {**kwargs, "dataset_path": path_text(path)} if isinstance(path, str) else kwargs


DataKwargs = Annotated[dict[str, Any], AfterValidator(_with_path), AfterValidator(_freeze)]
"""`Kwargs` of a loader, whose `dataset_path` is a path."""


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
                        {"key": str(key)[:MAX_SHOWN], "text": unknown(key, cls.model_fields)},
                    )
        return data

    def _require(self, holds: bool, key: str, text: str) -> None:
        """Fail validation of `key` with a rule and the value received, unless the rule holds."""
        value = getattr(self, key)
        rule(holds, key, f"{text}, received {list(value) if isinstance(value, tuple) else value}")


def rule(holds: bool, key: str, text: str) -> None:
    """Fail validation of a section's `key` (dotted below the section) with `text`, rule and value, unless `holds`."""
    if not holds:
        raise PydanticCustomError("rule", "{text}", {"text": text, "key": key})


def shown(value: Any) -> str:
    """`repr(value)`, shortened, and its type: what an error message says was received."""
    kind = "str" if isinstance(value, str) else type(value).__name__
    return f"{_cut(repr(value))} ({kind})"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def nearest(name: object, names: Any) -> str | None:
    """Returns the entry of `names` most like `name`, or None when nothing is alike."""
    found = difflib.get_close_matches(str(name)[:MAX_SHOWN], [str(n) for n in names], n=1, cutoff=0.5)
    return found[0] if found else None


def suggestion(name: object, names: Any) -> str:
    """Returns the question whether the nearest valid name was meant; where none is near, all of them."""
    close = nearest(name, names)
    return f"did you mean {close!r}?" if close else f"valid are {', '.join(sorted(map(str, names)))}"


def unknown(name: object, names: Any, what: str = "key") -> str:
    """Returns one sentence for an unknown name, with its `suggestion`."""
    return f"unknown {what} {_cut(repr(name))}; {suggestion(name, names)}"


def choose(choices: Mapping[str, _Choice], name: str, key: str) -> _Choice:
    """Returns the entry that `name`, the value of a configuration's `key`, stands for.

    Raises:
        ConfigError: there is none; the message names the nearest one and lists all.
    """
    if name in choices:
        return choices[name]
    close = nearest(name, choices)
    hint = f"did you mean {close!r}? " if close else ""
    last = key.rpartition(".")[2]
    raise ConfigError(f"unknown {last} {_cut(repr(name))}; {hint}valid are {', '.join(sorted(choices))}", key=key)


def read_yaml(
    path: Path | str,
    *,
    optional_env: tuple[str, ...] = ("wandb",),
    changes: Sequence[str] = (),
    only: str | None = None,
) -> dict[str, Any]:
    """Parse a YAML file into a dict, change it, and replace the `${...}` in it (`configs/interpolation.py`).

    Args:
        path: the file, at most 16 KiB, UTF-8.
        optional_env: top-level sections in which a variable that is not set gives None instead of an error; logging is
            optional, a data path is not.
        changes: `section.key=value` texts; a value is YAML, as in the file, and must not be empty or end in a comment.
        only: the one section to return; references in others are not resolved.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, too large, a change that is none, or a reference that cannot
            be resolved.
    """
    path = Path(path)
    try:
        raw = read_regular(path, MAX_BYTES)
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        reason = (err.strerror or err) if isinstance(err, OSError) else "it is no text in UTF-8"
        if isinstance(err, OSError) and err.errno == errno.EFBIG:
            raise ConfigError(f"{path}: {reason}, which no configuration is", path=path) from err
        raise ConfigError(f"{path}: cannot read this configuration: {reason}", path=path) from err
    crowd = _crowd_in(text)
    if crowd is not None:
        raise ConfigError(f"{path}: more than {crowd}, which no configuration has; shorten it", path=path)
    try:
        data = parse_yaml(text)
    except YamlError as err:
        raise ConfigError(f"{path}: not valid YAML: {one_line(err)}", path=path) from err
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise ConfigError(f"{path}: must hold a mapping of sections, found {found}", path=path)
    for change in changes:
        _change(data, change, path)
    return Resolver(data, path, optional_env).resolve(only)


def _crowd_in(text: str) -> str | None:
    """Returns what a text has too many of to be read in a tenth of a second, or None."""
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        return f"{MAX_BRACKETS} brackets"
    return f"{MAX_MARKS} commas, colons, dashes and brackets" if len(_MARK.findall(text)) > MAX_MARKS else None


def _change(data: dict[str, Any], change: str, path: Path) -> None:
    key, equals, text = change.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"--set wants KEY=VALUE with a dotted key, got {change[:MAX_SHOWN]!r}", key=key)
    place = data
    for name in parents:
        # A copy: an alias or a merge may have put the same section in several places.
        inner = place.get(name)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {key}: {name} is a value, not a section", path=path, key=key)
        place[name] = dict(inner)
        place = place[name]
    if len(text) > MAX_BYTES or _crowd_in(text) is not None:
        raise ConfigError(f"--set {key}: the value is longer than a configuration", path=path, key=key)
    if not text.strip():  # a shell's variable that is not set
        raise ConfigError(f"--set {key}= has no value; write null to unset the key", path=path, key=key)
    try:
        place[last] = parse_yaml(text)
    except YamlError as err:
        raise ConfigError(
            f"--set {key}: {text[:MAX_SHOWN]!r} is not YAML: {one_line(err)}", path=path, key=key
        ) from err
    before = re.split(r"(?:^|\s)#", text, maxsplit=1)[0]
    if before != text:
        with suppress(YamlError):  # the sign lies between quotes
            if parse_yaml(before) == place[last]:
                said = f"{text[:MAX_SHOWN]!r}: what follows # is a comment; put the whole text in double quotes"
                raise ConfigError(f"--set {key}: {said}", path=path, key=key)


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
        found = err.errors(include_url=False)
    missing = [_dotted(error, prefix) for error in found if error["type"] == "missing"]
    problems = [_describe(error, prefix) for error in found if error["type"] != "missing"]
    if len(missing) > 1:
        problems.append((missing[0], f"{', '.join(missing)} are missing, and they have no default"))
    elif missing:
        problems.append((missing[0], f"{missing[0]} is missing, and it has no default"))
    where = f"{path}: " if path is not None else ""
    raise ConfigError(where + "; ".join(text for _, text in problems), path=path, key=problems[0][0])


def _dotted(error: Any, prefix: str) -> str:
    loc = [str(part) for part in error["loc"]]
    if error["type"] in ("unknown_key", "rule"):
        loc.append(error["ctx"]["key"])
    return ".".join([prefix, *loc] if prefix else loc)


def _describe(error: Any, prefix: str) -> tuple[str, str]:
    """Dotted key and sentence of one pydantic error."""
    key = _dotted(error, prefix)
    text = error["msg"][0].lower() + error["msg"][1:]
    text = _IN_YAML.get(error["type"], text.replace("input should be", "must be", 1))
    if error["type"] in ("unknown_key", "rule"):
        return key, f"{key}: {text}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = nearest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        text += f" (did you mean {close!r}?)" if close else ""
    return key, f"{key}: {text}, received {shown(error['input'])}"
