"""`owl-wms` called in this process."""

from __future__ import annotations

from pathlib import Path

from owl_wms.cli import main


def run(*arguments: object) -> int:
    """Exit code of `owl-wms <arguments>`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def call(
    place: Path, command: str, source: str, *more: str, config: str = "vae.yml", weights: str = "vae.safetensors"
) -> int:
    """Exit code of `decode` or `encode` with the autoencoder in a folder (the fixture `place`), on the CPU."""
    files = ("--vae-config", str(place / config), "--checkpoint", str(place / weights))
    return run(command, str(place / source), *files, "--device", "cpu", *more)
