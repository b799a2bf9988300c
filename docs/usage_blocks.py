"""Shows the `Usage:` block of a docstring as code in the reference; as text its lines would run together."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

BLOCK = re.compile(r"^Usage[^\n]*:\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)


class UsageBlocks(griffe.Extension):
    """Fences the indented lines below `Usage:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class or function."""
        if obj.docstring is not None:
            obj.docstring.value = BLOCK.sub(
                lambda found: f"```python\n{textwrap.dedent(found[1]).strip()}\n```\n", obj.docstring.value
            )
