"""The Dockerfile names files and a command that exist. It is not built here.

Run: python -m pytest tests/test_dockerfile.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from owl_wms.cli import COMMANDS
from owl_wms.cli.demo import demo

ROOT = Path(__file__).parents[1]
LINES = [line.split() for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()]


def test_everything_copied_is_there() -> None:
    copied = [name for words in LINES if words[:1] == ["COPY"] for name in words[1:-1]]
    assert "requirements-rtx.txt" in copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_command_and_its_options_exist() -> None:
    (words,) = [words[1:] for words in LINES if words[:1] == ["CMD"]]
    command, *arguments = json.loads(" ".join(words))
    assert command in COMMANDS
    options = {f"--{name.replace('_', '-')}" for name in inspect.signature(demo).parameters}
    assert {word for word in arguments if word.startswith("--")} <= options
