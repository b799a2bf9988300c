"""The interface through which a build process announces its steps, so that its parent knows what it died of.

Usage:
    journal.stage("compile", plan="tensorrt")
    known = journal.attempt("build|tensorrt|bf16|")      # then, unless known:
    journal.outcome("build|tensorrt|bf16|", "")

Attempts nest. If the process dies, the attempt that began last among the open ones is recorded as failed. So `plan|...`
can stand around all that is done with a plan, and a crash in a `build|...` within it still fails that build alone.
"""

from __future__ import annotations

from typing import Any, Protocol


class BuildJournal(Protocol):
    """Receives the steps of a worker; the parent reads them."""

    def stage(self, name: str, **details: Any) -> None:
        """A stage begins."""

    def attempt(self, key: str) -> str | None:
        """An attempt that may kill the process begins; returns the outcome if an earlier process already made it."""

    def outcome(self, key: str, reason: str) -> None:
        """The attempt ended; "" when it worked."""
