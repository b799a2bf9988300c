"""Where the files that a configuration names are, whatever the working directory is.

Usage:
    find_beside("examples/demo/demo_vae.yml", "/somewhere/owl_wms/examples/world/game_rft.yml")
"""

from __future__ import annotations

from pathlib import Path

# Of a source checkout; an installed wheel has none.
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def find_beside(path: Path | str | None, cfg_path: Path | str) -> Path | None:
    """A path from a configuration: as it is, or relative to one of the folders above the configuration.

    So a file that says `examples/demo/demo_vae.yml` works from any working directory. What is found nowhere comes back
    as it was given.
    """
    if path is None or Path(path).exists():
        return None if path is None else Path(path)
    above = (parent / path for parent in Path(cfg_path).resolve().parents)
    return next((found for found in above if found.exists()), Path(path))
