"""Builds a program in a process of its own and returns the build report.

Why it exists: the caller must survive a segmentation fault, a hang and a CUDA context beyond repair. If the build
process dies, the innermost step that it had begun is recorded as failed, with the signal's name and the end of its
output as the reason, and a new process continues with that knowledge (at most `MAX_RESTARTS` times). If the time limit
passes, FastPathError is raised.

Usage:
    request = Request(input_shape=(8, 128, 8, 8), precision="auto")
    report = build_program(decoder, request, Path("entry"), progress=print)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from owl_wms import ending, env
from owl_wms.errors import FastPathError
from owl_wms.files import WINDOWS
from owl_wms.interrupts import raise_interrupt
from owl_wms.request import Request
from owl_wms.temporary import temporary_folder
from owl_wms.trt import plans
from owl_wms.trt.build.child import DECODER_NAME, GO, IMPORTABLE, JOB_NAME
from owl_wms.trt.graph.recording import Recording
from owl_wms.trt.graph.shapes import copy_with
from owl_wms.trt.library import importer
from owl_wms.vae.fold import folded

Event = dict[str, Any]
MAX_RESTARTS = 4
STDERR_TAIL = 1500
_LOG = logging.getLogger(__name__)

# The build process sees the caller's import path, so that it finds the same owl_wms and the decoder's own module.
# Garbage collection would be a fifth of the time that its imports take; `child.py` switches it on again.
BOOTSTRAP = (
    "import sys, json, gc; gc.disable(); sys.path[:] = json.loads(sys.argv[1]); "
    "from owl_wms.trt.build.child import main; sys.exit(main(sys.argv[2:]))"
)


def build_program(
    decoder: nn.Module,
    request: Request,
    out_dir: Path,
    *,
    graph: str = "",
    progress: Callable[[Event], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Build, check, time and save a program for `decoder`.

    Args:
        decoder: `[B, c, h, w] -> [B, C, H, W]`, any device and float dtype; not changed. Its class must be importable
            by name.
        request: what to build.
        out_dir: existing directory; `program.pt2` is written into it.
        graph: `key_material(...)["graph"]`: the digest of the recording that the program is stored under. The build
            process compares it with the decoder that it received. Empty: that of `decoder` now.
        progress: receives `{"stage", "elapsed", ...}` dicts while the build runs; must not raise.
        meanwhile: called once in this thread when the build process has what it needs; seconds at most, since nothing
            is read from that process until it returns. What it raises is logged.

    Returns:
        The report (JSON-ready): `plan`, `precision`, `latency_ms`, `eager_latency_ms`, `cuda_graph`, `parity`,
        `engines`, `kept_modules` (left in PyTorch), `candidates`, `refused`, `attempts`, `build_seconds`,
        `save_seconds`, `load_seconds`, `program_bytes`, `wall_seconds`, `stages` (its split: step and plan -> seconds),
        `restarts`, ...

    Raises:
        FastPathError: stage "export", "build", "parity", "save" or "load"; the caller decodes with PyTorch.
    """
    if WINDOWS:
        raise FastPathError("build", "the build process needs pipes that Windows does not hand on", "run in WSL")
    begin = time.monotonic()
    known = importer.failed_elsewhere()
    plans.check_names(request)
    if known is not None and not plans.without_library(request):
        raise known
    with temporary_folder("job") as directory:
        build = Build(
            directory=directory,
            request=request,
            graph=graph or Recording.of(decoder, request.input_shape, request.state).digest(),
            out_dir=out_dir,
            progress=progress,
            deadline=begin + request.timeout_seconds,
            hand_over=lambda: write_decoder(decoder, directory / DECODER_NAME),
            meanwhile=meanwhile,
        )
        report = build.run()
    wall = time.monotonic() - begin
    report["wall_seconds"] = round(wall, 3)
    # The rest: starting the process, the end of it, and whatever earlier processes took that died.
    stages = report.get("stages", {})
    report["stages"] = {**stages, "processes": round(wall - sum(stages.values()), 3)}
    report["restarts"] = build.restarts
    return report


def write_decoder(decoder: nn.Module, path: Path) -> None:
    """Write `decoder` for the build process: on the CPU, in its own dtype, live weight norm folded, since torch pickles
    no parametrized module. Raises FastPathError, stage "export".
    """
    for module in decoder.modules():
        if type(module).__module__ == "__main__":
            reason = f"{type(module).__name__} is defined in __main__, which the build process does not have"
            raise FastPathError("export", reason, IMPORTABLE)
    try:
        torch.save(copy_with(folded(decoder), lambda tensor: tensor.to("cpu", copy=True)), path)
    except Exception as error:  # local classes, lambdas, handles: pickle names them in a dozen exception types
        reason = f"{type(decoder).__name__} cannot be handed to the build process: {type(error).__name__}: {error}"
        raise FastPathError("export", reason, IMPORTABLE) from error


@dataclass(kw_only=True)
class Build:
    """One build over as many processes as it takes (at most `MAX_RESTARTS` more than one).

    `hand_over` puts the decoder into the directory; it and then `meanwhile` run once, while the first process imports.
    `known` is what failed or killed a process, by attempt; `stage` the last one that a process named.
    """

    directory: Path
    request: Request
    graph: str
    out_dir: Path
    deadline: float
    progress: Callable[[Event], None] | None = None
    bootstrap: str = BOOTSTRAP
    hand_over: Callable[[], None] | None = None
    meanwhile: Callable[[], None] | None = None
    known: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    stage: str = ""

    def run(self) -> dict[str, Any]:
        """The report of the child that finished. Raises FastPathError."""
        while not ending.over():
            outcome = self._one_child()
            if outcome["event"] == "done":
                return cast("dict[str, Any]", outcome["report"])
            if outcome["event"] == "failed":
                failure = FastPathError(outcome["stage"], outcome["reason"], outcome["remedy"])
                if failure.stage == "import":
                    importer.remember(failure)
                raise failure
            _LOG.info("the build process died: %s", outcome["reason"])
            if not ending.over() and (self.restarts >= MAX_RESTARTS or not outcome["open"]):
                raise FastPathError("build", outcome["reason"], "try another precision or plan (owl-wms trt plans)")
            self.known[outcome["open"]] = outcome["reason"]
            self.restarts += 1
        raise FastPathError("build", "the process that asked for it is ending")

    def _one_child(self) -> Event:
        job = {
            "request": self.request.to_json(),
            "graph": self.graph,
            "out_dir": str(self.out_dir.absolute()),
            "known": self.known,
        }
        (self.directory / JOB_NAME).write_text(json.dumps(job), encoding="utf-8")
        read_fd, write_fd = os.pipe()
        log = self.directory / "stderr.txt"
        command = [
            env.python_executable(),
            "-c",
            self.bootstrap,
            json.dumps(sys.path),
            str(self.directory),
            str(write_fd),
        ]
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                pass_fds=(write_fd,),
                start_new_session=True,
            )
        os.close(write_fd)

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in it

        try:
            with ending.stopped_by(kill):
                self._start(process)
                last, open_key = self._listen(read_fd)
        except BaseException:
            kill()
            raise
        finally:
            os.close(read_fd)
            finished = self._reap(process)
        if last is not None and last["event"] in ("done", "failed"):
            return last
        reason = explain_exit(finished, self.request.timeout_seconds, last)
        tail = log.read_text(encoding="utf-8", errors="replace")[-STDERR_TAIL:].strip()
        reason += f" in stage {self.stage!r}" if self.stage else ""
        reason += f"; last output: {' | '.join(tail.splitlines()[-4:])}" if tail else ""
        return {"event": "died", "reason": reason, "open": open_key if finished is not None else ""}

    def _start(self, process: subprocess.Popen[bytes]) -> None:
        """Let the child have its decoder, which it asks for after its imports."""
        if self.hand_over is not None:
            self.hand_over()
            self.hand_over = None
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # one that died already is noticed below
            process.stdin.write(GO)
            process.stdin.close()
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            try:
                meanwhile()
            except Exception as error:
                raise_interrupt(error)
                _LOG.warning("beside the build: ", exc_info=True)

    def _listen(self, fd: int) -> tuple[Event | None, str]:
        """Messages until the pipe closes or time is up; `(last final message, key of the innermost open attempt)`."""
        pending, open_keys = b"", list[str]()
        last: Event | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while (left := self.deadline - time.monotonic()) > 0:
                if not selector.select(min(left, 1.0)):
                    continue
                chunk = os.read(fd, 65536)
                if not chunk:
                    break
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    event = message["event"]
                    if event == "attempt":
                        open_keys.append(message["key"])
                    elif event == "outcome":
                        open_keys = [key for key in open_keys if key != message["key"]]
                        if message["reason"]:
                            self.known[message["key"]] = message["reason"]
                            self._tell({"stage": "attempt failed", "key": message["key"], "reason": message["reason"]})
                    elif event in ("done", "failed", "broken"):
                        last = message
                    else:
                        self.stage = message["stage"]
                        self._tell({key: value for key, value in message.items() if key != "event"})
                if last is not None and last["event"] != "broken":
                    break
        return last, open_keys[-1] if open_keys else ""

    def _tell(self, event: Event) -> None:
        _LOG.debug("build: %s", event)
        if self.progress is not None:
            self.progress(event)

    def _reap(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status, or None when the process had to be killed because time was up."""
        try:
            return process.wait(timeout=max(0.0, min(20.0, self.deadline - time.monotonic())) + 0.5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def explain_exit(status: int | None, timeout_seconds: float, last: Event | None = None) -> str:
    """Returns in words how a build process ended: timeout, a CUDA context beyond repair, a signal by name, or an exit
    status.
    """
    if status is None:
        return f"the build did not finish within {timeout_seconds:g} s and was stopped"
    if last is not None and last.get("event") == "broken":
        return f"the CUDA context became unusable: {last['reason']}"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        meaning = {
            "SIGSEGV": "a segmentation fault",
            "SIGKILL": "killed, usually for memory",
            "SIGABRT": "aborted by a failed check",
        }
        return f"the build process ended with {name}" + (f" ({meaning[name]})" if name in meaning else "")
    return f"the build process ended with exit status {status} and no answer"
