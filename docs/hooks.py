"""What the site adds to a page: SECURITY.md stands at the top of the checkout, where code hosts look for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put SECURITY.md into its page, with links relative to `docs/`."""
    if page.file.src_path != "security.md":
        return markdown
    return (ROOT / "SECURITY.md").read_text(encoding="utf-8").replace("](docs/", "](")
