"""What a wheel installs works far away from any checkout: the commands find their weights and configurations in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_play import playing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else; torch and the rest come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(installed: Path, *arguments: str, status: int = 0) -> str:
    """Standard output of `owl-wms` from the wheel, in an empty folder beside it."""
    empty = installed.parent / "empty"
    empty.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed), "TENSORRT_CACHE_DIR": str(empty / "cache")}
    ran = subprocess.run(
        [sys.executable, "-m", "owl_wms", *arguments],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == status, ran.stderr
    return ran.stdout


def test_the_wheel_is_what_is_imported(installed: Path) -> None:
    script = """
import owl_wms
from owl_wms.cli.play import SHIPPED
from owl_wms.configs.world import load_world_config
from owl_wms.inference.build import latent_space
config, weights = SHIPPED
print(owl_wms.__file__, config, weights, sep="\\n")
world = load_world_config(config)
print(world.model.channels, *latent_space(world, config).whitener.inverse.shape)
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    call = [sys.executable, "-c", script]
    ran = subprocess.run(call, env=environment, cwd=installed.parent, capture_output=True, text=True, check=True)
    *files, channels = ran.stdout.splitlines()
    assert all(Path(file).is_relative_to(installed) and Path(file).is_file() for file in files)
    assert channels == "96 128 96", "the shipped model's transform of latents came along"
    metadata = next(installed.glob("owl_wms-*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0" in metadata
    assert next(installed.glob("owl_wms-*.dist-info/licenses/LICENSE")).stat().st_size > 10_000


def test_doctor_demo_and_decode(installed: Path) -> None:
    import torch

    facts = json.loads(run(installed, "doctor", "--json", status=0 if torch.cuda.is_available() else 1))
    assert torch.__version__.split("+")[0] in facts["machine"]["torch"]
    run(installed, "demo", "--frames", "2", "--out", "demo", "--device", "cpu")
    assert (installed.parent / "empty" / "demo" / "sheet.png").stat().st_size > 10_000
    np.save(installed.parent / "empty" / "z.npy", np.zeros((3, 128, 8, 8), np.float32))
    shipped = installed / "owl_wms" / "shipped" / "examples" / "demo"
    vae = ["--vae-config", str(shipped / "demo_vae.yml"), "--checkpoint", str(shipped / "demo_vae.safetensors")]
    run(installed, "decode", "z.npy", *vae, "--out", "clip.mp4", "--device", "cpu")
    assert (installed.parent / "empty" / "clip.mp4").stat().st_size > 1000


def test_play_of_the_game(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.chdir(installed.parent)
    with playing() as (_, address), urllib.request.urlopen(address, timeout=10) as page:
        assert b"<canvas" in page.read()
