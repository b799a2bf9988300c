"""Fork after load: the child answers with PyTorch on the CPU, or says why it cannot; no parent's lock hangs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl_wms.errors import FastPathError
from owl_wms.runtime import VideoDecode
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings

# In a process of its own: the test runner's threads are no business of a forked child.
SCRIPT = """
import os, sys, threading, time, torch
from pathlib import Path
from owl_wms.runtime import VideoDecode
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings
torch.manual_seed(0)
torch.set_num_threads(2)
decoder = TinyDecoder().bfloat16().eval()
decode = VideoDecode(decoder, batch_size=4, settings=settings(Path(sys.argv[1])), toolchain=ExportToolchain())
truth = VideoDecode(decoder, batch_size=4, settings=settings(Path(sys.argv[1]), enabled=False))
latents = torch.randn(1, 6, 4, 16, 16)
expected = truth(latents)
assert decode(latents).shape == expected.shape and decode.stats().backend == "export"
slot = next(iter(decode._generation.slots()))
held = threading.Event()
def hold():
    with slot.lock, decode._guard, decode._generation._guard:
        held.set(); time.sleep(2)
threading.Thread(target=hold, daemon=True).start(); held.wait()
child = os.fork()
if child == 0:
    same = torch.equal(decode(latents), expected)
    state = decode.stats()
    os._exit(0 if same and state.backend == "pytorch" and "forked" in state.reason else 3)
deadline = time.time() + 30
while time.time() < deadline:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        print("child", os.waitstatus_to_exitcode(status)); break
    time.sleep(0.05)
else:
    os.kill(child, 9); print("child hung")
time.sleep(0)
assert VideoDecode.__call__(decode, latents).shape == expected.shape
print("parent", decode.stats().backend)
"""


def test_child_decodes_with_pytorch_although_locks_were_held(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines() == ["child 0", "parent export"], ran.stdout + ran.stderr


# What a TensorRT engine does when it is destroyed in a process that has no GPU.
ABORTING = """
import gc, os, sys, torch
from pathlib import Path
from owl_wms.runtime import VideoDecode
from tests.runtime.toolchains import ExportToolchain, TinyDecoder, settings
parent = os.getpid()
class Engine:
    def __init__(self, inner): self.inner = inner
    def __call__(self, z): return self.inner(z)
    def __del__(self):
        if os.getpid() != parent: os.abort()
class Toolchain(ExportToolchain):
    def load(self, *arguments): return Engine(super().load(*arguments))
def make():
    decode = VideoDecode(TinyDecoder(), batch_size=4, settings=settings(Path(sys.argv[1])), toolchain=Toolchain())
    decode.prepare((4, 3, 3))
    assert decode.stats().backend == "export"
    return decode
gc.disable()
dropped = make(); dropped.itself = dropped; del dropped    # garbage that nobody has collected yet
decode = make()
child = os.fork()
if child == 0:
    decode.prepare((4, 3, 3)); del decode; gc.collect(); os._exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from torch.utils.data import DataLoader
print("workers", sum(len(batch) for batch in DataLoader(range(8), num_workers=2)))
"""


def test_no_child_destroys_an_engine_of_its_parent(tmp_path: Path) -> None:
    """A trainer that had decoded lost its data loader's workers to this."""
    command = [sys.executable, "-W", "ignore", "-c", ABORTING, str(tmp_path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines() == ["child 0", "workers 8"], ran.stdout + ran.stderr


@pytest.mark.gpu
def test_child_of_a_gpu_process_says_why_it_cannot(tmp_path: Path) -> None:
    decode = VideoDecode(TinyDecoder().cuda(), batch_size=2, settings=settings(tmp_path, enabled=False))
    latents = torch.randn(1, 2, 4, 3, 3)
    decode(latents)
    child = os.fork()
    if child == 0:
        try:
            decode(latents)
        except FastPathError as error:
            os._exit(0 if "spawn" in error.remedy else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert decode(latents).shape == (1, 2, 3, 6, 6)


def test_toolchain_of_the_parent_is_not_touched_by_reset(tmp_path: Path) -> None:
    decode = VideoDecode(TinyDecoder(), batch_size=2, settings=settings(tmp_path), toolchain=ExportToolchain())
    decode.prepare((4, 3, 3))
    decode._reset_in_child()
    assert decode.stats().programs == ()
    assert decode.prepare((4, 3, 3)).backend == "pytorch"
