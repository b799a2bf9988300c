"""Measures `owl-wms decode-dataset` on one and on all visible GPUs, with local workers and with a launcher's ranks.

Every run decodes the same items to `.npy` on a RAM disk. The outputs of all runs must have the same hashes, and those
of the first item must be the bytes of `owl-wms decode`; otherwise the exit status is 1. The rate of a run is that of
its steady part, from the first finished item to the last; `whole` counts from the start of the command.

Usage:
    python -m benchmarks.dataset --out dataset.json        # about three minutes on two GPUs; writes dataset.md too
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.decoders import VAE_CONFIGS, subject
from benchmarks.harness import commit, require_gpu
from owl_wms.media.arrays import save_array

CONFIG = VAE_CONFIGS / "dec_dist.yml"
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def make_inputs(folder: Path, items: int, frames: int) -> list[str]:
    """Writes the decoder and the latents; returns the options that name the decoder."""
    of = subject("dist")
    save_file({name: value.contiguous() for name, value in of.make().state_dict().items()}, folder / "dec.safetensors")
    generator = torch.Generator().manual_seed(0)
    for number in range(items):
        latents = torch.randn(frames, *of.latent_shape, generator=generator).bfloat16()
        save_array(folder / "in" / f"{number:04}.pt", latents)
    save_array(folder / "long.pt", torch.randn(frames * 20, *of.latent_shape, generator=generator).bfloat16())
    return ["--vae-config", str(CONFIG), "--checkpoint", str(folder / "dec.safetensors")]


def command(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Starts `owl-wms`."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    full = [sys.executable, "-m", "owl_wms", *words]
    return subprocess.Popen(full, env={**inherited, **variables}, stderr=subprocess.PIPE, text=True)


def ended(*processes: subprocess.Popen[str]) -> str:
    """Waits for commands, and returns what they said."""
    said = [process.communicate()[1] for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise SystemExit(f"{' '.join(process.args[2:5])} ended with status {process.returncode}:\n{text[-3000:]}")  # type: ignore[index]
    return "\n".join(said)


def decode_rate(folder: Path, decoder: list[str]) -> float:
    """Returns the frames per second of `owl-wms decode` for one long file, from its second run."""
    rate = 0.0
    for _ in range(2):  # the first builds the program
        out = folder / "long.npy"
        said = ended(command("decode", str(folder / "long.pt"), *decoder, "--out", str(out), "--overwrite"))
        found = re.search(r"frames, ([\d.]+) frames/s", said)
        assert found is not None, said
        rate = float(found[1])
        out.unlink()
    return rate


def measure(name: str, folder: Path, decoder: list[str], gpus: int, ranks: bool) -> dict[str, Any]:
    """Decodes all items once; returns rates, what idled, and the hashes of the outputs."""
    out = folder / "out"
    words = ["decode-dataset", str(folder / "in"), "--out", str(out), *decoder]
    began = time.time()
    if ranks:
        places = [dict(zip(RANK_NAMES, (str(n), str(gpus), str(n)), strict=True)) for n in range(gpus)]
        ended(*[command(*words, "--engine", "ranks", **place) for place in places])
    else:
        ended(command(*words, "--engine", "local", "--gpus", str(gpus)))
    whole = time.time() - began
    (generation,) = out.iterdir()
    text = "".join(part.read_text() for part in (generation / "_ledger/parts").iterdir())
    lines = (json.loads(line) for line in text.splitlines())
    done = sorted((line for line in lines if line["event"] == "done"), key=lambda line: line["at"])
    frames, span = sum(line["frames"] for line in done[1:]), done[-1]["at"] - done[0]["at"]
    busy = statistics.median(line["seconds"] for line in done) * (len(done) - 1) / (span * gpus)
    hashes = {output["name"]: output["sha256"] for line in done for output in line["outputs"]}
    first = (generation / sorted(hashes)[0]).read_bytes()
    shutil.rmtree(out)
    row = {"engine": name, "gpus": gpus, "rate": frames / span, "whole_s": whole, "idle": max(0.0, 1 - busy)}
    return {**row, "frames": frames, "hashes": hashes, "first": first}


def table(rows: list[dict[str, Any]], base: float) -> str:
    """Returns the runs as Markdown."""
    one = next(row["rate"] for row in rows if row["gpus"] == 1)
    lines = ["| engine | GPUs | frames/s | of `decode` | times one GPU | workers idle | whole run |", "|---" * 7 + "|"]
    for row in rows:
        shares = f"{row['rate'] / base / row['gpus']:.0%} | {row['rate'] / one:.2f} | {row['idle']:.0%}"
        lines.append(f"| {row['engine']} | {row['gpus']} | {row['rate']:.0f} | {shares} | {row['whole_s']:.1f} s |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--frames", type=int, default=240, help="frames of each item")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="on a RAM disk, for inputs and outputs")
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it as .md")
    arguments = parser.parse_args()
    require_gpu(parser)
    needed = (arguments.items + 20) * arguments.frames * 360 * 640 * 4
    if shutil.disk_usage(arguments.folder).free < needed:
        parser.error(f"--folder {arguments.folder} needs {needed >> 30} GiB free; name another, or take fewer --frames")
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        decoder = make_inputs(folder, arguments.items, arguments.frames)
        base = decode_rate(folder, decoder)
        rows = [measure("local", folder, decoder, 1, False)]
        if gpus > 1:
            rows += [measure("local", folder, decoder, gpus, False), measure("ranks", folder, decoder, gpus, True)]
        ended(command("decode", str(folder / "in/0000.pt"), *decoder, "--out", str(folder / "one.npy")))
        equal_to_decode = (folder / "one.npy").read_bytes() == rows[0]["first"]
    alike = all(row["hashes"] == rows[0]["hashes"] for row in rows)
    for row in rows:
        del row["hashes"], row["first"]
    card, title = torch.cuda.get_device_name(), f"{arguments.items} items of {arguments.frames} frames, decoder `dist`"
    text = f"{title}, npy, {gpus} x {card}, commit {commit()}; `owl-wms decode`: {base:.0f} frames/s\n\n"
    text += table(rows, base) + "\n"
    text += f"\nsame outputs in all runs: {alike}; same bytes as `owl-wms decode`: {equal_to_decode}\n"
    print(text)
    if arguments.out is not None:
        facts = {"commit": commit(), "gpu": card, "gpus": gpus, "decode": base, "rows": rows, "alike": alike}
        arguments.out.write_text(json.dumps({**facts, "equal_to_decode": equal_to_decode}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)
    sys.exit(not (alike and equal_to_decode))


if __name__ == "__main__":
    main()
