"""Cached, else built: from a request to a loaded program, with every failure turned into one FastPathError.

Why apart from the decode loop: the order of these steps and what is remembered about them is the whole of "a build
happens at most once per process and key, and a failed one is not tried again at every call".

Usage:
    source = ProgramSource(toolchain, settings)
    loaded = source.obtain(decoder, request)        # FastPathError, or Loaded(program=..., built=False, ...)
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from owl_wms import env
from owl_wms.cache import CacheStore, Entry, Miss, cache_key
from owl_wms.errors import FastPathError
from owl_wms.runtime import turns
from owl_wms.runtime.eager import WeightsStamp, is_out_of_memory
from owl_wms.runtime.toolchain import JitToolchain, Program, ProgramRequest, Progress, Toolchain
from owl_wms.settings import TensorRTConfig

PROGRAM_FILE = "program.pt2"
LOOKUP_SECONDS = 0.02
"""After this long a lookup is reading a program; what else it does takes a tenth of it."""
STALE_SECONDS = 1.0
"""Age of a key after which it is computed again before something is built for it."""
_T = TypeVar("_T")

# Toolchain name and key of every build that failed in this process: another decode function for the same decoder need
# not find out again.
_failed_builds: dict[tuple[str, str], FastPathError] = {}
_failed_guard = threading.Lock()


class _ChangedError(FastPathError):
    """A build that was not begun or whose result was thrown away; nothing is wrong with the key it was for."""

    def __init__(self, when: str) -> None:
        super().__init__("build", f"the decoder changed while it {when}", "decode once more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A program ready to run.

    Attributes:
        program: `[B, c, h, w] -> [B, C, H, W]`.
        built: built by this call rather than found in the cache.
        name: entry name `<model>_<16 hex>`, `uncached`, or `in memory`.
        not_kept: why the program does not stand in the cache; empty when it does.
        report: what the build said (plan, precision, parity, timings).
        file_bytes: size of the program as a file.
        build_seconds, load_seconds: spent by this call.
    """

    program: Program
    built: bool
    name: str
    not_kept: str
    report: dict[str, Any]
    file_bytes: int
    build_seconds: float
    load_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """A program's verified bytes and what is known of them, as in `Loaded`."""

    data: bytes
    name: str
    report: dict[str, Any]
    built: bool
    not_kept: str


@functools.cache
def open_store(directory: Path, max_bytes: int, hmac_key: bytes | None) -> CacheStore:
    """One store object per directory and process, so that its warnings are said once and its counters add up."""
    return CacheStore(directory, max_bytes=max_bytes, hmac_key=hmac_key)


def store_of(settings: TensorRTConfig) -> CacheStore:
    """The cache that `settings` and `TENSORRT_CACHE_KEY` name."""
    return open_store(settings.cache_directory(), settings.cache_max_bytes, env.cache_hmac_key())


def forget_failed_builds() -> None:
    """Try failed builds again, for example after an installation."""
    with _failed_guard:
        _failed_builds.clear()


def renew_locks() -> None:
    """For a forked child: locks that another thread of the parent held would stay locked for ever."""
    global _failed_guard
    _failed_guard = threading.Lock()
    turns.renew()
    open_store.cache_clear()


def model_label(decoder: nn.Module) -> str:
    """Model name used in entry names: the decoder's class, lower case, without `Decoder` (`dcae`, `distill`)."""
    name = type(decoder).__name__.lower().removesuffix("decoder")
    return name or "decoder"


class ProgramSource:
    """Programs for one set of settings.

    Args:
        toolchain: builds and loads.
        settings: cache directory, size, use_cache.
        progress: receives build events (`{"stage", "elapsed", ...}`).
    """

    def __init__(self, toolchain: Toolchain, settings: TensorRTConfig, progress: Progress | None = None) -> None:
        self.toolchain = toolchain
        self.settings = settings
        self._progress = progress

    def obtain(self, decoder: nn.Module, request: ProgramRequest) -> Loaded:
        """The program for `decoder`, from the cache or built now. Raises FastPathError only."""
        # A surrounding autocast is the caller's context: neither what is built nor what it is called depends on it.
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return self._found(decoder, request)

    def _found(self, decoder: nn.Module, request: ProgramRequest) -> Loaded:
        with turns.tracing():
            unready = _staged("import", self.toolchain.ready, request.device)
            if unready is not None:
                raise unready
            if isinstance(self.toolchain, JitToolchain):
                return self._compiled(self.toolchain, decoder, request)
            stamp = WeightsStamp(decoder)  # before the key reads the weights
            material = dict(_staged("export", self.toolchain.key_material, decoder, request))
        request = dataclasses.replace(request, calibration_digest=str(material.get("calibration", "")))
        key = (self.toolchain.name, _staged("export", cache_key, material))
        keyed = time.monotonic()
        with turns.one_of(key):
            return self._obtain(decoder, request, material, key, keyed, stamp)

    def _obtain(
        self,
        decoder: nn.Module,
        request: ProgramRequest,
        material: dict[str, Any],
        key: tuple[str, str],
        keyed: float,
        stamp: WeightsStamp,
    ) -> Loaded:
        with _failed_guard:
            remembered = _failed_builds.get(key)
        if remembered is not None:
            raise remembered.again()
        spent = [0.0]

        def build(folder: Path) -> Mapping[str, Any]:
            if time.monotonic() - keyed > STALE_SECONDS:
                self._still(decoder, request, key)
            begin = time.perf_counter()
            failure: FastPathError | None = None
            try:
                report = _staged("build", self.toolchain.build, decoder, request, folder, self._progress)
            except FastPathError as error:
                failure = error
            finally:
                spent[0] += time.perf_counter() - begin
            # The build read the weights after the key did. Weights that changed since may be in the program and not
            # in the key, or be what failed; so neither program nor failure is kept under this key.
            with turns.tracing():  # an export puts stand-ins into a module's place for its weights
                unchanged = stamp.matches(decoder)
            if not unchanged:
                raise _ChangedError("was built") from failure
            if failure is not None:
                raise failure
            return report

        def read() -> _Read:
            try:
                return self._bytes(model_label(decoder), material, build)
            except _ChangedError:
                raise
            except FastPathError as error:
                with _failed_guard:
                    _failed_builds[key] = error.again()
                raise

        found = read()
        begin = time.perf_counter()
        try:
            program = self._load(found, request)
        except FastPathError as error:
            # Its hash was right and it still cannot be read: the entry is at fault, unless memory ran out, or it could
            # be read and computes something else here, where a new one would as well.
            cause = error.__cause__
            if found.built or error.stage == "parity" or (cause is not None and is_out_of_memory(cause)):
                raise
            store_of(self.settings).reject(found.name, str(error))
            found = read()
            begin = time.perf_counter()
            program = self._load(found, request)
        with turns.tracing():
            _staged("load", _first_run, program, request)
        return Loaded(
            program=program,
            built=found.built,
            name=found.name,
            not_kept=found.not_kept,
            report=found.report,
            file_bytes=len(found.data),
            build_seconds=spent[0],
            load_seconds=time.perf_counter() - begin,
        )

    def _still(self, decoder: nn.Module, request: ProgramRequest, key: tuple[str, str]) -> None:
        """After a wait: whether the decoder is what it was when its key was computed.

        Otherwise the program of new weights would be filed under the old ones. Raises FastPathError.
        """
        with turns.tracing():
            again = _staged("export", self.toolchain.key_material, decoder, request)
        if _staged("export", cache_key, dict(again)) != key[1]:
            raise _ChangedError("waited for its build")

    def _load(self, found: _Read, request: ProgramRequest) -> Program:
        with turns.tracing():
            return _staged("load", self.toolchain.load, found.data, request, found.report)

    def _bytes(self, label: str, material: dict[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> _Read:
        if not self.settings.use_cache:
            with turns.building(), tempfile.TemporaryDirectory(prefix="owl_wms_build_") as folder:
                report = build(Path(folder))
                data = _staged("save", Path(folder, PROGRAM_FILE).read_bytes)
            return _Read(data, "uncached", dict(report), built=True, not_kept="the settings say use_cache=False")
        store = store_of(self.settings)
        entry = self._look_up(store, label, material)
        if isinstance(entry, Miss):
            # A program that is there does not wait for another one's build; and who waits to build does not hold the
            # store's lock meanwhile, on which other processes wait only so long.
            with turns.building():
                entry = _staged("save", store.get_or_build, label, material, build)
        try:
            report = dict(entry.manifest.report)
            return _Read(entry.read(PROGRAM_FILE), entry.name, report, built=entry.built, not_kept=entry.reason)
        finally:
            entry.close()  # the bytes are ours now; a loaded program does not need its files any more

    def _look_up(self, store: CacheStore, label: str, material: dict[str, Any]) -> Entry | Miss:
        """While another thread reads and hashes a large program, this one imports what loading it takes.

        What is not there is known at once, and then a building process is to be started at once.
        """
        prepare = getattr(self.toolchain, "prepare", None)
        with ThreadPoolExecutor(1, "owl-wms-lookup") as pool:
            looking = pool.submit(_staged, "save", store.lookup, label, material)
            if prepare is not None and not wait([looking], LOOKUP_SECONDS).done:
                prepare()
            return looking.result()

    def _compiled(self, toolchain: JitToolchain, decoder: nn.Module, request: ProgramRequest) -> Loaded:
        begin = time.perf_counter()
        program = _staged("build", toolchain.compile, decoder, request)
        _staged("build", _first_run, program, request)
        return Loaded(
            program=program,
            built=True,
            name="in memory",
            not_kept=f"{toolchain.name} keeps nothing on disk",
            report={
                "precision": getattr(program, "precision", request.precision),
                "plan": getattr(program, "plan", ""),
            },
            file_bytes=0,
            build_seconds=time.perf_counter() - begin,
            load_seconds=0.0,
        )


def _first_run(program: Program, request: ProgramRequest) -> None:
    """Run once on zeros: an execution context that cannot be made must show here, not in a caller's decode."""
    with torch.no_grad():
        program(torch.zeros(request.shape, device=request.device))
        if request.device.type == "cuda":
            torch.cuda.synchronize(request.device)


def _staged(stage: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call, and turn whatever is raised into a FastPathError of `stage`; one that already is keeps its own."""
    try:
        return function(*args)
    except FastPathError:
        raise
    except Exception as error:  # TensorRT and CUDA raise bare Exception, RuntimeError, AssertionError, OSError, ...
        text = " ".join(str(error).split())[:500] or "no message"
        raise FastPathError(stage, f"{type(error).__name__}: {text}", "run owl-wms doctor") from error
