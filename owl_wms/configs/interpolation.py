"""Replaces `${...}` in a configuration as OmegaConf does, or refuses the form by name.

| form | value |
|---|---|
| `${oc.env:NAME}`, `${env:NAME}` | the environment variable, always text; an error when it is not set |
| `${oc.env:NAME,default}` | the same with a default; `null` is None |
| `${train.checkpoint_dir}`, `${a[0]}` | the value of another key, counted from the top of the file |
| `${.key}`, `${..key}` | the same, counted from the section of the reference, or from the one above |
| `\\${` | the characters `${` |

A text that is one reference takes the type of its value; inside longer text the value has to be a word or a number.
`???`, OmegaConf's mark of a value that somebody else must give, is an error.

Why not OmegaConf: it parses with ANTLR (about 0.2 s at import), and has no limit on what references expand to.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from owl_wms import env
from owl_wms.errors import ConfigError

MAX_VALUES = 10_000
MAX_DEPTH = 20
MAX_TEXT = 1 << 14
_PART = re.compile(r"(\\\$\{)|\$\{([^${}]*)\}")
_ENV = re.compile(r"(?:oc\.)?env:\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:,(.*))?")
_KEY = re.compile(r"\.*[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+|\[[A-Za-z0-9_-]+\])*")


class FromEnvironment(str):
    """Text with a variable's value in it; its `repr`, which error messages quote, is the reference instead."""

    reference: str

    def __new__(cls, value: str, reference: str) -> FromEnvironment:
        made = super().__new__(cls, value)
        made.reference = reference
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.reference

    def __repr__(self) -> str:
        return repr(self.reference)


class _Missing(Exception):
    """A variable of an optional section is not set: the whole value is None."""


class Resolver:
    """Resolves one configuration, and bounds what aliases and references expand to."""

    def __init__(self, root: dict[str, Any], path: Path, optional_env: tuple[str, ...]) -> None:
        """Keep what to resolve.

        Args:
            root: the whole configuration, as parsed.
            path: its file, for messages.
            optional_env: top-level sections in which a variable that is not set, or `???`, gives None.
        """
        self.root, self.path, self.optional_env = root, path, optional_env
        self.left = MAX_VALUES

    def resolve(self, only: str | None = None) -> dict[str, Any]:
        """Return the configuration, or one top-level section of it under its name, with every reference replaced.

        Raises:
            ConfigError: a variable that is not set, a key that is not there, references in a circle, another form, or
                more than `MAX_VALUES` values.
        """
        wanted = self.root if only is None else {key: value for key, value in self.root.items() if key == only}
        return {key: self._value(value, (str(key),), ()) for key, value in wanted.items()}

    def _fail(self, key: tuple[str, ...], text: str) -> ConfigError:
        dotted = ".".join(key)
        return ConfigError(f"{self.path}: {dotted} {text}", path=self.path, key=dotted)

    def _value(self, value: Any, key: tuple[str, ...], via: tuple[tuple[str, ...], ...]) -> Any:
        self.left -= 1
        if self.left < 0 or len(key) > MAX_DEPTH or len(via) > MAX_DEPTH:
            text = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, which no configuration has"
            raise ConfigError(f"{self.path}: {text}", path=self.path)
        if isinstance(value, dict):
            return {k: self._value(v, (*key, str(k)), via) for k, v in value.items()}
        if isinstance(value, list):
            return [self._value(v, (*key, str(i)), via) for i, v in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            raise self._fail(key, f"must be a finite number, received {value}")
        if not isinstance(value, str):
            return value
        try:
            return self._text(value, key, via)
        except _Missing:
            return None

    def _text(self, text: str, key: tuple[str, ...], via: tuple[tuple[str, ...], ...]) -> Any:
        if text == "???":
            if key[0] in self.optional_env:
                return None
            raise self._fail(key, "must be given: '???' stands for a value that the file leaves open")
        if "${" not in text:
            return text
        if "${" in _PART.sub("", text):
            raise self._fail(key, f"has an interpolation that is nested or not closed: {text[:80]!r}")
        parts: list[Any] = []
        at = 0
        for match in _PART.finditer(text):
            parts.append(text[at : match.start()])
            parts.append("${" if match[1] else self._reference(match[2].strip(), key, via))
            at = match.end()
        parts.append(text[at:])
        if len(parts) == 3 and not parts[0] and not parts[2]:
            return parts[1]
        for part in parts:
            if part is None or isinstance(part, (dict, list)):
                raise self._fail(key, f"puts a {type(part).__name__} into text: {text[:80]!r}")
        whole = "".join(map(str, parts))
        if len(whole) > MAX_TEXT:
            raise self._fail(key, f"becomes longer than {MAX_TEXT} characters")
        return FromEnvironment(whole, text) if any(isinstance(part, FromEnvironment) for part in parts) else whole

    def _reference(self, inner: str, key: tuple[str, ...], via: tuple[tuple[str, ...], ...]) -> Any:
        variable = _ENV.fullmatch(inner)
        if variable is not None:
            return self._variable(variable[1], variable[2], key)
        if not _KEY.fullmatch(inner):
            known = "${key.of.this.file}, ${.key}, ${oc.env:NAME} and ${oc.env:NAME,default}"
            raise self._fail(key, f"uses ${{{inner[:60]}}}; the forms that are replaced are {known}")
        names = inner.lstrip(".")
        ups = len(inner) - len(names)
        if ups > len(key):
            raise self._fail(key, f"refers to ${{{inner[:60]}}}, above the top of the file")
        target = (*(key[: len(key) - ups] if ups else ()), *re.split(r"[.\[]", names.replace("]", "")))
        if target in via or target == key:
            raise self._fail(key, f"refers to itself by way of ${{{inner[:60]}}}")
        found: Any = self.root
        for name in target:
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise self._fail(key, f"refers to ${{{inner[:60]}}}, which this file does not have")
        return self._value(found, target, (*via, target))

    def _variable(self, name: str, default: str | None, key: tuple[str, ...]) -> str | None:
        value = env.read(name)
        if value is not None:
            return FromEnvironment(value, f"${{oc.env:{name}}}")
        if default is not None:
            text = default.strip()
            quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
            return None if text == "null" else text[1:-1] if quoted else text
        if key[0] in self.optional_env:
            raise _Missing
        raise self._fail(key, f"refers to the environment variable {name}, which is not set")
