"""docs/faults.md: the rows, how a run fills them, and how a later run notices that the committed table is out of date.

Why: a hand-written table of "what we survived" drifts. Here each row has an identifier, an attack and a promise; a test
records what happened under that identifier; a full-count run in which everything passed writes the file, and every
ordinary run compares the committed file's rows with those below. Rows of tests that could not run (no GPU) keep what
the file said before.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import re
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
NOT_RUN = "not run yet"


@dataclasses.dataclass(frozen=True)
class Row:
    """One attack: what is done, what must hold, and whether it needs a GPU."""

    attack: str
    promise: str
    gpu: bool = False


ROWS: dict[str, Row] = {
    "one-key": Row("32 processes ask for one missing key at the same moment", "one build a round, every read verified"),
    "no-flock": Row("the same with flock made a no-op", "builds may repeat, no corrupt read, no exception"),
    "threads": Row("16 threads share one store object", "one build, the same bytes for all"),
    "fork": Row("a store object used before and after fork", "parent and children read the same verified bytes"),
    "kill": Row(
        "SIGKILL of the writer at random moments",
        "no visible bad entry, next call succeeds, lock free in under 1 s, leftovers swept",
    ),
    "kill-each": Row("SIGKILL of the writer at each of its system calls in turn", "as above"),
    "stopped": Row(
        "the builder is stopped (SIGSTOP) while it holds the lock", "waiters go on after the timeout and name it"
    ),
    "stale-lock": Row("a lock file left by a dead process, its number in use again", "no wait"),
    "errno-write": Row(
        "i-th system call of the write path fails with EIO, ENOSPC, EACCES, EROFS, EMFILE, EDQUOT, every i",
        "the program is returned, nothing partial is visible, the next call heals",
    ),
    "errno-read": Row("the same on the read path of a good entry", "the program is returned, the entry survives"),
    "errno-rest": Row(
        "from the i-th on, every writing system call fails, every i", "the program is returned, nothing partial"
    ),
    "order": Row(
        "order of fsync and rename in the write path, as recorded and as strace sees it",
        "every file and its directory are fsynced before the rename, the parent after it",
    ),
    "flips": Row(
        "single-bit flips over every file of an entry", "refused before any deserializer, quarantined, rebuilt once"
    ),
    "cuts": Row("truncation to every length up to 4096 and at random", "as above"),
    "tails": Row("1 to 4096 bytes appended, a 4 KiB page zeroed", "as above"),
    "swaps": Row("payloads or manifests swapped between two keys, an older manifest put back", "as above"),
    "codes": Row("payloads that run code, in each slot that torch.export.load unpickles", "nothing runs"),
    "codes-open": Row("the same with a matching digest, in a directory that others can write", "refused, nothing runs"),
    "codes-checkpoint": Row("checkpoints that run code when unpickled", "CheckpointError, nothing runs"),
    "dir-missing": Row("cache directory does not exist, nor its parent", "made with mode 0700, the entry is kept"),
    "dir-read-only": Row("read-only file system", "uncached, one warning"),
    "dir-read-only-hit": Row("the same with a good entry in it", "the entry is used"),
    "dir-file": Row("the path is a file, or lies below one", "refused, uncached"),
    "dir-foreign": Row("the directory belongs to another user", "refused, uncached; accepted when signed"),
    "dir-world": Row("the directory can be written by everybody", "refused, uncached, also when signed"),
    "dir-group": Row(
        "the directory can be written by a group with others in it", "refused, uncached; accepted when signed"
    ),
    "dir-parent": Row("a parent can be written by everybody without the sticky bit", "refused, uncached"),
    "dir-link": Row(
        "the path is a symbolic link: dangling, to a good cache, to a system directory",
        "refused, uncached, target untouched",
    ),
    "dir-inner-links": Row(
        "the cache's own folders are links to elsewhere", "uncached or kept, nothing written elsewhere"
    ),
    "dir-noexec": Row("file system mounted noexec", "the entry is kept and used"),
    "dir-name": Row(
        "model names of 255 bytes, with slashes, dots, control characters, none at all", "kept under a safe name"
    ),
    "dir-no-home": Row("no HOME, no user entry for the uid", "a default directory or none, never an exception"),
    "dir-no-temp": Row(
        "cache refused and no temporary directory to build in", "one clear error, which the runtime turns into PyTorch"
    ),
    "full": Row(
        "a file system of 64 sizes, from one page to more than twice the entry",
        "the program is returned, nothing partial",
    ),
    "hmac": Row("signed cache: unsigned, foreign and altered entries", "refused in that mode"),
    "upgrade": Row(
        "entries of another schema, torch, TensorRT, GPU or driver, and forged ones",
        "a miss with its reason in the listing, never loaded",
    ),
    "evict": Row("8 readers, 4 writers, a cap of 3 entries, clocks ten years off either way", "no failed read"),
    "clock": Row("use markers and entries dated 1970, ten years ago, ten years ahead", "the order of use is kept"),
    "live-stage": Row(
        "sweeping while writers write, clocks ten years off either way", "no live writer's stage is removed"
    ),
    "flat": Row("open, verify, close, over and over", "descriptors and memory flat"),
    "fuzz-manifest": Row(
        "manifest parser fed random, mutated and hostile bytes", "CacheCorruptError only, under 100 ms and 64 MiB"
    ),
    "fuzz-config": Row("configuration parser fed random and mutated YAML", "ConfigError only, under 100 ms and 64 MiB"),
    "fuzz-latents": Row("latent-file readers fed random and mutated files", "DataError only, under 100 ms and 64 MiB"),
    "fuzz-messages": Row("player's WebSocket messages, random and mutated", "refused or clamped, never an exception"),
    "inputs": Row(
        "latents with NaN, Inf and huge values, non-contiguous, of other dtypes, 0 and 10,000 frames",
        "the right answer or one clear error",
    ),
    "runtime-threads": Row("16 threads decode at once", "no cross-talk"),
    "runtime-fork": Row("fork after a program is loaded", "the child decodes or says why not"),
    "run-failures": Row(
        "the program raises, returns NaN where PyTorch does not, runs out of memory",
        "PyTorch's answer, put aside after three",
    ),
    "soak": Row(
        "100,000 decodes over 10 shapes with builds and evictions between", "memory flat, no wrong frame", gpu=True
    ),
}


class Ledger:
    """What the tests of this session recorded."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def record(self, identifier: str, outcome: str) -> None:
        """Note what happened; several tests may add to one row."""
        assert identifier in ROWS, f"{identifier!r} is not a row of tests/faults/ledger.py"
        before = self.outcomes.get(identifier)
        self.outcomes[identifier] = outcome if before is None else f"{before}; {outcome}"

    def write(self) -> None:
        """Write the table from this session's outcomes, keeping committed ones for rows that could not run."""
        kept = read_table()
        lines = [
            "# What was attacked, and what happened",
            "",
            "Generated by `make faults`; written only when everything passed. Do not edit: change `tests/faults/`.",
            f"Last run: {datetime.date.today().isoformat()}, {_machine()}.",
            "",
            "| row | attack | must hold | what happened |",
            "|---|---|---|---|",
        ]
        for identifier, row in ROWS.items():
            outcome = self.outcomes.get(identifier) or kept.get(identifier, ("", "", NOT_RUN))[2]
            lines.append(f"| {identifier} | {row.attack} | {row.promise} | {outcome} |")
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_table() -> dict[str, tuple[str, str, str]]:
    """Row identifier -> (attack, promise, outcome) of the committed table; empty when there is none."""
    if not TABLE.exists():
        return {}
    rows = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] in ROWS:
            rows[cells[0]] = (cells[1], cells[2], cells[3])
    return rows


def _machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {gpu}, Python {platform.python_version()}, torch {torch.__version__}"
