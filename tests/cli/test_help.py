"""Help texts are rich markup, which swallows [n, c, h, w] unless the bracket is escaped: what is written is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from owl_wms.cli import COMMANDS, build_app
from tests.cli.runner import run


def every_command(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, *words, name)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(*words, "--help") == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_what_stands_in_brackets_is_shown(
    name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    top = typer.main.get_command(build_app(name))
    commands = [((), top)] if name is None else list(every_command(top.commands[name], name))  # type: ignore[attr-defined]
    for words, command in commands:
        text = shown(capsys, *words)
        for written in (command.help, *(getattr(option, "help", None) for option in command.params)):
            for bracketed in re.findall(r"\[[^\]]*\]", (written or "").replace("\\[", "[")):
                assert bracketed in text, (words, written)


@pytest.mark.parametrize(
    ("command", "shapes"),
    [("decode", ["Latents [b,n,c,h,w] or [n,c,h,w]: .pt"]), ("encode", ["frames [n,C,H,W].", "latents [n, c, h, w]"])],
)
def test_shapes_are_shown(
    command: str, shapes: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    text = shown(capsys, command)
    for shape in shapes:
        assert shape in text
        assert f"\\{shape}" not in text
