"""Measures `owl-wms decode-dataset` on one or more GPUs: local workers, a launcher's ranks, Ray; npy and mp4.

Every run decodes the same items on a RAM disk. The npy outputs of all runs must have the same hashes, and those of the
first item must be the bytes of `owl-wms decode`; otherwise the exit status is 1. The rate of a run is that of its
steady part, from the first finished item to the last; `whole` counts from the start of the command. `idle` is the
share of that time in which a worker computes no item, `CPU` the cores that all processes together keep busy, and
`memory` the most that they hold at once.

Usage:
    python -m benchmarks.dataset --out dataset.json        # about three minutes on two GPUs; writes dataset.md too
    python -m benchmarks.dataset --engines local,ranks,ray --forms npy,mp4 --gpus 1,2,4,8 --out scaling.json
    python -m benchmarks.dataset --toy                     # a minute on a CPU: shows that everything runs
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.decoders import VAE_CONFIGS, subject
from benchmarks.harness import commit, require_gpu
from owl_wms.media.arrays import save_array

ROOT = Path(__file__).parents[1]
TOY = ROOT / "examples/demo/demo_vae"
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ENGINES, FORMS = ("local", "ranks", "ray"), ("npy", "mp4")


def make_inputs(folder: Path, items: int, frames: int, long: int, toy: bool) -> list[str]:
    """Writes the decoder and the latents; returns the options that name the decoder."""
    if toy:
        config, checkpoint, shape = f"{TOY}.yml", f"{TOY}.safetensors", (128, 8, 8)
    else:
        of = subject("dist")
        config, checkpoint, shape = str(VAE_CONFIGS / "dec_dist.yml"), str(folder / "dec.safetensors"), of.latent_shape
        save_file({name: value.contiguous() for name, value in of.make().state_dict().items()}, checkpoint)
    generator = torch.Generator().manual_seed(0)
    for number in range(items):
        save_array(folder / "in" / f"{number:04}.pt", torch.randn(frames, *shape, generator=generator).bfloat16())
    save_array(folder / "long.pt", torch.randn(long, *shape, generator=generator).bfloat16())
    return ["--vae-config", config, "--checkpoint", checkpoint]


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


class Load:
    """Cores that this process and its descendants keep busy, and the most memory that they hold, sampled."""

    def __init__(self) -> None:
        self.memory, self._seconds, self._began = 0, dict[int, float](), time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.cores = sum(self._seconds.values()) / (time.monotonic() - self._began)

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            memory = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                    self._seconds[process.pid] = times.user + times.system
                    memory += process.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            self.memory = max(self.memory, memory)


def measure(engine: str, form: str, folder: Path, decoder: list[str], workers: int, toy: bool) -> dict[str, Any]:
    """Decodes all items once; returns rates, what idled, and the hashes of the outputs."""
    out = folder / "out"
    words = ["decode-dataset", str(folder / "in"), "--out", str(out), *decoder, "--format", form, "--engine", engine]
    began = time.time()
    with Load() as load:
        if engine == "ranks":
            places = [dict(zip(RANK_NAMES, (str(n), str(workers), str(n)), strict=True)) for n in range(workers)]
            ended(*[command(*words, **place) for place in places])
        else:
            ended(command(*words, "--workers" if toy else "--gpus", str(workers), PYTHONPATH=str(ROOT)))
    whole = time.time() - began
    (generation,) = out.iterdir()
    text = "".join(part.read_text() for part in (generation / "_ledger/parts").iterdir())
    lines = (json.loads(line) for line in text.splitlines())
    done = sorted((line for line in lines if line["event"] == "done"), key=lambda line: line["at"])
    frames, span = sum(line["frames"] for line in done[1:]), max(done[-1]["at"] - done[0]["at"], 1e-3)
    busy = statistics.median(line["seconds"] for line in done) * (len(done) - 1) / (span * workers)
    hashes = {output["name"]: output["sha256"] for line in done for output in line["outputs"]}
    first = (generation / sorted(hashes)[0]).read_bytes()
    shutil.rmtree(out)
    row = {"engine": engine, "form": form, "gpus": workers, "rate": frames / span, "whole_s": whole}
    row |= {"idle": max(0.0, 1 - busy), "cores": load.cores, "memory_gib": load.memory / (1 << 30), "frames": frames}
    return {**row, "hashes": hashes, "first": first}


def table(rows: list[dict[str, Any]], base: float) -> str:
    """Returns the runs as Markdown; times and efficiency are against the first run of the same form."""
    heads = "engine | form | GPUs | frames/s | of `decode` | times | efficiency | idle | CPU | memory | whole run"
    lines = [f"| {heads} |", "|---" * 11 + "|"]
    for row in rows:
        first = next(other for other in rows if other["form"] == row["form"])
        times = row["rate"] / first["rate"] * first["gpus"]
        share = f"{row['rate'] / base / row['gpus']:.0%}" if row["form"] == "npy" else ""
        cells = (row["engine"], row["form"], row["gpus"], f"{row['rate']:.0f}", share, f"{times:.2f}",
                 f"{times / row['gpus']:.0%}", f"{row['idle']:.0%}", f"{row['cores']:.1f} cores",
                 f"{row['memory_gib']:.1f} GiB", f"{row['whole_s']:.1f} s")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int)
    parser.add_argument("--frames", type=int, help="frames of each item")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["local", "ranks"])
    parser.add_argument("--forms", type=lambda text: text.split(","), default=["npy"])
    parser.add_argument("--gpus", type=lambda text: [int(n) for n in text.split(",")], help="1 and all by default")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="on a RAM disk, for inputs and outputs")
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it as .md")
    parser.add_argument("--toy", action="store_true", help="the demo's decoder and a few frames, on CPUs")
    arguments = parser.parse_args()
    if not arguments.toy:
        require_gpu(parser)
    if not set(arguments.engines) <= set(ENGINES) or not set(arguments.forms) <= set(FORMS):
        parser.error(f"--engines are of {', '.join(ENGINES)} and --forms of {', '.join(FORMS)}")
    items = arguments.items or (4 if arguments.toy else 200)
    length = arguments.frames or (1 if arguments.toy else 240)
    long = 2 if arguments.toy else length * 20  # frames of the file that `owl-wms decode` is timed with
    needed = (items * length + long) * 360 * 640 * 4
    if shutil.disk_usage(arguments.folder).free < needed:
        parser.error(f"--folder {arguments.folder} needs {needed >> 30} GiB free; name another, or take fewer --frames")
    seen = 2 if arguments.toy else torch.cuda.device_count()
    gpus = sorted({n for n in arguments.gpus or (1, seen) if n <= seen})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        decoder = make_inputs(folder, items, length, long, arguments.toy)
        base = decode_rate(folder, decoder)
        rows = []
        for form, engine in itertools.product(arguments.forms, arguments.engines):
            for count in gpus:
                rows.append(measure(engine, form, folder, decoder, count, arguments.toy))
                print(table(rows, base).splitlines()[-1], flush=True)
        ended(command("decode", str(folder / "in/0000.pt"), *decoder, "--out", str(folder / "one.npy")))
        written = (folder / "one.npy").read_bytes()
    arrays = [row for row in rows if row["form"] == "npy"]
    equal_to_decode = all(row["first"] == written for row in arrays[:1])
    alike = all(row["hashes"] == arrays[0]["hashes"] for row in arrays)
    for row in rows:
        del row["hashes"], row["first"]
    card = "CPU (toy: no figure)" if arguments.toy else torch.cuda.get_device_name()
    title = (
        f"{items} items of {length} frames, decoder `{'demo' if arguments.toy else 'dist'}`, up to {gpus[-1]} x {card}"
    )
    text = f"{title}, commit {commit()}; `owl-wms decode`: {base:.0f} frames/s\n\n"
    text += table(rows, base) + "\n"
    text += f"\nsame outputs in all runs: {alike}; same bytes as `owl-wms decode`: {equal_to_decode}\n"
    print(text)
    if arguments.out is not None:
        facts = {
            "commit": commit(),
            "gpu": card,
            "items": items,
            "length": length,
            "decode": base,
            "rows": rows,
            "alike": alike,
        }
        arguments.out.write_text(json.dumps({**facts, "equal_to_decode": equal_to_decode}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(text)
    sys.exit(not (alike and equal_to_decode))


if __name__ == "__main__":
    main()
