"""README tells the truth: its table is the committed result's, its links lead somewhere, its commands and code run.

Run: python -m pytest tests/test_readme.py
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import report
from owl_wms.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULT = report.SHOWN


def test_table_and_report_are_made_from_the_result() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert report.with_table(README, report.readme_table(result)) == README
    assert report.with_table(README, report.user_table(), report.USER_MARKERS) == README
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == report.report(result)


PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("examples/**/README.md"),
    ROOT / "benchmarks/README.md",
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_named_commands_exist() -> None:
    named = set(re.findall(r"owl-wms (\w+)", README))
    assert named, "README names no command"
    assert named <= set(COMMANDS)
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_code_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TENSORRT_ENABLED", "false")
    names: dict[str, object] = {}
    exec(code, names)
    assert list(names["frames"].shape) == [1, 4, 4, 360, 640]  # type: ignore[attr-defined]
    assert "pytorch" in capsys.readouterr().out
