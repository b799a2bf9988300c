"""`owl-wms report`: one HTML page about a training run.

Usage:
    owl-wms report checkpoints/game_rft
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of the run, the checkpoint_dir of its configuration.")],
    out: Annotated[Path | None, typer.Option(help="File to write; by default report.html in that folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file of that name that is no report.")] = False,
) -> None:
    """Write one page with losses, rates, gradient norms, clips, environment and configuration; it works offline."""
    from owl_wms.cli import _shared as shared
    from owl_wms.errors import ConfigError
    from owl_wms.trainers.report import GENERATOR
    from owl_wms.trainers.report import report as page
    from owl_wms.whole import why_unwritten, written_whole

    target = run / "report.html" if out is None else out
    text = page(run)
    shared.check_destination(target, ".html")
    # Reports are made again and again while a run goes on, so an older one is no loss.
    if not (target.is_file() and GENERATOR in target.read_text(encoding="utf-8", errors="replace")[:4096]):
        shared.check_absent(target, overwrite=overwrite)
    try:
        with written_whole(target) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {why_unwritten(error)}", path=target) from error
    typer.echo(f"{target}: {len(text) / 1e6:.1f} MB")
