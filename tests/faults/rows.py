"""The rows of docs/faults.md: what is done, what must hold, how much of it every test run does."""

from __future__ import annotations

import dataclasses

ALL, TENTH = "all", "a tenth"


@dataclasses.dataclass(frozen=True)
class Row:
    """One attack.

    Attributes:
        attack: what is done.
        promise: what must hold.
        in_test: how much of it `make test` does, where `make faults` does all; the ledger holds the tests to it.
        gpu: whether it needs one.
    """

    attack: str
    promise: str
    in_test: str = ALL
    gpu: bool = False


ROWS: dict[str, Row] = {
    "one-key": Row(
        "32 processes ask for one missing key at the same moment", "one build a round, every read verified", TENTH
    ),
    "no-flock": Row("the same with flock made a no-op", "builds may repeat, no corrupt read, no exception", TENTH),
    "threads": Row("16 threads share one store object", "one build, the same bytes for all", TENTH),
    "fork": Row("a store object used before and after fork", "parent and children read the same verified bytes", TENTH),
    "kill": Row(
        "SIGKILL of the writer at random moments",
        "no visible bad entry, next call succeeds, lock free in under 1 s, leftovers swept",
        TENTH,
    ),
    "kill-each": Row("SIGKILL of the writer at each of its system calls in turn", "as above", TENTH),
    "stopped": Row(
        "the builder is stopped (SIGSTOP) while it holds the lock", "waiters go on after the timeout and name it"
    ),
    "stale-lock": Row("a lock file left by a dead process, its number in use again", "no wait", TENTH),
    "errno-write": Row(
        "i-th system call of the write path fails with EIO, ENOSPC, EACCES, EROFS, EMFILE, EDQUOT, every i",
        "the program is returned, nothing partial is visible, the next call heals",
        TENTH,
    ),
    "errno-read": Row(
        "the same on the read path of a good entry", "the program is returned, the entry survives", TENTH
    ),
    "errno-rest": Row(
        "from the i-th on, every writing system call fails, every i", "the program is returned, nothing partial", TENTH
    ),
    "order": Row(
        "order of fsync and rename in the write path, as recorded and as strace sees it",
        "every file and its directory are fsynced before the rename, the parent after it",
    ),
    "flips": Row(
        "single-bit flips over every file of an entry",
        "refused before any deserializer, quarantined, rebuilt once",
        TENTH,
    ),
    "cuts": Row("truncation to every length up to 4096 and at random", "as above", TENTH),
    "tails": Row("1 to 4096 bytes appended, a 4 KiB page zeroed", "as above", TENTH),
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
        TENTH,
    ),
    "hmac": Row("signed cache: unsigned, foreign and altered entries", "refused in that mode"),
    "upgrade": Row(
        "entries of another schema, torch, TensorRT, GPU or driver, and forged ones",
        "a miss with its reason in the listing, never loaded",
    ),
    "evict": Row(
        "8 readers, 4 writers, 40 keys, a cap of 3 entries, clocks ten years off either way",
        "no failed read; never more entries than the cap, plus one that each reader or writer holds open",
        TENTH,
    ),
    "clock": Row(
        "use markers and entries dated 1970, ten years ago, ten years ahead", "the order of use is kept", TENTH
    ),
    "live-writer": Row(
        "sweeping while writers write, clocks ten years off either way", "no live writer's folder is removed", TENTH
    ),
    "flat": Row("open, verify, close, over and over", "descriptors and memory flat", TENTH),
    "fuzz-manifest": Row(
        "manifest parser fed random, mutated and hostile bytes",
        "CacheCorruptError only, under 100 ms and 64 MiB",
        TENTH,
    ),
    "fuzz-config": Row(
        "configuration parser fed random and mutated YAML", "ConfigError only, under 100 ms and 64 MiB", TENTH
    ),
    "fuzz-latents": Row(
        "latent-file readers fed random and mutated files", "DataError only, under 100 ms and 64 MiB", TENTH
    ),
    "fuzz-messages": Row(
        "player's WebSocket messages, random and mutated", "refused or clamped, never an exception", TENTH
    ),
    "inputs": Row(
        "latents with NaN, Inf and huge values, non-contiguous, of other dtypes, 0 and 10,000 frames",
        "the right answer or one clear error",
        f"all kinds, {TENTH} of the frames",
    ),
    "runtime-threads": Row("16 threads decode at once", "no cross-talk", TENTH),
    "runtime-fork": Row(
        "fork after a program is loaded, whose engine aborts the process that destroys it without its GPU",
        "the child decodes or says why not, and destroys nothing",
        TENTH,
    ),
    "answer": Row(
        "a verified program computes something else in this process than when it was built",
        "refused before its first frame: PyTorch's answer, one warning; the entry stays, nothing is rebuilt",
    ),
    "process-state": Row(
        "the caller's process has other defaults (dtype, device), gradient modes or arithmetic than the one that built",
        "the cached program is used, the same frames",
    ),
    "odd-decoders": Row(
        "decoders with hooks, forwards of their own, other weight norms, locks, wrappers; before and after a frame",
        "what the decoder's own forward gives",
    ),
    "compiled-caller": Row(
        "the function that decodes is compiled by torch.compile, and weights change between its calls",
        "nothing of a decode is traced, frames follow the weights",
    ),
    "run-failures": Row(
        "the program raises, returns NaN where PyTorch does not, runs out of memory",
        "PyTorch's answer, put aside after three",
    ),
    "build-segfault": Row(
        "the real building child dies of SIGSEGV inside an engine",
        "an attempt lost, the caller lives, the two modules that cause it stay in PyTorch",
        "not run: one build takes 50 s",
    ),
    "soak": Row(
        "100,000 decodes over 10 shapes with builds and evictions between",
        "memory flat, no wrong frame",
        "not run: needs a GPU; `make test-gpu` does 2,000 decodes",
        gpu=True,
    ),
}
