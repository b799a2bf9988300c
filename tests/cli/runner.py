"""`owl-wms` called in this process."""

from __future__ import annotations

from owl_wms.cli import main


def run(*arguments: str) -> int:
    """Exit code of `owl-wms <arguments>`."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
