"""Measures `owl-wms decode-dataset` on one or more GPUs: local workers, a launcher's ranks, Ray; npy and mp4.

Items lie on a RAM disk. A run on two GPUs decodes twice as many as one on one GPU, so that a steady part is equally
long and the last items weigh the same; runs with mp4 take every tenth of them, runs called `long` a tenth as many of
1,000 frames. An item must have the same hash in all runs, and the first one the frames of `owl-wms decode`; otherwise
the exit status is 1. The rate of a run is that of its steady part: from the moment when every worker has finished an
item to the last item's end. `whole` counts from the start of the command. In the steady part, `idle` is the share of
time in which a worker computes no item, `GPU` what nvidia-smi calls utilization, `CPU` the cores that all processes
together keep busy. `memory` is the most that they hold at once. Results are written after each run, and one that fails
costs its row only.

Usage:
    python -m benchmarks.dataset --out dataset.json        # about four minutes on two GPUs; writes dataset.md too
    python -m benchmarks.dataset --runs local-npy-1 local-npy-8 ray-npy-8 local-mp4-8 --out scaling.json
    python -m benchmarks.dataset --toy                     # a minute on a CPU: shows that everything runs
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.decoders import VAE_CONFIGS, subject
from benchmarks.harness import document, origin, require_gpu, write
from benchmarks.load import Load
from benchmarks.report import table_lines
from owl_wms.batch.ledger import parsed
from owl_wms.media.arrays import save_array

ROOT = Path(__file__).parents[1]
TOY = ROOT / "examples/demo/demo_vae"
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
RUNS = ["local-npy-1", "ray-npy-1", "ray-npy-N", "ranks-npy-N", "local-npy-N", "local-long-1", "ray-long-1"]
RUNS += ["local-mp4-N", "local-mp4-1"]
FORMS = ("npy", "mp4", "long")
LONG_FRAMES = 1000
STAGES = ("open", "read", "decode", "copy", "write", "encode", "hash")
FRAME_BYTES = 360 * 640 * 4
RUN_SECONDS = 90  # no run takes longer, unless it hangs
# Ray counts a RAM disk's files as memory in use and would end workers; its own store needs hardly any here.
RAY = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.05",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def write_rate(folder: Path, size: int, writers: int) -> float:
    """Writes `size` bytes into files of that many threads, removes them, and returns GB per second."""
    block = os.urandom(1 << 20) * 64  # zeros would be read from one page

    def fill(number: int) -> None:
        with (folder / f"fill-{number}").open("wb", buffering=0) as file:
            for _ in range(max(1, size // writers // len(block))):
                file.write(block)

    began = time.perf_counter()
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(fill, range(writers)))
    seconds = time.perf_counter() - began
    written = sum(path.stat().st_size for path in folder.glob("fill-*"))
    for path in folder.glob("fill-*"):
        path.unlink()
    return written / seconds / 1e9


def mount_options(folder: Path) -> str:
    """Returns type and options of the file system that a folder is on, as the system lists them."""
    mounts = [line.split() for line in reversed(Path("/proc/mounts").read_text().splitlines())]
    above = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    found = max(above, key=lambda mount: len(mount[1]))  # of two on one place the later one is seen
    return f"{found[2]} {found[3]}"


def make_inputs(folder: Path, items: int, frames: int, gpus: set[int], toy: bool) -> list[str]:
    """Writes the decoder, the latents and a manifest `FORM-GPUS.txt` for each run; returns the decoder's options.

    The file for `owl-wms decode` has forty items' frames and begins with those of the first item.

    Args:
        items: per GPU.
        frames: of each.
        gpus: numbers of them that runs take.
    """
    if toy:
        config, checkpoint, shape = f"{TOY}.yml", f"{TOY}.safetensors", (128, 8, 8)
    else:
        of = subject("dist")
        config, checkpoint, shape = str(VAE_CONFIGS / "dec_dist.yml"), str(folder / "dec.safetensors"), of.latent_shape
        save_file({name: value.contiguous() for name, value in of.make().state_dict().items()}, checkpoint)
    device = "cpu" if toy else "cuda"
    generator = torch.Generator(device).manual_seed(0)

    def latents(count: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator, device=device).bfloat16().cpu()

    first = latents(frames)
    for number in range(items * max(gpus)):
        save_array(folder / "in" / f"{number:04}.pt", latents(frames) if number else first)
    save_array(folder / "decode.pt", torch.cat([first, latents(frames * (1 if toy else 39))]))
    tenth = 2 if toy else 10
    for number in range(items // tenth * max(gpus)):
        save_array(folder / "long" / f"{number:04}.pt", latents(frames if toy else LONG_FRAMES))
    for count in gpus:
        every = {"npy": ("in", items * count, 1), "mp4": ("in", items * count, tenth)}
        every["long"] = ("long", items // tenth * count, 1)
        for form, (below, stop, step) in every.items():
            names = [f"{below}/{number:04}.pt\n" for number in range(0, stop, step)]
            (folder / f"{form}-{count}.txt").write_text("".join(names))
    # One frame at a time where items are shorter than a batch, so that batches of all files hold the same frames.
    return ["--vae-config", config, "--checkpoint", checkpoint, "--batch-size", "1" if toy else "8"]


def command(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Starts `owl-wms`."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    full = [sys.executable, "-m", "owl_wms", *words]
    environment = {**inherited, **variables}
    return subprocess.Popen(full, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(*processes: subprocess.Popen[str], seconds: float | None = None) -> str:
    """Waits for commands, and returns what they said.

    Raises:
        RuntimeError: one failed, or they took longer than that.
    """
    end = None if seconds is None else time.monotonic() + seconds
    said = []
    try:
        for process in processes:
            text = process.communicate(timeout=None if end is None else max(0.1, end - time.monotonic()))[1]
            said.append(text)
            if process.returncode:
                raise RuntimeError(f"ended with status {process.returncode}: {text[-3000:]}")
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {seconds:.0f} s: {(error.stderr or b'')[-3000:]!r}") from error
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return "\n".join(said)


def decode_rate(folder: Path, source: str, decoder: list[str]) -> float:
    """Returns the frames per second of `owl-wms decode` for one file; the output stays, as `decode.npy`."""
    out = str(folder / "decode.npy")
    said = ended(command("decode", str(folder / source), *decoder, "--out", out, "--overwrite"))
    found = re.search(r"frames, ([\d.]+) frames/s", said)
    assert found is not None, said
    return float(found[1])


def measure(run: str, folder: Path, decoder: list[str], toy: bool) -> dict[str, Any]:
    """Decodes all items once; returns rates, what idled, and the hashes of the outputs.

    Raises:
        RuntimeError: the command failed.
    """
    engine, kind, number = run.split("-")
    workers, out, source = int(number), folder / "out", folder / f"{kind}-{number}.txt"
    form = "npy" if kind == "long" else kind
    words = ["decode-dataset", str(source), "--out", str(out), *decoder, "--format", form, "--engine", engine]
    began = time.time()
    try:
        with Load() as load:
            if engine == "ranks":
                places = [dict(zip(RANK_NAMES, (str(n), number, str(n)), strict=True)) for n in range(workers)]
                ended(*[command(*words, **place) for place in places], seconds=RUN_SECONDS)
            else:
                variables = RAY if engine == "ray" else {}
                how = "--workers" if toy else "--gpus"
                ended(command(*words, how, number, **variables), seconds=RUN_SECONDS)
        whole = time.time() - began
        (generation,) = out.iterdir()
        lines = [line for part in (generation / "_ledger/parts").iterdir() for line in parsed(part.read_bytes())]
        worker = {line["key"]: line["worker"] for line in lines if line["event"] == "begin"}
        done = sorted((line for line in lines if line["event"] == "done"), key=lambda line: line["at"])
        hashes = {output["name"]: output["sha256"] for line in done for output in line["outputs"]}
        first = generation / sorted(hashes)[0]
        frames_of_first = np.load(first) if kind == "npy" else None
    finally:
        remove(out)
    due = len(source.read_text().splitlines())
    if len(done) != due:
        raise RuntimeError(f"{len(done)} items are done, {due} were due")
    firsts: dict[str, float] = {}
    lasts: dict[str, float] = {}
    for line in done:
        firsts.setdefault(worker[line["key"]], line["at"])
        lasts[worker[line["key"]]] = line["at"]
    start, end = max(firsts.values()), done[-1]["at"]
    span = max(end - start, 1e-3)
    steady = [line for line in done if line["at"] > start]
    frames = sum(line["frames"] for line in steady)
    each = []
    for name in sorted(firsts, key=firsts.__getitem__):
        own = [line for line in steady if worker[line["key"]] == name]
        busy = {stage: sum(line.get("stages", {}).get(stage, 0.0) for line in own) / span for stage in STAGES}
        idle = 1 - sum(line["seconds"] for line in own) / span
        facts = {"first_s": firsts[name] - began, "last_s": lasts[name] - began, "items": len(own), "idle": idle}
        each.append({**facts, "busy": {stage: round(share, 4) for stage, share in busy.items() if share}})
    row = {"run": run, "engine": engine, "form": kind, "gpus": workers, "items": len(done), "worked": len(firsts)}
    row |= {"rate": frames / span, "steady_s": span, "whole_s": whole, "first_s": min(firsts.values()) - began}
    row |= {"idle": sum(one["idle"] for one in each) / workers, "cores": load.cores(start, end), "each": each}
    row |= {"gpu": load.gpu(start, end, workers), "memory_gib": load.memory / (1 << 30), "frames": frames}
    return {**row, "hashes": hashes, "first": frames_of_first}


def remove(folder: Path) -> None:
    """Removes a folder, its files eight at a time: freeing the pages of a RAM disk takes seconds."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(os.unlink, [path for path in folder.rglob("*") if path.is_file()]))
    shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[dict[str, Any]], base: float) -> str:
    """Returns the runs as Markdown; times and efficiency are against one GPU with the same form."""
    heads = "engine | form | GPUs | frames/s | of `decode` | times | efficiency | idle | GPU | CPU | memory | steady"
    lines = [f"| {heads} | first item | whole run |", "|---" * 14 + "|"]
    for row in rows:
        if "error" in row:
            engine, form, number = row["run"].split("-")
            lines.append(f"| {engine} | {form} | {number} | failed {'| ' * 11}|")
            continue
        alone = [other["rate"] for other in rows if other.get("form") == row["form"] and other["gpus"] == 1]
        times = row["rate"] / (alone[0] or 1) if alone else None
        share = f"{row['rate'] / base / row['gpus']:.0%}" if row["form"] != "mp4" else ""
        cells = (row["engine"], row["form"], row["gpus"], f"{row['rate']:.0f}", share,
                 "" if times is None else f"{times:.2f}", "" if times is None else f"{times / row['gpus']:.0%}",
                 f"{row['idle']:.0%}", "" if row["gpu"] is None else f"{row['gpu']:.0%}",
                 f"{row['cores']:.1f} cores", f"{row['memory_gib']:.1f} GiB", f"{row['steady_s']:.1f} s",
                 f"{row['first_s']:.1f} s", f"{row['whole_s']:.1f} s")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def stage_table(rows: list[dict[str, Any]]) -> list[str]:
    """Returns how long each worker's stages were busy, as Markdown lines; none of results that do not have it."""
    cells = []
    for row in rows:
        for number, one in enumerate(row.get("each", ())):
            shares = [f"{one['busy'][stage]:.0%}" if stage in one["busy"] else "" for stage in STAGES]
            facts = (f"{one['first_s']:.1f} to {one['last_s']:.1f} s", one["items"], f"{one['idle']:.1%}")
            cells.append((row["run"], number, *facts, *shares))
    heads = ("run", "worker", "first and last item", "items", "idle", *STAGES)
    return ["", SHARES, "", *table_lines(heads, cells)] if cells else []


SHARES = "Share of the steady part in which each worker's stages were at work (they overlap; `hash` has four threads):"
READING = """The rate is that of the steady part: from the moment when every worker has finished an item to the last
item's end. `times` and `efficiency` are against one GPU. `idle` is the share of time in which a worker computes no
item, `GPU` the driver's utilization (the share of time with a kernel at work), `CPU` the cores that all processes
together keep busy, `memory` the most that they hold at once. mp4 takes every tenth item; its frames are noise, x264's
worst case."""


def render(result: dict[str, Any]) -> str:
    """Returns the page of a result."""
    disk, base, found = result["ram_disk_gbps"], result["decode"], result["rows"]
    lines = ["# A dataset decoded on one and more GPUs", "", origin(result), ""]
    per = " per GPU" if "disk_options" in result else ""
    where = f"a RAM disk ({result['disk_options']})" if "disk_options" in result else "a RAM disk"
    lines.append(
        f"{result['items']} items{per} of {result['length']} frames, decoder `{result['decoder']}`, on {where}, "
        f"{result['cores']} cores. `owl-wms decode` to `.npy`: {base:.0f} frames/s. The RAM disk takes "
        f"{disk['one']:.1f} GB/s from one writer, {disk['two']:.1f} from two and {disk['first']:.1f} from eight at "
        f"first use; at that rate `decode` writes {base * FRAME_BYTES / 1e9:.1f} GB/s."
    )
    lines += ["", table(found, base), "", *READING.splitlines()]
    if any(row["run"].split("-")[1] == "long" for row in found):
        lines.append(f"`long`: a tenth as many items, of {LONG_FRAMES} frames.")
    lines += [*stage_table(found), ""]
    lines.append(f"Same outputs in all npy runs: {result['alike']}; same frames as `owl-wms decode`: ")
    lines[-1] += f"{result['equal_to_decode']}."
    for row in (row for row in found if "error" in row):
        lines += ["", f"`{row['run']}` failed: {row['error'].strip().splitlines()[-1][:300]}"]
    for remark in result.get("remarks", ()):
        lines += ["", remark]
    for several in result.get("cold_cache", ()):
        ranks = several["rows"]
        built, loaded = (sum(rank[name] for rank in ranks) for name in ("builds", "hits"))
        text = (
            f"An empty cache, {len(ranks)} at once: {built} built, {loaded} loaded; the last one's first frame after "
        )
        lines += ["", f"{text}{several['last_s']:.1f} s."]
    return "\n".join(lines) + "\n"


class Report:
    """The results so far, written anew after each run."""

    def __init__(self, out: Path | None, facts: dict[str, Any]) -> None:
        self._out, self._hashes = out, dict[str, str]()
        self.document = document("dataset", None, [], alike=None, equal_to_decode=None, **facts)

    def take(self, row: dict[str, Any], frames: Any) -> None:
        """Takes the next run, and the frames that `owl-wms decode` made of its first item."""
        hashes, first, result = row.pop("hashes", {}), row.pop("first", None), self.document
        result["rows"].append(row)
        if row.get("form") in ("npy", "long"):
            same = all(self._hashes.setdefault(name, digest) == digest for name, digest in hashes.items())
            result["alike"] = result["alike"] is not False and same
        if first is not None:
            same = np.array_equal(first, frames)
            result["equal_to_decode"] = result["equal_to_decode"] is not False and same
        if self._out is not None:
            write(result, self._out)
            self._out.with_suffix(".md").write_text(render(result), encoding="utf-8")
        print(table(result["rows"], result["decode"]).splitlines()[-1], flush=True)

    @property
    def good(self) -> bool:
        """Whether every run ended well and gave the same frames."""
        same = self.document["alike"] is True and self.document["equal_to_decode"] is True
        return same and not any("error" in row for row in self.document["rows"])


def main() -> None:
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="ENGINE-FORM-GPUS each, N for all; most wanted first")
    parser.add_argument("--items", type=int, help="per GPU")
    parser.add_argument("--frames", type=int, help="frames of each item, a multiple of 8")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="on a RAM disk, for inputs and outputs")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no run later than this")
    parser.add_argument("--out", type=Path, help="JSON; the table goes beside it as .md")
    parser.add_argument("--toy", action="store_true", help="the demo's decoder and a few frames, on CPUs")
    arguments = parser.parse_args()
    began, toy = time.monotonic(), arguments.toy
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the commands in work are ended, and the files removed
    if not toy:
        require_gpu(parser)
    seen = 2 if toy else torch.cuda.device_count()
    runs = list(dict.fromkeys(run.replace("-N", f"-{seen}") for run in arguments.runs))
    wrong = [run for run in runs if not re.fullmatch(rf"(local|ranks|ray)-({'|'.join(FORMS)})-[1-9]\d*", run)]
    if wrong or any(int(run.rpartition("-")[2]) > seen for run in runs):
        parser.error(f"--runs are like local-npy-1, of at most {seen} GPUs; got {' '.join(wrong or runs)}")
    items = arguments.items or (4 if toy else 200)
    length = arguments.frames or (1 if toy else 200)
    gpus = {int(run.rpartition("-")[2]) for run in runs}
    room = int(shutil.disk_usage(arguments.folder).free * 0.95)
    if (needed := (items * max(gpus) + 40) * length * FRAME_BYTES * 1.03) > room:
        fits = max(8, int(length * room / needed) // 8 * 8)
        print(f"{arguments.folder} has {room >> 30} GiB: items of {fits} frames instead of {length}", flush=True)
        length = fits
    with tempfile.TemporaryDirectory(prefix="owl-wms-dataset-", dir=arguments.folder) as name:
        folder = Path(name)
        decoder = make_inputs(folder, items, length, gpus, toy)
        with ThreadPoolExecutor(1) as pool:
            # A virtual machine may get its memory when it is first used: all that a run will need, while a program is
            # built.
            filled = pool.submit(write_rate, folder, items * max(gpus) * length * FRAME_BYTES, 8)
            decode_rate(folder, "in/0000.pt", decoder)
        small = (64 << 20) if toy else (8 << 30)
        disk = {"first": filled.result(), "one": write_rate(folder, small, 1), "two": write_rate(folder, small, 2)}
        base = decode_rate(folder, "decode.pt", decoder)
        frames = np.load(folder / "decode.npy", mmap_mode="r")[:length].copy()
        (folder / "decode.npy").unlink()
        facts = {"decoder": "demo" if toy else "dist", "cores": os.cpu_count(), "decode": base, "ram_disk_gbps": disk}
        facts["disk_options"] = mount_options(arguments.folder)
        print(json.dumps({**facts, "items": items, "length": length}), flush=True)
        report = Report(arguments.out, {**facts, "items": items, "length": length})
        for run in runs:
            if time.monotonic() - began > arguments.seconds:
                print(f"{run}: no time left", flush=True)
                continue
            try:
                row = measure(run, folder, decoder, toy)
            except (RuntimeError, OSError, ValueError) as error:
                row = {"run": run, "error": str(error)}
                print(f"{run}: {error}", flush=True)
            report.take(row, frames)
    print(f"all runs ended, with the frames of `owl-wms decode`: {report.good}")
    sys.exit(not report.good)


if __name__ == "__main__":
    main()
