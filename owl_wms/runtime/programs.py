"""Obtains a loaded program for a request, from the cache or by a build; every failure becomes one FastPathError.

Why apart from the decode loop: the order of these steps, and the failures remembered here, are why a build happens at
most once per process and key, and why a failed one is not tried again at every call.

Usage:
    loaded = toolchain.obtain(decoder, request, settings, progress)     # FastPathError, or Loaded(built=False, ...)
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from owl_wms import env
from owl_wms.cache import CacheStore, Entry, Key, NoStore
from owl_wms.errors import FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.request import Request
from owl_wms.runtime import turns
from owl_wms.runtime.stamp import WeightsStamp
from owl_wms.settings import TensorRTConfig
from owl_wms.vae.stepping import Stepping

Program = Callable[..., Any]
"""`[B, c, h, w] -> [B, C, H, W]`; with a state, `(latents, *state) -> (frames, *state)`."""
Progress = Callable[[dict[str, Any]], None]
MISSED = "waiting to build"
"""Stage of the event that reports that no program was found: one will be built, or another thread builds it."""
STALE_SECONDS = 1.0
"""Age after which a key is computed again before a program is built for it: the weights may have changed."""
_T = TypeVar("_T")
_P = ParamSpec("_P")

# Toolchain name and key of every build that failed in this process, so that another decode function for the same
# decoder does not repeat it.
_failed_builds: dict[tuple[str, str], FastPathError] = {}
_failed_guard = threading.Lock()


class _ChangedError(FastPathError):
    """The decoder changed, so a build was not begun or its result not kept. Nothing is wrong with the key."""

    def __init__(self, when: str) -> None:
        super().__init__("build", f"the decoder changed while it {when}", "decode once more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A program ready to run.

    Attributes:
        program: `[B, c, h, w] -> [B, C, H, W]`.
        built: built by this call rather than found in the cache.
        name: entry name `<model>_<16 hex>`, or `in memory` for a toolchain that stores nothing.
        not_kept: why the program is not in the cache; empty if it is.
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


class Toolchain(Protocol):
    """Makes programs: the interface that the decode loop uses.

    Attributes:
        name: of this toolchain in statistics.
        background: whether `obtain` may be called in a thread beside the caller's. It then calls `progress` with
            `{"stage": MISSED}` before it waits or builds.
    """

    name: str
    background: bool

    def obtain(
        self, decoder: nn.Module, request: Request, settings: TensorRTConfig, progress: Progress | None
    ) -> Loaded:
        """A program for `decoder` that is ready to run. Raises FastPathError only."""


@functools.cache
def open_store(directory: Path, max_bytes: int, hmac_key: bytes | None) -> CacheStore:
    """Returns one store object per directory and process, so that it warns once and its counters add up."""
    return CacheStore(directory, max_bytes=max_bytes, hmac_key=hmac_key)


def store_of(settings: TensorRTConfig) -> CacheStore:
    """The cache directory of the settings; `TENSORRT_CACHE_KEY` is the secret that its manifests are signed with."""
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
    inner = decoder.decoder if isinstance(decoder, Stepping) else decoder
    name = type(inner).__name__.lower().removesuffix("decoder")
    return name or "decoder"


def without_autocast(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Runs a function with autocast off: neither a program nor its key may depend on the caller's context."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return call


class Stored(abc.ABC):
    """A toolchain whose programs are stored. Subclasses define how one is keyed, built and loaded, this class when.

    Every method of a subclass may raise anything; it becomes a FastPathError of that step. All but `build` are called
    inside `turns.tracing()`; a `build` that exports or imports in this process enters it for that time.
    """

    name: str
    background = True

    @abc.abstractmethod
    def ready(self, request: Request) -> FastPathError | None:
        """Returns why nothing can be built or loaded for the request; None when it can."""

    @abc.abstractmethod
    def key_material(self, decoder: nn.Module, request: Request) -> Mapping[str, Any]:
        """Returns everything the program depends on, JSON-ready."""

    @abc.abstractmethod
    def build(
        self,
        decoder: nn.Module,
        request: Request,
        key: Key,
        folder: Path,
        progress: Progress | None,
        meanwhile: Callable[[], None],
    ) -> Mapping[str, Any]:
        """Write `folder/program.pt2`, checked for parity; return a report. `meanwhile` may be called where this process
        would only wait.
        """

    @abc.abstractmethod
    def load(self, data: bytes, request: Request, report: Mapping[str, Any]) -> Program:
        """The callable behind verified bytes: takes `request.input_shape` in any real dtype on `request.device`."""

    def prepare(self) -> None:
        """Import what `load` needs, ahead of it. Never raises."""
        return

    @without_autocast
    def obtain(
        self, decoder: nn.Module, request: Request, settings: TensorRTConfig, progress: Progress | None
    ) -> Loaded:
        """The program for `decoder`, from the cache or built now. Raises FastPathError only."""
        with turns.tracing():
            unready = staged("import", self.ready, request)
            if unready is not None:
                raise unready
            stamp = WeightsStamp(decoder)  # before the key reads the weights
            key = self._key(decoder, request)
        obtaining = _Obtaining(
            toolchain=self,
            decoder=decoder,
            request=request,
            settings=settings,
            progress=progress,
            key=key,
            stamp=stamp,
        )
        with turns.one_of((self.name, key.digits), busy=obtaining.missed):
            return obtaining.run()

    def _key(self, decoder: nn.Module, request: Request) -> Key:
        return staged("export", lambda: Key.of(self.key_material(decoder, request)))


@dataclasses.dataclass(kw_only=True)
class _Obtaining:
    """Obtains one program for one request; dropped afterwards. `stamp` was taken before `key`."""

    toolchain: Stored
    decoder: nn.Module
    request: Request
    settings: TensorRTConfig
    progress: Progress | None
    key: Key
    stamp: WeightsStamp
    keyed: float = dataclasses.field(default_factory=time.monotonic)
    build_seconds: float = 0.0

    def run(self) -> Loaded:
        """Returns the program, found or built, loaded and run once."""
        with _failed_guard:
            remembered = _failed_builds.get((self.toolchain.name, self.key.digits))
        if remembered is not None:
            raise remembered.again()
        entry, data = self._bytes()
        begin = time.perf_counter()
        try:
            program = self._load(entry, data)
        except FastPathError as error:
            # Its hash was right and it still cannot be read: the entry is at fault, unless memory ran out, or it could
            # be read and computes something else here, where a new one would as well.
            cause = error.__cause__
            if entry.built or error.stage == "parity" or (cause is not None and is_out_of_memory(cause)):
                raise
            store_of(self.settings).reject(entry.name, str(error))
            entry, data = self._bytes()
            begin = time.perf_counter()
            program = self._load(entry, data)
        with turns.tracing():
            staged("load", first_run, program, self.request)
        return Loaded(
            program=program,
            built=entry.built,
            name=entry.name,
            not_kept=entry.reason,
            report=dict(entry.manifest.report),
            file_bytes=len(data),
            build_seconds=self.build_seconds,
            load_seconds=time.perf_counter() - begin,
        )

    def _bytes(self) -> tuple[Entry, bytes]:
        """Returns the entry, closed, and its verified bytes. Remembers a build that failed."""
        store = store_of(self.settings) if self.settings.use_cache else NoStore()
        label = model_label(self.decoder)
        try:
            entry = staged(
                "save",
                store.get_or_build,
                label,
                self.key,
                self._build,
                waiting=self._wait_for_turn,
                meanwhile=self._prepare,
            )
        except _ChangedError:
            raise
        except FastPathError as error:
            with _failed_guard:
                _failed_builds[self.toolchain.name, self.key.digits] = error.again()
            raise
        try:
            return entry, entry.read()
        finally:
            entry.close()  # the bytes are ours now; a loaded program does not need its files any more

    def missed(self) -> None:
        """Reports to `progress` that there is no program to load."""
        if self.progress is not None:
            self.progress({"stage": MISSED})

    def _wait_for_turn(self) -> contextlib.AbstractContextManager[None]:
        self.missed()
        return turns.building()

    def _build(self, folder: Path) -> Mapping[str, Any]:
        if time.monotonic() - self.keyed > STALE_SECONDS:
            self._require_unchanged()
        begin = time.perf_counter()
        failure: FastPathError | None = None
        try:
            report = staged(
                "build",
                self.toolchain.build,
                self.decoder,
                self.request,
                self.key,
                folder,
                self.progress,
                self._prepare,
            )
        except FastPathError as error:
            failure = error
        finally:
            self.build_seconds += time.perf_counter() - begin
        # The build read the weights after the key did. Weights that changed since may be in the program and not in the
        # key, or be what failed; so neither program nor failure is stored under this key.
        with turns.tracing():  # an export puts stand-ins into a module's place for its weights
            unchanged = self.stamp.matches(self.decoder)
        if not unchanged:
            raise _ChangedError("was built") from failure
        if failure is not None:
            raise failure
        return report

    def _require_unchanged(self) -> None:
        """Raises FastPathError if the decoder changed since its key was computed, during a wait.

        Otherwise the program of the new weights would be stored under the key of the old ones.
        """
        with turns.tracing():
            again = self.toolchain._key(self.decoder, self.request)
        if again.digits != self.key.digits:
            raise _ChangedError("waited for its build")

    def _prepare(self) -> None:
        with turns.tracing():
            self.toolchain.prepare()

    def _load(self, entry: Entry, data: bytes) -> Program:
        with turns.tracing():
            return staged("load", self.toolchain.load, data, self.request, entry.manifest.report)


def first_run(program: Program, request: Request) -> None:
    """Run once on zeros: an execution context that cannot be made must show here, not in a caller's decode."""
    device = torch.device(request.device)
    with torch.no_grad():
        program(
            *(torch.zeros(shape, dtype=torch.float32, device=device) for shape in (request.input_shape, *request.state))
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def staged(stage: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Calls a function and turns every exception into a FastPathError of `stage`; a FastPathError keeps its own stage.

    An exception of the caller's own signal handler passes through, so that nothing is remembered as failed.
    """
    try:
        return function(*args, **kwargs)
    except FastPathError as failure:
        raise_interrupt(failure)
        raise
    except Exception as error:  # TensorRT and CUDA raise bare Exception, RuntimeError, AssertionError, OSError, ...
        raise_interrupt(error)
        text = " ".join(str(error).split())[:500] or "no message"
        raise FastPathError(stage, f"{type(error).__name__}: {text}", "run owl-wms doctor") from error
