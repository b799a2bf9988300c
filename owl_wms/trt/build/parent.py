"""Build a program in a child process and bring back the report, whatever becomes of the child.

Why it exists: the caller must survive a segfault, a hang and a poisoned CUDA context. A child that dies in the middle
of an attempt has that attempt recorded as failed, with the signal's name and the end of its stderr as the reason, and
is started again with that knowledge, so that isolation goes on where it stopped.

Usage:
    report = build_program(decoder, BuildSpec(input_shape=(8, 128, 8, 8), precision="auto"), Path("entry"),
    progress=print_event)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_wms import env
from owl_wms.errors import FastPathError
from owl_wms.settings import EIGHT_BITS
from owl_wms.trt import plans
from owl_wms.trt.library import importer
from owl_wms.trt.check.calibration import calibration_digest
from owl_wms.trt.build.child import DECODER_NAME, GO, JOB_NAME
from owl_wms.trt.graph.shapes import copy_with
from owl_wms.trt.spec import BuildSpec
from owl_wms.vae import fold_weight_norm

Event = dict[str, Any]
MAX_RESTARTS = 4
STDERR_TAIL = 1500
_LOG = logging.getLogger(__name__)

# The child sees the parent's import path, so that it finds the same owl_wms and the decoder's own module. Looking for
# garbage while it imports is a fifth of that time; `child.py` switches it on again.
BOOTSTRAP = (
    "import sys, json, gc; gc.disable(); sys.path[:] = json.loads(sys.argv[1]); "
    "from owl_wms.trt.build.child import main; sys.exit(main(sys.argv[2:]))"
)


def build_program(
    decoder: nn.Module,
    spec: BuildSpec,
    out_dir: Path,
    progress: Callable[[Event], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Build, check, time and save a program for `decoder`.

    Args:
        decoder: `[B, c, h, w] -> [B, C, H, W]`, any device and float dtype; not changed. Its class must be importable
            by name.
        spec: what to build. Where the program is kept under a key, `calibration_digest` should be the key's.
        out_dir: existing directory; `program.pt2` is written into it.
        progress: receives `{"stage", "elapsed", ...}` dicts while the build runs; must not raise.
        meanwhile: called once in this thread when the building process has what it needs; seconds at most, since
            nothing is read from that process until it returns. What it raises is logged.

    Returns:
        The report (JSON-ready): `plan`, `precision`, `latency_ms`, `eager_latency_ms`, `cuda_graph`, `parity`,
        `engines`, `kept_modules`, `candidates`, `attempts`, `build_seconds`, `save_seconds`, `load_seconds`,
        `program_bytes`, `wall_seconds`, `restarts`, ...

    Raises:
        FastPathError: stage "export", "build", "parity", "save" or "load"; the caller decodes with PyTorch.
    """
    begin = time.monotonic()
    known = importer.failed_elsewhere()
    if known is not None:
        raise known
    for precision in spec.wanted_precisions():
        plans.candidates(
            decoder, spec, precision
        )  # an impossible request fails here, before a process is started for it
    if spec.precision in EIGHT_BITS and not spec.calibration_digest:
        spec = dataclasses.replace(spec, calibration_digest=calibration_digest(spec))
    with tempfile.TemporaryDirectory(prefix="owl_trt_job_") as name:  # mode 0700
        directory = Path(name)
        session = Session(
            directory=directory,
            spec=spec,
            out_dir=out_dir,
            progress=progress,
            deadline=begin + spec.timeout_seconds,
            hand_over=lambda: _write_decoder(folded_copy(decoder), directory / DECODER_NAME),
            meanwhile=meanwhile,
        )
        report = session.run()
    report["wall_seconds"] = round(time.monotonic() - begin, 3)
    report["restarts"] = session.restarts
    return report


def folded_copy(decoder: nn.Module) -> nn.Module:
    """A CPU copy in float32 with weight norm folded in float32: the decoder everything is measured against."""
    wide = copy_with(decoder, lambda t: t.to("cpu", torch.float32 if t.dtype.is_floating_point else t.dtype, copy=True))
    return fold_weight_norm(wide).eval().requires_grad_(False)


def _write_decoder(folded: nn.Module, path: Path) -> None:
    try:
        torch.save(folded, path)
    except Exception as error:  # local classes, lambdas, handles: pickle names them in a dozen exception types
        raise FastPathError(
            "export",
            f"{type(folded).__name__} cannot be handed to the building process: {type(error).__name__}: {error}",
            "define the decoder's class in an importable module and keep open handles and lambdas out of it",
        ) from error


@dataclass(kw_only=True)
class Session:
    """One build over as many child processes as it takes (at most `MAX_RESTARTS` more than one).

    `hand_over` puts the decoder into the directory; it and then `meanwhile` run once, while the first child imports.
    `known` is what failed or killed a child, by attempt; `stage` the last one that a child spoke of.
    """

    directory: Path
    spec: BuildSpec
    out_dir: Path
    deadline: float
    progress: Callable[[Event], None] | None = None
    device: str = ""
    bootstrap: str = BOOTSTRAP
    hand_over: Callable[[], None] | None = None
    meanwhile: Callable[[], None] | None = None
    known: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    stage: str = ""

    def run(self) -> dict[str, Any]:
        """The report of the child that finished. Raises FastPathError."""
        while True:
            outcome = self._one_child()
            if outcome["event"] == "done":
                return outcome["report"]
            if outcome["event"] == "failed":
                failure = FastPathError(outcome["stage"], outcome["reason"], outcome["remedy"])
                if failure.stage == "import":
                    importer.remember(failure)
                raise failure
            _LOG.info("the building process died: %s", outcome["reason"])
            if self.restarts >= MAX_RESTARTS or not outcome["open"]:
                raise FastPathError(
                    "build", outcome["reason"], "decoding continues with PyTorch; try another precision or plan"
                )
            self.known[outcome["open"]] = outcome["reason"]
            self.restarts += 1

    def _one_child(self) -> Event:
        job = {
            "spec": self.spec.to_json(),
            "device": self.device or f"cuda:{self.spec.device_index}",
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
        try:
            self._start(process)
            last, open_key = self._listen(read_fd)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: nothing else is in it
            raise
        finally:
            os.close(read_fd)
            finished = self._reap(process)
        if last is not None and last["event"] in ("done", "failed"):
            return last
        reason = explain_exit(finished, self.spec.timeout_seconds, last)
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
            except Exception:
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
    """How a building process ended, in words: timeout, a CUDA context beyond repair, a signal by name, or an exit
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
        return f"the building process ended with {name}" + (f" ({meaning[name]})" if name in meaning else "")
    return f"the building process ended with exit status {status} and no answer"
