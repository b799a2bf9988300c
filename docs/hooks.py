"""What the site adds to its pages: some stand elsewhere in the checkout, where people look for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"security.md": "SECURITY.md", "versions.md": "benchmarks/results/versions.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put such a file into its page, with links relative to `docs/`."""
    if page.file.src_path not in ELSEWHERE:
        return markdown
    return (ROOT / ELSEWHERE[page.file.src_path]).read_text(encoding="utf-8").replace("](docs/", "](")
