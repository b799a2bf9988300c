"""Reads a path that came as text: one rule for configurations, settings, the environment and arguments.

Usage:
    expanded("~/runs/$USER")                                     # Path("/home/me/runs/me")
    find_beside("examples/demo/demo_vae.yml", "/somewhere/owl_wms/examples/world/game_rft.yml")
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from owl_wms import env
from owl_wms.files import at_home, name_too_long

_PACKAGE = Path(__file__).resolve().parents[1]
# Configurations and shipped weights: beside the package in a checkout, inside it in an installed wheel (setup.py).
SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
EXAMPLES = SHIPPED / "examples"
DEMO_VAE = EXAMPLES / "demo" / "demo_vae.yml", EXAMPLES / "demo" / "demo_vae.safetensors"
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
# Forms of other programs, which would become names: `${NAME:-x}`, `$$NAME`, `%NAME%`, systemd's `%h/`, templates.
# `%NAME%` begins a part of the path; further in it is a name (`50%old_50%new`), as are bytes that were encoded as in
# addresses (`%C3%A9t%C3%A9`).
_LEFT = re.compile(r"\$[{(]|`|(?:^|/)%(?![0-9A-Fa-f]{2}%)[A-Za-z_]\w*%|^%[A-Za-z]/|\{\{")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: a Path has made one of two


def expanded(text: str | Path) -> Path:
    """Return a path with `~`, `~user`, `$NAME` and `${NAME}` replaced, as a shell would have done.

    Raises:
        ValueError: with the second half of a sentence ("which ..."), for a text that would make a file or folder of an
            odd name instead: a variable that is not set, another form with `$`, a home directory that cannot be found,
            quotes around the whole, an address (`s3://`), line breaks, a name beyond 255 bytes.
    """
    given = str(text)
    if not given.strip() or "\0" in given:
        raise ValueError("which is no path")
    # Line breaks, and bytes that are no UTF-8, which Python keeps as lone surrogates.
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in given):
        raise ValueError("which holds control characters or bytes that are no text")
    if len(given) > 1 and given[0] == given[-1] and given[0] in "'\"":
        raise ValueError("whose quotes would be part of the name: leave them out")
    if _ADDRESS.match(given):
        raise ValueError("which is an address: give the path of a local file or folder")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        found = env.read(name)
        if found is None:
            raise ValueError(f"whose variable {name} is not set")
        return found

    replaced = _VARIABLE.sub(value, given)
    rest = _VARIABLE.sub("", given)
    if _LEFT.search(rest) or "$$" in given:
        raise ValueError("of which only `~`, $NAME and ${NAME} can be replaced: write the rest in full")
    try:
        path = Path(replaced).expanduser()
    except RuntimeError:  # `~name` of no such user, or `~` without HOME and account
        raise ValueError("whose home directory cannot be found: write it in full") from None
    long = name_too_long(path)
    if long is not None:
        raise ValueError(f"whose part {long!r} is longer than the 255 bytes that a name may have")
    return path


def path_text(text: str) -> str:
    """Return a path of a configuration as `expanded` has it.

    Raises:
        PydanticCustomError: a text that `expanded` refuses.
    """
    try:
        path = expanded(text)
    except ValueError as error:
        shown = repr(text) if len(text) <= 80 else repr(text[:80]) + "..."
        raise PydanticCustomError("path", "{text}", {"text": f"must be a path; got {shown}, {error}"}) from None
    return str(path) if "~" in text or "$" in text else text


PathText = Annotated[str, AfterValidator(path_text)]
"""A path in a configuration: text that `expanded` accepts, held as it returns it."""


def find_beside(path: Path | str | None, cfg_path: Path | str) -> Path | None:
    """Return a path from a configuration: as it is, or relative to one of the folders above the configuration.

    So a file that says `examples/demo/demo_vae.yml` works from any working directory. A path that is found nowhere
    comes back as it was given.
    """
    if path is None or os.path.exists(path):
        return None if path is None else Path(path)
    given = Path(os.path.abspath(at_home(cfg_path)))
    # A link leads to a file whose author meant what lies beside that; then what lies beside the link.
    above = (parent / path for parent in (*given.resolve().parents, *given.parents))
    return next((found for found in above if os.path.exists(found)), Path(path))
