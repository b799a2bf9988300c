"""`owl-wms trt` and `owl-wms doctor`, run as a user runs them, on a cache that holds one real entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms.cli import main
from owl_wms.cli.doctor import diagnose
from owl_wms.runtime import VideoDecode
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory with the entry of a tiny decoder, named by TENSORRT_CACHE_DIR."""
    VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain()).prepare(
        (4, 3, 3)
    )
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    return tmp_path / "cache"


def run(*arguments: str) -> int:
    """Exit code of `owl-wms <arguments>`."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_list_and_show(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = cache.glob("tiny_*")
    assert run("trt", "list") == 0
    assert entry.name in capsys.readouterr().out
    assert run("trt", "list", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["name"] == entry.name
    assert listed["status"] == "ok"
    assert listed["input_shape"] == [2, 4, 3, 3]
    assert run("trt", "show", entry.name[:8]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["key"].startswith(entry.name.split("_")[1])
    assert shown["report"]["plan"] == "export"


def test_show_of_nothing_is_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trt", "show", "base_") == 2
    assert "must begin exactly one entry's name" in capsys.readouterr().err


def test_verify_finds_a_flipped_bit(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trt", "verify", "--all") == 0
    assert "1 checked, 0 bad" in capsys.readouterr().out
    assert run("trt", "verify") == 2, "a name, or --all"
    (file,) = cache.glob("*/program.pt2")
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.chmod(0o600)
    file.write_bytes(bytes(data))
    assert run("trt", "verify", "tiny") == 1
    assert "corrupt" in capsys.readouterr().out
    assert run("trt", "verify", "--all", "--repair") == 1
    assert run("trt", "verify", "--all") == 0, "it was moved to quarantine"


def test_prune_to_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trt", "prune") == 0
    assert list(cache.glob("tiny_*")), "20 GiB leave room for a small entry"
    assert run("trt", "prune", "--max-gib", "0") == 0
    assert "removed 1" in capsys.readouterr().out
    assert not list(cache.glob("tiny_*"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A configuration and a checkpoint of the golden decoder."""
    golden = torch.load("tests/data/dcae_pin_square.pt", weights_only=True)
    config, checkpoint = tmp_path / "tiny.yml", tmp_path / "tiny.pt"
    config.write_text(json.dumps({"model": golden["cfg"]}), encoding="utf-8")
    torch.save(golden["decoder"], checkpoint)
    return str(config), str(checkpoint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_build_without_a_gpu_is_one_clear_error(
    cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("trt", "build", "--vae-config", files[0], "--checkpoint", files[1]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert "Traceback" not in said


def test_bench_compares_in_one_table(
    cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--batch-size", "2", "--iterations", "2", "--no-compiled")
    assert run("trt", "bench", "--vae-config", files[0], "--checkpoint", files[1], *arguments) == 0
    said = capsys.readouterr().out
    assert "eager" in said
    assert "owl_wms (" in said
    assert "relative L2" in said


def test_bad_latent_and_bad_precision(cache: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    base = ("trt", "build", "--vae-config", files[0], "--checkpoint", files[1])
    assert run(*base, "--latent", "8,8") == 2
    assert "c,h,w" in capsys.readouterr().err
    assert run(*base, "--precision", "fp17") == 2
    assert "fp16" in capsys.readouterr().err


def test_doctor_says_what_and_why(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = diagnose()
    assert facts["cache"]["entries"] == 1
    assert facts["cache"]["directory"] == str(cache)
    assert facts["cache"]["free_bytes"] > 0
    assert facts["machine"]["torch"].startswith("torch ")
    assert run("doctor", "--json") == (0 if facts["usable"] else 1)
    assert json.loads(capsys.readouterr().out)["verdict"] == facts["verdict"]
    run("doctor")
    assert facts["verdict"].split(":")[0] in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "PyTorch would decode: no CUDA device. Remedy:" in facts["verdict"]


def test_doctor_with_a_bad_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TENSORRT_PRECISION", "half")
    assert run("doctor") == 1
    assert "TENSORRT_PRECISION" in capsys.readouterr().out
