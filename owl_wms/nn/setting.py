"""Reading an optional setting from any object that holds a model's configuration."""

from __future__ import annotations

from typing import Any


def setting(config: Any, name: str, default: Any) -> Any:
    """`config.name`; absent and None both mean the default, as in the YAML files."""
    value = getattr(config, name, None)
    return default if value is None else value
