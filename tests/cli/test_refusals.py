"""What cannot be written, parsed or run on is one line and exit code 2, said before the work and not after it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.cli import _shared, main
from owl_wms.configs.paths import EXAMPLES
from owl_wms.errors import ConfigError, DataError
from owl_wms.game.world import GameWorld
from owl_wms.media.arrays import load_array, save_array
from tests.cli.runner import call, run
from tests.trainers.helpers import config

NOWHERE = Path("/proc/x")  # not even root makes files there


def refuse(message: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    """The command ends with one error line that holds the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert message in error.replace("\n", " ")
    assert error.count("error:") == 1


def worked(*_: Any, **__: Any) -> Any:
    raise AssertionError("the work began")


@pytest.fixture
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command may read weights: that is where its work begins."""
    for first in (
        "owl_wms.vae.load_encoder",
        "owl_wms.utils.owl_vae_bridge.get_decoder_only",
        "owl_wms.inference.build.load_core",
        "owl_wms.inference.build.build_pipeline",
    ):
        monkeypatch.setattr(first, worked)


@pytest.mark.parametrize(
    "arguments",
    [
        ("decode", "latents.pt", "--out", f"{NOWHERE}/c.mp4"),
        ("decode", "latents.pt", "--png", f"{NOWHERE}/s.png"),
        ("encode", "clip.mp4", "--out", f"{NOWHERE}.pt"),
        ("encode", "clip.mp4", "--out", "/dev/null/z.safetensors"),
    ],
)
@pytest.mark.usefixtures("nothing_begins")
def test_destinations_are_tried_first(
    place: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert call(place, *arguments) == 2
    error = capsys.readouterr().err
    assert f"{arguments[-1]}: cannot be written" in error.replace("\n", " ")
    assert error.count("error:") == 1


@pytest.mark.usefixtures("nothing_begins")
def test_a_clip_without_its_library_is_refused_first(
    place: Path, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    said = "needs PyAV; pip install av"
    assert call(place, "decode", "latents.pt", "--out", str(place / "c.mp4")) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    refuse(said, capsys, "sample", str(world / "world.yml"), str(world / "world.pt"), "--out", str(place / "c.mp4"))
    refuse(said, capsys, "demo", "--out", str(place / "demo"))
    assert not (place / "demo").exists()


def test_depth_clip_is_tried_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "o_depth.mp4").mkdir()
    assert call(place, "decode", "latents.pt", "--depth", "--out", str(place / "o.mp4")) == 2
    assert "o_depth.mp4: is a folder" in capsys.readouterr().err.replace("\n", " ")
    assert not (place / "o.mp4").exists()


@pytest.mark.usefixtures("nothing_begins")
def test_a_folder_of_latents_is_sent_to_the_command_for_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "decode", ".", "--out", str(place / "o.mp4")) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert ": is a folder, one file of latents is wanted: give one of its files, or decode all of them with" in error
    assert "owl-wms decode-dataset" in error


@pytest.mark.usefixtures("nothing_begins")
def test_sample_and_demo_try_theirs(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["sample", str(world / "world.yml"), str(world / "world.pt"), "--out", str(tmp_path / "c.mp4")]
    refuse("/proc/x.safetensors: cannot be written", capsys, *call, "--latents", f"{NOWHERE}.safetensors")
    (tmp_path / "file").write_text("")
    refuse("cannot be written", capsys, "demo", "--out", str(tmp_path / "file"))
    refuse("file: is a file", capsys, "data", "make", str(tmp_path / "file"))
    refuse("cannot be written", capsys, "data", "make", f"{NOWHERE}/table")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "trying leaves nothing behind"


def test_trying_leaves_a_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_text("kept")
    _shared.check_destination(path, ".pt")
    _shared.check_destination(tmp_path / "deep" / "er" / "b.pt", ".pt")
    assert path.read_text() == "kept"
    assert not (tmp_path / "deep").exists()


def test_a_file_that_is_a_mount_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run -v clip.mp4:/out/clip.mp4`: a finished file could not be renamed to it."""
    path = tmp_path / "a.npy"
    path.write_text("kept")
    monkeypatch.setattr(os.path, "ismount", lambda found: str(found) == os.path.realpath(path))
    with pytest.raises(ConfigError, match=r"a\.npy: is a mount.*mount its folder, or name another file"):
        _shared.check_destination(path)


@pytest.mark.usefixtures("nothing_begins")
def test_frames_are_looked_at_before_weights_are_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = ("--vae-config", str(place / "vae.yml"))
    weights = str(place / "vae.safetensors")
    out = str(place / "z.pt")
    for source, message in (("none.mp4", "no such file"), ("clip.mp4", "takes 4 channels")):
        refuse(message, capsys, "encode", str(place / source), *vae, "--checkpoint", weights, "--out", out)
        table = str(place / "table")
        refuse(
            message, capsys, "data", "import", str(place / source), *vae, "--vae-checkpoint", weights, "--out", table
        )


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
def test_a_failed_write_is_one_error(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        save_array(Path(f"{NOWHERE}{suffix}"), torch.zeros(2))
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save_array(tmp_path / f"folder{suffix}", torch.zeros(2))


def test_several_tensors_go_into_one_file(tmp_path: Path) -> None:
    named = {"latents": torch.randn(2, 3), "mouse": torch.randn(4)}
    for suffix in (".pt", ".safetensors"):
        save_array(tmp_path / f"x{suffix}", named)
        assert torch.equal(load_array(tmp_path / f"x{suffix}"), named["latents"])
    with pytest.raises(DataError, match="one tensor, got latents, mouse"):
        save_array(tmp_path / "x.npy", named)


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cpu:0", "cuda:-1", "cuda:x", "tpu", ""])
def test_only_the_cpu_and_cuda_are_devices(name: str) -> None:
    with pytest.raises(ConfigError, match="must be cpu, cuda or cuda:N"):
        _shared.choose_device(name)


def test_devices_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _shared.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="CUDA devices"):
        _shared.choose_device("cuda:99999999999999999999")
    refuse("CUDA devices", capsys, "data", "make", str(tmp_path / "t"), "--device", "cuda:77")


def test_a_local_rank_that_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config(tmp_path, "rft")
    monkeypatch.setenv("LOCAL_RANK", "abc")
    for arguments in (("data", "make", str(tmp_path / "t")), ("demo",), ("train", str(tmp_path / "rft.yml"))):
        refuse("LOCAL_RANK must be a whole number >= 0, as torchrun sets it; got 'abc'", capsys, *arguments)
    assert _shared.choose_device("cpu") == torch.device("cpu")


def test_a_change_that_is_not_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path, "rft")
    for text in ("[1,", "{a: b", "\t- x", "*nothing"):
        refuse("is not YAML", capsys, "train", str(tmp_path / "rft.yml"), "--set", f"train.seed={text}")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        *(
            ((command, source, "--out", out, "--scale", text), "--scale")
            for command, source, out in (("decode", "latents.pt", "o.mp4"), ("encode", "clip.mp4", "z.pt"))
            for text in ("nan", "inf", "-inf", "0", "1e30")
        ),
        *((("decode", "latents.pt", "--fps", text), "--fps") for text in ("inf", "nan", "0.0001", "0", "1e9")),
    ],
)
@pytest.mark.usefixtures("nothing_begins")
def test_numbers_out_of_range(
    place: Path,
    arguments: tuple[str, ...],
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    assert call(place, *arguments) == 2
    error = capsys.readouterr().err
    assert f"error: {option} must be a number from " in error
    assert f"got {float(arguments[-1])}" in error.replace("\n", " ")
    assert sorted(place.iterdir()) == before


@pytest.mark.usefixtures("nothing_begins")
def test_numbers_out_of_range_for_world_models(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = (str(world / "world.yml"), str(world / "world.pt"))
    huge = "9" * 23
    for text in ("nan", "inf", "1e9"):
        refuse("--cfg-scale must be a number from -100 to 100", capsys, "sample", *model, "--cfg-scale", text)
        refuse("--cfg-scale must be a number from -100 to 100", capsys, "play", *model, "--cfg-scale", text)
    for text in ("nan", "inf", "0.1", "241"):
        refuse("--fps must be a number from 1 to 240", capsys, "play", *model, "--fps", text)
    data = (str(world), "--out", str(tmp_path / "o"), "--checkpoint", model[1], "--vae-config", model[0])
    for text in ("inf", "1e308"):
        refuse("--time-limit must be a number from 0.1 to", capsys, "decode-dataset", *data, "--time-limit", text)
    refuse("--nccl-timeout must be a number from 1 to", capsys, "train", model[0], "--nccl-timeout", "inf")
    for arguments in (("sample", *model), ("play", *model), ("data", "make", str(tmp_path / "table"))):
        refuse(f"got {huge}", capsys, *arguments, "--seed", huge)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "option"),
    [("decode-dataset", "--batch-size"), ("decode-dataset", "--metrics-port"), ("demo", "--batch-size")],
)
def test_whole_numbers_beyond_64_bits(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, option, "9" * 23) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_begins")
def test_paths_that_cannot_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    demo = EXAMPLES / "demo"
    weights = ("--vae-config", f"{demo}/demo_vae.yml", "--checkpoint", f"{demo}/demo_vae.safetensors", "--out")
    for command, *more in (("decode", *weights, "o.mp4"), ("encode", *weights, "z.pt"), ("report",), ("train",)):
        refuse("File name too long", capsys, command, "n" * 300 + ".npy", *more)
    for command in ("report", "train"):
        refuse("Too many levels of symbolic links", capsys, command, "circle/x")


def test_worlds_have_numbers_of_64_bits() -> None:
    assert GameWorld(2**62).batch == 1
    with pytest.raises(ConfigError, match="must fit into int64, got 9223372036854775807 for the first of 2"):
        GameWorld(2**63 - 1, 2)


@pytest.mark.parametrize("name", ["~/x", "$HOME/x", "${HOME}/x", "s3://bucket/x", "'x'", "x" * 256, "$OWL_NOBODY/x"])
def test_a_name_that_a_shell_would_replace_makes_no_folder(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    refuse(" name", capsys, "data", "make", name, "--device", "cpu")
    refuse(" name", capsys, "data", "import", "a.pt", "--out", name, "--fps", "3")
    assert list(tmp_path.iterdir()) == []
