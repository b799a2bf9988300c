"""Every page of the documentation tells the truth: its Python runs, its commands exist with the options shown, and the
site builds without a warning (which a broken link is).

A fenced block that cannot run here says why on the line above it: `<!-- not run: needs a GPU -->`. The commands in it
are still compared with the command line's own options.

Run: python -m pytest tests/test_docs.py
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from owl_wms.cli import build_app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\s*)?^```(?P<kind>\w+)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE
)
HISTORY = {"CHANGELOG.md", "log.md"}  # what was true on its day


def blocks(path: Path, *kinds: str) -> list[tuple[str, str]]:
    """`(reason why it is not run or "", text)` of a page's fenced blocks of those kinds."""
    found = FENCE.finditer(path.read_text(encoding="utf-8"))
    return [(match["why"] or "", match["body"]) for match in found if match["kind"] in kinds]


WITH_PYTHON = [path for path in PAGES if any(not why for why, _ in blocks(path, "python"))]
WITH_COMMANDS = [path for path in PAGES if blocks(path, "console") and path.name not in HISTORY]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name_of)
def test_python_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "docs"}
    for why, text in blocks(path, "python"):
        if not why:
            exec(compile(text, str(path), "exec"), names)


def lines_of(text: str) -> list[str]:
    """The commands of a console block; a backslash continues a line, and a comment ends it."""
    joined = text.replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_have_the_options_that_are_shown(path: Path) -> None:
    for _, text in blocks(path, "console"):
        for line in lines_of(text):
            for part in re.split(r"\|\||&&|[|;]", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["owl-wms"]:
                    check(words[1:], line)
                elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("benchmarks", "tests", "owl_wms"):
                    assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists(), line


def check(words: list[str], line: str) -> None:
    command: Any = typer.main.get_command(build_app(words[0] if words else None))
    while hasattr(command, "commands"):  # typer brings a click of its own in some versions
        assert words, f"no command in {line!r}"
        assert words[0] in command.commands, f"no command {words[0]!r} in {line!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.split("=")[0] in {*known, "--help"}, f"no option {word} in {line!r}"


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_that_can_run_here_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for why, text in blocks(path, "console"):
        for line in [] if why else lines_of(text):
            command = re.sub(r"\bowl-wms\b", f"{shlex.quote(sys.executable)} -m owl_wms", line)
            ran = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=280)
            assert ran.returncode == 0, f"{line}\n{ran.stderr}"


def test_pictures_are_described_wide_enough_and_small() -> None:
    shown = {page: re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name_of(page) for page, found in shown.items() if found} >= {"README.md", "docs/index.md", "docs/play.md"}
    for page, found in shown.items():
        for words, target in found:
            path = page.parent / target
            assert len(words) > 20, f"{target} on {page.name}: say what is seen, for who cannot see it"
            assert path.stat().st_size < 800_000, f"{target}: every clone brings it along"
            with Image.open(path) as picture:
                assert picture.width >= 800, f"{target}: README is about 830 pixels wide"
                if path.stem == "play":
                    assert picture.n_frames > 30, "a clip, not a picture"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs-material and mkdocstrings build the site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    assert "make_batched_decode_fn" in (tmp_path / "site/reference/bridge/index.html").read_text(encoding="utf-8")
    decode = (tmp_path / "site/decode/index.html").read_text(encoding="utf-8")
    assert '<code><span class="whole">--each</span></code>' in decode
    assert '<span class="gp">$ </span>owl-wms' in decode, "site.css leaves this out of what is copied"
