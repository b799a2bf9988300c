"""The build process: reads a job, builds, and reports to its parent line by line.

Why a process: a new engine may cause a segmentation fault on its first run, hang, or leave the CUDA context unusable.
None of that may reach the caller.

Trust: the decoder arrives as a `torch.save` file, which is a pickle. That is safe here and only here: the parent wrote
it a moment ago into a directory of mode 0700 that it had just created, and the child is its own.

Messages, one JSON object per line on the file descriptor given as the second argument:
    {"event": "stage", "stage": "compile", "elapsed": 3.2, ...}
    {"event": "attempt", "key": "build|tensorrt|bf16|"}     then     {"event": "outcome", "key": ..., "reason": ""},
        others possibly between
    {"event": "done", "report": {...}}     or     {"event": "failed", "stage": ..., "reason": ..., "remedy": ...}

Usage (by `parent.py` alone): python -c <bootstrap> JOB_DIRECTORY FD
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from owl_wms.errors import FastPathError
from owl_wms.request import Request
from owl_wms.timing import Stages

BROKEN_CONTEXT_EXIT = 70
JOB_NAME = "job.json"
DECODER_NAME = "decoder.pt"
IMPORTABLE = (
    "define the decoder's class, and each function that it holds, in an importable module, and keep open handles and "
    "lambdas out of it"
)
"""The remedy where the build process cannot have a decoder."""
GO = b"g"
"""The parent writes this to the standard input once the decoder is in the directory. If it closes that without, there
will be no decoder.
"""


class PipeJournal:
    """A worker's journal that writes to the parent's pipe and remembers what earlier processes found out."""

    def __init__(self, fd: int, known: dict[str, str]) -> None:
        self.fd = fd
        self.known = known
        self.begin = time.monotonic()
        self.stages = Stages()

    def send(self, **message: Any) -> None:
        """Write one message; a parent that went away is not an error of the build."""
        try:
            os.write(self.fd, (json.dumps(message) + "\n").encode())
        except OSError:
            sys.exit(1)

    def stage(self, name: str, **details: Any) -> None:
        if name != "tensorrt":  # a step of "compile"
            self.stages.begin(f"{name} {details['plan']}" if "plan" in details else name)
        self.send(event="stage", stage=name, elapsed=round(time.monotonic() - self.begin, 3), **details)

    def attempt(self, key: str) -> str | None:
        # Only failures are remembered as answers: what worked in a dead process has to be built again.
        if key in self.known:
            return self.known[key] or None
        self.send(event="attempt", key=key)
        return None

    def outcome(self, key: str, reason: str) -> None:
        self.send(event="outcome", key=key, reason=reason)


def run(directory: Path, journal: PipeJournal, job: dict[str, Any]) -> None:
    """Do the job in `directory`; the last message sent is "done" or "failed".

    The decoder that arrived must have the recording that is in the key. Classes are imported here anew, so one that was
    altered in the caller's process only would be built unaltered, and its program served under the altered one's key.
    """
    import torch

    from owl_wms.trt import plans
    from owl_wms.trt.build.attempts import BrokenContext
    from owl_wms.trt.build.worker import Worker
    from owl_wms.trt.graph.recording import Recording
    from owl_wms.trt.graph.shapes import fp32_copy
    from owl_wms.trt.library import importer
    from owl_wms.trt.run.load import register_operators

    try:
        request = Request.from_json(job["request"])
        journal.stage("import")
        device = torch.device(request.device)
        context = threading.Thread(target=_make_context, args=(device.index or 0,), daemon=True)
        if device.type == "cuda":
            context.start()
        missing = importer.missing()
        if missing is not None and not plans.without_library(request):
            raise missing
        register_operators()
        # What was imported stays for good; collecting after every attempt need not look at it again and again.
        gc.freeze()
        gc.enable()
        if device.type == "cuda":
            context.join()
            torch.cuda.set_device(device)
        if sys.stdin.buffer.read(len(GO)) != GO:
            return  # the caller gave up
        journal.stage("decoder")
        decoder = read_decoder(directory / DECODER_NAME)
        recording = Recording.of(decoder, request.input_shape, request.state)
        if recording.digest() != job["graph"]:
            raise _another(decoder)
        worker = Worker(fp32_copy(decoder, device), recording, request, journal, missing)
        del decoder
        report = worker.build(Path(job["out_dir"]))
        journal.send(event="done", report={**report, "stages": journal.stages.end()})
    except FastPathError as error:
        journal.send(event="failed", stage=error.stage, reason=error.reason, remedy=error.remedy)
    except BrokenContext as error:
        journal.send(event="broken", reason=str(error))
        os._exit(BROKEN_CONTEXT_EXIT)  # interpreter shutdown would touch the broken context again
    except Exception as error:
        journal.send(event="failed", stage="build", reason=f"{type(error).__name__}: {error}"[:600], remedy="")


def read_decoder(path: Path) -> Any:
    """Returns the decoder that the parent wrote.

    Raises:
        FastPathError: it holds something of a module that is not here, a hook of the script that runs, for example.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except (AttributeError, ImportError) as error:
        reason = f"the decoder cannot be read in the build process: {type(error).__name__}: {error}"
        raise FastPathError("export", reason, IMPORTABLE) from error


def _another(decoder: Any) -> FastPathError:
    name = type(decoder).__name__
    return FastPathError(
        "export",
        f"{name} computes something else in the build process than in the process that asked for it",
        "make changes to a class where it is defined, or in a subclass in an importable module; "
        "let the forward depend on nothing outside of the decoder",
    )


def _make_context(index: int) -> None:
    """Make the device's context, which takes a second on a large machine, beside the imports, which take three.

    Through the driver alone: torch would import modules in this thread that the other one is importing. Torch uses the
    context that it finds. If making it fails, torch meets the same failure later and raises it.
    """
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), index):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def main(arguments: list[str]) -> int:
    """`JOB_DIRECTORY FD`; returns 0 once a final message was sent."""
    # Compilers warn by the page; what the parent quotes of the output should be the last words, not those.
    warnings.simplefilter("ignore")
    directory, fd = Path(arguments[0]), int(arguments[1])
    job = json.loads((directory / JOB_NAME).read_text(encoding="utf-8"))
    run(directory, PipeJournal(fd, job["known"]), job)
    return 0
