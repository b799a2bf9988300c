"""Makes the pictures of README and the documentation that show frames: the demo's sheet, and a clip of the play page.

The clip is the page of `owl-wms play --game --vae` in headless Chromium. The game's own script plays: its decisions go
to the page's handlers of keys and mouse, and from there the way of a player's. Frames are made one by one: each is
shown and captured before the next is made, so that a slow machine gives the same clip. The page's figures of speed
would be those of the capture, so they are hidden.

Usage: python -m benchmarks.pictures     # writes demo.webp and play.webp to docs/pictures; minutes on a CPU
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from owl_wms.configs.paths import DEMO_VAE
from owl_wms.game.buttons import BUTTONS
from owl_wms.game.controls import ScriptedPlayer
from owl_wms.game.world import FRAMES_PER_SECOND
from owl_wms.inference.source import Frame, GameSource
from owl_wms.utils.owl_vae_bridge import get_decoder_only, make_batched_decode_fn
from owl_wms.vae import fold_weight_norm, load_encoder
from tests.inference.chromium import Page, click_to_play, open_page
from tests.inference.serving import TOKEN, serve

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
REPEAT = 4  # game frames per picture: 15 pictures per second
PICTURES = 67  # after them it stands before a wall
SEED = 45  # among the first 64 one of the worlds whose play shows most, see owl_wms/game/views.py
PAGE = {"width": 830, "height": 590}  # pixels; README is about as wide


class OneByOne(GameSource):
    """The game through the demo's autoencoder, a frame when it is told to, and a script that knows its next move."""

    def __init__(self) -> None:
        encoder = fold_weight_norm(load_encoder(None, *DEMO_VAE)).requires_grad_(False)
        decoder = get_decoder_only(None, *DEMO_VAE, dtype=torch.float32)
        encoder, decoder = (net.to(memory_format=torch.channels_last) for net in (encoder, decoder))
        super().__init__(SEED, repeat=REPEAT, encode=encoder, decode=make_batched_decode_fn(decoder, 1))
        self._script, self._may = ScriptedPlayer(self._world), threading.Semaphore(0)

    def __call__(self, mouse: Tensor, buttons: Tensor) -> Frame:
        self._may.acquire(timeout=60)
        return super().__call__(mouse, buttons)

    def go_on(self) -> None:
        """Lets one frame be made."""
        self._may.release()

    def wish(self) -> tuple[list[float], list[str]]:
        """Returns the script's mouse movement and held buttons for the next picture."""
        for _ in range(REPEAT):  # it is written for 60 decisions per second
            mouse, buttons = self._script.controls()
        held = [name for name, down in zip(BUTTONS, buttons[0].tolist(), strict=True) if down]
        return mouse[0].tolist(), held


async def photograph(page: Page, source: OneByOne) -> list[Image.Image]:
    """Plays, and returns one picture of the whole page for each frame."""
    await page.ask("Emulation.setDeviceMetricsOverride", **PAGE, deviceScaleFactor=1, mobile=False)
    await page.value("document.querySelector('.numbers').style.display = 'none', 0")
    source.go_on()
    await click_to_play(page)
    pictures = []
    for number in range(1, PICTURES + 1):
        await page.until(f"Number(document.body.dataset.frames) >= {number}", seconds=120)
        shot = await page.ask("Page.captureScreenshot", format="png")
        pictures.append(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))
        (x, y), held = source.wish()
        await page.value(
            f"look({x}, {y}), {json.dumps(BUTTONS)}.forEach(name => hold(name, {json.dumps(held)}.includes(name))),"
            "sendInput(true), 0"
        )
        source.go_on()
    source.go_on()  # the last one that the server has begun
    return pictures


async def play(path: Path) -> None:
    """Writes the clip of the page."""
    source = OneByOne()
    async with serve(source) as (_, address, _), open_page(f"{address}/{TOKEN}/") as page:
        pictures = await photograph(page, source)
    save_clip(pictures, path)


def save_clip(pictures: list[Image.Image], path: Path) -> None:
    """Writes an animated WebP that repeats for ever, at the game's own speed."""
    milliseconds = round(1000 * REPEAT / FRAMES_PER_SECOND)
    options: dict[str, Any] = {"duration": milliseconds, "loop": 0, "quality": 84, "method": 4}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)


def demo(path: Path) -> None:
    """Writes the sheet of `owl-wms demo`, which is lossless and large, in a small form."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "owl_wms", "demo", "--out", folder], check=True)
        with Image.open(Path(folder) / "sheet.png") as sheet:
            sheet.save(path, quality=90, method=6)


def main() -> None:
    """Parses arguments and makes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder; made if it is not there")
    parser.add_argument("--only", choices=("demo", "play"), help="one of the two")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "play":
        demo(args.out / "demo.webp")
    if args.only != "demo":
        asyncio.run(play(args.out / "play.webp"))


if __name__ == "__main__":
    main()
