"""`owl-wms play` as a process: it prints an address, serves it, and stops cleanly; bad calls end in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from owl_wms.cli import main

COMMAND = [sys.executable, "-c", "from owl_wms.cli import main; main()", "play"]


def test_the_game_is_served_until_interrupted(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*COMMAND, "--game", "--port", "0", "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None
        found, end = None, time.monotonic() + 60
        while found is None and time.monotonic() < end:
            line = process.stderr.readline()
            assert line, "it ended before it listened"
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", line)
        assert found is not None
        with urllib.request.urlopen(found[0], timeout=10) as answer:
            assert "owl-wms play" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(found[0][:-2] + "_/", timeout=10)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert "stopped" in rest
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["world.yml"], "both a config and a checkpoint"),
        (["--vae"], "goes with --game"),
        (["--game", "--token", "short"], "at least 16"),
        (["--game", "--fps", "0"], "fps must be"),
        (["absent.yml", "absent.pt"], "absent.yml"),
        ([str(Path(__file__).parents[2] / "configs" / "av_v4_8x8.yml"), "absent.pt"], "only game_rft"),
        (["--game", "--device", "cuda:77"], "CUDA devices"),
    ],
)
def test_bad_calls_end_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["play", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
