"""The examples run as a newcomer would run them: from another folder, with wrong input, without what is optional.

All but the SLURM script run in this process, as on a machine without a GPU. `decode_dataset.py` runs in
tests/batch/test_on_ray.py, where a Ray cluster is up. The scripts of examples/world have tests/test_example_world.py.

Run: python -m pytest tests/test_examples.py
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from owl_wms.media.arrays import load_latents, save_array
from owl_wms.media.metrics import psnr
from owl_wms.media.pictures import to_bytes
from owl_wms.utils.owl_vae_bridge import get_decoder_only
from tests import notebook
from tests.runtime.toolchains import ExportToolchain

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "demo" / "demo_vae.yml", EXAMPLES / "demo" / "demo_vae.safetensors"
NO_GPU = "the decoder is on the CPU, and this machine has no CUDA device"
SCRIPTS = sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.slurm")])


class Ran(NamedTuple):
    """What a script left: its names, its exit status or last message, and what it printed."""

    names: dict[str, Any]
    status: object
    printed: str


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a script in this process, in a folder that is not the checkout."""

    def run(name: str, *arguments: str | Path) -> Ran:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names, status = {}, None
        try:
            names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        return Ran(names, status, capsys.readouterr().out)

    return run


@torch.no_grad()
def plain(latents: torch.Tensor) -> torch.Tensor:
    """Frames of the demo's decoder itself, bf16."""
    return get_decoder_only(None, *DEMO)(latents.bfloat16())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_in_the_table(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    head = "\n".join(lines[:8])
    assert " needs " in head
    assert f"examples/{path.name}" in head
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_bridge(example: Callable[..., Ran], tmp_path: Path) -> None:
    names, status, printed = example("bridge.py", "out")
    assert status is None
    frames, source = names["frames"], names["source"]
    assert (frames.shape, frames.dtype) == ((2, 4, 360, 640), torch.bfloat16)
    torch.testing.assert_close(frames, plain(names["latents"]), rtol=0, atol=0.02)
    assert psnr(frames[:, :3], source[:, :3]).min() > 35
    assert re.fullmatch(rf"[34]\d\.\d dB\ndecoded by pytorch: {NO_GPU}\n", printed)
    assert torch.equal(load_latents(tmp_path / "out/latents.pt")[0], names["latents"])
    width, height = Image.open(tmp_path / "out/frames.png").size
    assert width > 2 * 320
    assert height > 2 * 180


def test_bridge_where_nothing_can_be_written(example: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _, status, _ = example("bridge.py", "file")
    assert re.fullmatch(r"error: file/latents.pt: cannot be written: .*", str(status))


def test_prepare(example: Callable[..., Ran]) -> None:
    names, status, printed = example("prepare.py")
    assert status is None
    assert names["frames"].shape == (1, 3, 4, 360, 640)
    lines = printed.splitlines()
    assert lines[0] == f"ready: pytorch, {NO_GPU}"
    assert lines[1:3] == [
        "programs: 0 found, 0 built in 0.0 s, failures {}",
        "3 frames: 0 batches by a program, 2 by PyTorch",
    ]
    assert names["stats"].latency_ms["samples"] == 2


def test_training_loop(example: Callable[..., Ran], tmp_path: Path) -> None:
    names, status, printed = example("training_loop.py", "out")
    assert status is None
    losses = [float(loss) for loss in re.findall(rf"loss (\d\.\d+), decoded by pytorch: {NO_GPU}", printed)]
    assert len(losses) == 2
    assert losses[1] < 0.8 * losses[0]
    assert names["decode"].stats().decodes == 2
    wanted = to_bytes(plain(names["found"].detach()))
    assert (names["frames"].int() - wanted.int()).abs().max() <= 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"step_20.png", "step_40.png"}


def test_sana(example: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pipeline, whose decoder runs as a program that the stand-in for TensorRT made."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("owl_wms.runtime.decode.TensorRT", ExportToolchain)
    names, status, printed = example("sana.py", "owl.png")
    assert status is None
    assert printed.startswith("largest difference of a pixel: 0.00 of 255\n")
    assert names["pipe"].vae.decoder.stats().program_calls == 1
    assert names["plain"].std() > 0.05, "a picture of one colour proves nothing"
    picture = np.asarray(Image.open(tmp_path / "owl.png"))
    assert np.array_equal(picture, (names["fast"][0] * 255).round().astype("uint8"))


def test_a_missing_package_is_one_line(example: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    for package, name, remedy in (("diffusers", "sana.py", "needed: diffusers"), ("ray", "decode_dataset.py", "Run: ")):
        monkeypatch.setitem(sys.modules, package, None)
        _, status, _ = example(name)
        assert re.fullmatch(rf"error: .*\b{package}\b.* \({remedy}.*\)", str(status))


def test_one_machine_builds_the_cache_and_others_find_it(
    example: Callable[..., Ran], files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owl_wms.runtime.decode.TensorRT", ExportToolchain)
    _, status, built = example("cluster_cache.py", "shared", *files)
    assert status is None
    assert [re.sub(r"\d+\.\d s", "N s", line).split(": ")[:2] for line in built.splitlines()] == [
        ["batch 1", "built in N s"],
        ["batch 8", "built in N s"],
    ]
    places = [Path(line.split(": ")[-1]) for line in built.splitlines()]
    assert all(place.parent.name == "shared" and (place / "manifest.json").is_file() for place in places)
    _, status, found = example("cluster_cache.py", "shared", *files)
    assert status is None
    assert found.splitlines() == [f"batch {size}: found: {place}" for size, place in zip((1, 8), places, strict=True)]


def test_why_there_is_no_cache_is_one_line(
    example: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(example("cluster_cache.py", "shared").status).startswith(f"error: {NO_GPU} (")
    missing = example("cluster_cache.py", "shared", "none.yml", "none.pt").status
    assert missing == "error: none.yml: cannot read this configuration: No such file or directory"
    assert example("cluster_cache.py").status == "Run: python examples/cluster_cache.py FOLDER [CONFIG CHECKPOINT]"
    monkeypatch.setenv("TENSORRT_ENABLED", "false")
    assert str(example("cluster_cache.py", "shared").status).endswith("switched off by the settings (enabled=False)")
    assert not (tmp_path / "shared").exists()


def test_slurm_script_with_two_ranks(tmp_path: Path, files: tuple[str, str]) -> None:
    """`srun` is a stand-in that starts two processes with the variables that SLURM sets."""
    decoder = get_decoder_only(None, *files, dtype=torch.float32)
    latents = torch.randn(3, 2, decoder.latent_channels, 4, 4)
    for number, clip in enumerate(latents):
        save_array(tmp_path / f"in/{number}.pt", clip)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    (commands / "srun").write_text(
        "#!/bin/bash\nexport SLURM_STEP_ID=0 SLURM_NTASKS=2\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!\nSLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!\n'
        "wait $first && wait $second\n"
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    script = ["bash", str(EXAMPLES / "decode_dataset.slurm")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run([*script, "in", "out", *files], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert sorted(re.findall(r"(\d) done, 0 failed", ran.stderr)) == ["1", "2"], ran.stderr
    (generation,) = (tmp_path / "out").iterdir()
    for number, clip in enumerate(latents):
        with torch.no_grad():
            wanted = to_bytes(decoder(clip))
        got = torch.from_numpy(np.load(generation / f"{number}.pt.npy"))
        assert (got.int() - wanted.int()).abs().max() <= 1
    ended = subprocess.run([*script, "in"], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "usage: sbatch" in ended.stderr


def test_notebook() -> None:
    """Its cells run, and the outputs in the repository are those of its cells but for rounding."""
    path = EXAMPLES / "latents_to_frames.ipynb"
    assert path.stat().st_size < 150_000
    stored, made = json.loads(path.read_text(encoding="utf-8")), notebook.run(path)
    assert made["cells"][-1]["outputs"][0]["text"][0] == f"pytorch - {NO_GPU}\n"
    assert outline(stored) == outline(made), f"run: python -m tests.notebook {path.relative_to(ROOT)}"
    pictures = [line for line in outline(made) if line == "<picture>"]
    assert len(pictures) == 4


def outline(cells: dict[str, Any]) -> list[str]:
    """The sources of a notebook and its outputs, without pictures and without numbers that have a point."""
    lines: list[str] = []
    for cell in cells["cells"]:
        lines += cell["source"]
        for output in cell.get("outputs", []):
            lines += [re.sub(r"\d+\.\d+", "N", line) for line in output.get("text", [])]
            lines += ["<picture>"] if any(kind.startswith("image/") for kind in output.get("data", ())) else []
    return lines
