"""Renders new worlds in a process of its own while the model trains, on another GPU if there is one.

The process writes rounds of episodes as files. `Renderer`, called between the steps of the training, moves finished
rounds into the training's episodes, in place. Whatever becomes of the process, the training goes on: with what it has,
and one line that says why. With a device of its own it also plays the held-out worlds of the measures (`Truth`).

Usage:
    renderer = Renderer(order, say)     # starts the process
    renderer.data = data
    trainer = ClockTrainer(cfg, data, out, say, fresh=renderer)
    renderer.close()

    python examples/world/rendering.py ORDER.json       # the process
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from episodes import Episodes, record
from holding import Truth
from quick import Forms, quicker_forms
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import make_codec

from owl_wms.configs.world import load_world_config, with_files_found

LOOK_SECONDS = 0.5  # between looks for finished rounds
LATE_SECONDS = 240.0  # without a round, after which a line says so
WAITING = 6  # finished rounds that may lie in the folder before the process waits
TRUTH_AFTER = 4  # rounds
ROUND_BYTES = 16 * 2**30  # free space in memory from which on rounds are written there and not to disk


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What the process makes.

    Attributes:
        config: file of a world model's configuration, which names the autoencoder.
        device: where it renders.
        share: of the time in which it works; below 1 it leaves the rest to others on the same device.
        players, frames: of a round.
        first_seed: of the first world; every round takes the next `players` seeds.
        height, width: of rendered frames.
        truth_worlds, truth_frames: of the measures, see `Truth.play`; 0 worlds leave them out.
    """

    config: str
    device: str
    share: float
    players: int
    frames: int
    first_seed: int
    height: int
    width: int
    truth_worlds: int
    truth_frames: int


class Renderer:
    """The process, and what it has finished.

    Attributes:
        data: where episodes go; None until there is such a place.
        share: of the time in which the process works.
        rounds: taken over so far.
        dropped: rounds that could not be used.
    """

    def __init__(self, order: Order, say: Callable[[str], None]) -> None:
        """Start the process; its lines for the reader go to `say`."""
        self.data: Episodes | None = None
        self._say, self.share = say, order.share
        self.rounds, self.dropped = 0, 0
        self._look_at, self._last, self._ended, self._late = 0.0, time.monotonic(), False, False
        memory = Path("/dev/shm")
        roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROUND_BYTES
        self.folder = Path(tempfile.mkdtemp(prefix="owl-wms-worlds-", dir=memory if roomy else None))
        (self.folder / "order.json").write_text(json.dumps(asdict(order)))
        with (self.folder / "rendering.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder / "order.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __call__(self) -> None:
        """Take finished rounds; never raises, and returns at once where there are none."""
        now = time.monotonic()
        if now < self._look_at or self.data is None:
            return
        self._look_at = now + LOOK_SECONDS
        try:
            self._take(self.data)
            self._watch(self.data, now)
        except Exception as error:  # the training must not end because of its renderer
            self._say(f"new worlds: {type(error).__name__}: {str(error)[:300]}")
            self._look_at = float("inf")

    def _take(self, data: Episodes) -> None:
        for path in sorted(self.folder.glob("round_*.safetensors")):
            try:
                part = Episodes(**load_file(path, device=str(data.latents.device)))
                known, new = (x.latents[:16].float().std().item() for x in (data, part))
                if not known / 2 < new < 2 * known or not part.latents.isfinite().all():
                    raise ValueError(f"latents have a spread of {new:.3g}, those before {known:.3g}")
                data.add(part)
                self.rounds += 1
            except Exception as error:  # a round is lost, not the run
                self.dropped += 1
                self._say(f"{path.name} is left out: {type(error).__name__}: {str(error)[:200]}")
            path.unlink()
            self._last, self._late = time.monotonic(), False

    def _watch(self, data: Episodes, now: float) -> None:
        status = self.process.poll()
        if status is not None and not self._ended:
            self._ended = True
            self._say(
                f"no new worlds any more, as their process ended with status {status}; its last line: {self._words()}"
            )
        elif not self._ended and not self._late and now - self._last > LATE_SECONDS:
            self._late = True
            self._say(f"no new worlds for {LATE_SECONDS:.0f} s; training goes on with {len(data)}")

    def _words(self) -> str:
        """Last line that the process wrote."""
        lines = (self.folder / "rendering.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it wrote nothing"

    def truth(self, device: torch.device) -> Truth | None:
        """Returns the measures' held-out worlds, if the process has played them."""
        path = self.folder / "truth.safetensors"
        try:
            return Truth.read(path, device) if path.exists() else None
        except Exception as error:  # they can be played again
            self._say(f"held-out worlds cannot be read: {type(error).__name__}: {str(error)[:200]}")
            return None

    def stop(self) -> None:
        """End the process; what it has finished stays."""
        self.process.kill()
        self.process.wait()

    def close(self, log: Path | None = None) -> None:
        """End the process and delete its folder; its log is moved to `log`."""
        self.stop()
        if log is not None:
            shutil.copyfile(self.folder / "rendering.log", log)
        shutil.rmtree(self.folder, ignore_errors=True)


# The process.


def say(text: str) -> None:
    """One line of the process's log."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def finish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under another name; it gets its own when it is whole."""
    draft = path.with_name(f".{path.name}")
    try:
        write(draft)
        draft.rename(path)
    except OSError as error:  # a full disk: later ones may fit again
        say(f"{path.name} was not written: {error}")
        draft.unlink(missing_ok=True)


def leave_the_rest(share: float, parent: int, device: torch.device) -> Callable[[], None]:
    """Returns a function to call often: it rests for `1 - share` of the time, and ends the process with its parent."""
    worked = time.monotonic()

    def rest() -> None:
        nonlocal worked
        if os.getppid() != parent:
            raise SystemExit("the training has ended")
        if share < 1:
            if device.type == "cuda":
                torch.cuda.synchronize()
            time.sleep((time.monotonic() - worked) * (1 / share - 1))
            worked = time.monotonic()

    return rest


@torch.no_grad()
def work(order: Order, folder: Path) -> None:
    """Render rounds until the process is ended."""
    device = torch.device(order.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = Path(order.config)
    plain, decode = make_codec(with_files_found(load_world_config(config), config), device)
    size = (order.height, order.width)
    forms = Forms(encode=plain)
    if device.type == "cuda":
        # Where the GPU is shared, the training's process has compiled the same before: this takes seconds then.
        forms = quicker_forms(plain, players=order.players, seed=order.first_seed, size=size, device=device, say=say)
    rest = leave_the_rest(order.share, os.getppid(), device)  # now, as nobody is to rest for the time of compiling

    def rested(frames: Tensor) -> Tensor:
        rest()
        return plain(frames)

    kinds: dict[str, Any] = {"encode": forms.encode, "draw": forms.draw, "advance": forms.advance}
    number = 0
    while True:
        begun = time.monotonic()
        seed = order.first_seed + number * order.players
        settings: dict[str, Any] = {"players": order.players, "frames": order.frames, "size": size, "device": device}
        part = record(first_seed=seed, after_frame=rest, **kinds, **settings)
        tensors = {name: getattr(part, name).cpu().contiguous() for name in ("latents", "mouse", "buttons")}
        finish(folder / f"round_{number:05d}.safetensors", lambda path, tensors=tensors: save_file(tensors, path))
        number += 1
        say(f"round {number}: {order.players * order.frames} frames in {time.monotonic() - begun:.1f} s")
        if number == TRUTH_AFTER and order.truth_worlds:
            begun = time.monotonic()
            count: dict[str, Any] = {"worlds": order.truth_worlds, "frames": order.truth_frames, "size": size}
            truth = Truth.play(encode=rested, decode=decode, device=device, **count)
            finish(folder / "truth.safetensors", truth.write)
            say(f"played the held-out worlds in {time.monotonic() - begun:.1f} s")
        while len(list(folder.glob("round_*.safetensors"))) >= WAITING:
            rest()
            time.sleep(0.2)


def main() -> None:
    """Do what the order's file says; the folder goes with the training."""
    path = Path(sys.argv[1])
    torch.backends.cuda.matmul.allow_tf32 = True  # as in the training's process, whose compiled code serves here too
    try:
        work(Order(**json.loads(path.read_text())), path.parent)
    except SystemExit:
        with contextlib.suppress(OSError):
            shutil.rmtree(path.parent)
        raise


STARTED = time.monotonic()

if __name__ == "__main__":
    main()
