"""`owl-wms trt` and `owl-wms doctor`, run as a user runs them, on a cache that holds one real entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from owl_wms import trt
from owl_wms.cache import survey
from owl_wms.cli.doctor import diagnose
from owl_wms.runtime import VideoDecode
from owl_wms.trt.plans import PLANS
from tests.cli.runner import run
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings


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
    assert capsys.readouterr().err == f"error: {cache}: no entry begins with 'base_'; `owl-wms trt list` shows all\n"


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


def test_verify_of_a_name_touches_no_other_entry(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    VideoDecode(TinyDecoder(), batch_size=1, settings=settings(tmp_path), toolchain=ExportToolchain()).prepare(
        (4, 3, 3)
    )
    good, bad = sorted(path.name for path in cache.glob("tiny_*"))
    (cache / bad / "program.pt2").write_bytes(b"damaged")
    hashed: list[str] = []
    inspect = survey.inspect

    def watched(name: str, *rest: Any, **more: Any) -> Any:
        hashed.append(name)
        return inspect(name, *rest, **more)

    monkeypatch.setattr(survey, "inspect", watched)
    assert run("trt", "verify", good, "--repair") == 0
    assert "1 checked, 0 bad" in capsys.readouterr().out
    assert hashed == [good]
    assert (cache / bad).is_dir(), "it was not asked for, so it stays where it is"
    assert run("trt", "verify", bad, "--repair") == 1
    assert not (cache / bad).exists()
    assert run("trt", "verify", bad) == 2


@pytest.mark.parametrize("size", ["inf", "nan", "-1"])
def test_prune_to_what_is_no_size_is_one_line(cache: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trt", "prune", "--max-gib", size) == 2
    assert "max-gib" in capsys.readouterr().err
    assert list(cache.glob("tiny_*"))


@pytest.mark.parametrize("command", ["list", "prune"])
def test_an_empty_cache_directory_is_not_the_current_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORRT_CACHE_DIR", raising=False)
    assert run("trt", command, "--cache-dir", "") == 2
    assert "cache_dir must be a directory path; got ''" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("list",), ("verify", "--all"), ("prune",)])
def test_a_directory_that_is_not_there_is_told(
    tmp_path: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("trt", *command, "--cache-dir", str(tmp_path / "misspelt")) == 0
    assert "misspelt: there is no such directory yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plans_lists_every_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert run("trt", "plans") == 0
    said = capsys.readouterr().out
    for plan in PLANS.values():
        (line,) = [line for line in said.splitlines() if f" {plan.name} " in line]
        assert plan.summary in line
        assert ", ".join(plan.precisions) in line


def test_prune_to_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trt", "prune") == 0
    assert list(cache.glob("tiny_*")), "20 GiB leave room for a small entry"
    assert run("trt", "prune", "--max-gib", "0") == 0
    assert "removed 1" in capsys.readouterr().out
    assert not list(cache.glob("tiny_*"))


def test_doctor_says_what_and_why(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = diagnose()
    assert facts["cache"]["entries"] == 1
    assert facts["cache"]["directory"] == str(cache)
    assert facts["cache"]["free_bytes"] > 0
    assert facts["machine"]["torch"].startswith("torch ")
    assert run("doctor", "--json") == (0 if facts["usable"] else 1)
    assert json.loads(capsys.readouterr().out)["verdict"] == facts["verdict"]
    run("doctor")
    said = capsys.readouterr().out
    assert said.startswith(facts["verdict"].split(":")[0])
    assert len(said.splitlines()) <= 30, "one screen"
    assert "1 programs, 0.0 GiB of 20.0 GiB; " in said
    assert str(facts["cache"]["max_bytes"]) not in said
    if not torch.cuda.is_available():
        assert "PyTorch would decode: this machine has no CUDA device. Remedy:" in facts["verdict"]


def test_doctor_says_when_nothing_would_decode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("TENSORRT_FALLBACK", "error")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = trt.TensorRTStatus(
        available=False, flavour="none", version="", reason="not installed", remedy="install it"
    )
    monkeypatch.setattr(trt, "status", lambda: absent)
    said = diagnose()
    assert said["verdict"].startswith(
        "Nothing would decode: this machine has no CUDA device, and TENSORRT_FALLBACK=error forbids"
    )
    assert not said["usable"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert diagnose()["verdict"] == (
        "Nothing would decode: not installed, and TENSORRT_FALLBACK=error forbids PyTorch. "
        "Remedy: install it; or unset TENSORRT_FALLBACK."
    )
    monkeypatch.setattr(trt, "status", lambda: trt.TensorRTStatus(available=True, flavour="rtx", version="1"))
    assert diagnose()["verdict"].endswith("else an error (TENSORRT_FALLBACK=error).")
    monkeypatch.setenv("TENSORRT_ENABLED", "false")
    assert diagnose()["verdict"].startswith("PyTorch would decode: TENSORRT_ENABLED")
    monkeypatch.delenv("TENSORRT_ENABLED")
    monkeypatch.setenv("TENSORRT_FALLBACK", "pytorch")
    assert diagnose()["verdict"].endswith("else PyTorch.")


def test_doctor_with_a_bad_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TENSORRT_PRECISION", "half")
    assert run("doctor") == 1
    assert "TENSORRT_PRECISION" in capsys.readouterr().out


def test_doctor_claims_no_value_that_a_bad_variable_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ENABLED", "maybe")
    monkeypatch.setenv("TENSORRT_FALLBACK", "never")
    monkeypatch.setenv("TENSORRT_PRECISION", "bf16")
    facts = diagnose()
    assert facts["settings"]["enabled"].startswith("refused: TENSORRT_ENABLED: ")
    assert facts["settings"]["enabled"].endswith("got 'maybe'")
    assert facts["settings"]["fallback"].startswith("refused: TENSORRT_FALLBACK: ")
    assert facts["settings"]["precision"] == "bf16"
    assert facts["settings"]["from_environment"] == "precision, cache_dir"
    assert facts["cache"]["directory"] == str(cache)
    assert "'maybe'" in facts["verdict"]
    assert "'never'" in facts["verdict"]
    assert not facts["usable"]


def test_doctor_names_a_bad_directory_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_CACHE_DIR", "~nobody-of-that-name/cache")
    monkeypatch.setenv("LOCAL_RANK", "abc")
    facts = diagnose()
    assert facts["cache"]["directory"] == facts["cache"]["entries"] == "-"
    assert "~nobody-of-that-name" in facts["cache"]["refused"]
    assert facts["settings"]["LOCAL_RANK"].endswith("got 'abc'")
    assert facts["settings"]["from_environment"] == "-"
    assert "LOCAL_RANK" in facts["verdict"]
    assert "TENSORRT_CACHE_DIR" in facts["verdict"]
