"""What the site adds to its pages: some stand elsewhere in the checkout, where people look for them. Options in a
sentence are not broken at a line's end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"security.md": "SECURITY.md", "versions.md": "benchmarks/results/versions.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put such a file into its page, with links relative to `docs/`; after the examples' table comes their code."""
    if page.file.src_path == "examples.md":
        table = (ROOT / "examples/README.md").read_text(encoding="utf-8")
        return re.sub(r"\[([^]]+)\]\([^)]+\)", r"`\1`", table) + "".join(map(_with_code, _scripts()))
    if page.file.src_path not in ELSEWHERE:
        return markdown
    return (ROOT / ELSEWHERE[page.file.src_path]).read_text(encoding="utf-8").replace("](docs/", "](")


def on_page_content(html: str, **_: Any) -> str:
    """Keep options whole: a browser may end a line after any hyphen, and `--each` is read as `-` and `-each` then."""
    option = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
    return re.sub("<code>[^<]*</code>", lambda code: option.sub(r'<span class="whole">\g<0></span>', code[0]), html)


def _scripts() -> list[Path]:
    return [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "examples").glob("*.slurm"))]


def _with_code(path: Path) -> str:
    kind = "python" if path.suffix == ".py" else "bash"
    return f"\n## {path.name}\n\n```{kind}\n{path.read_text(encoding='utf-8')}```\n"
