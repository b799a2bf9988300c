"""The cache as its callers see it: it takes a key and a way to build, and returns a program whose bytes are right.

It never fails its caller. If the directory is refused, full, read-only or broken, the build still runs and its bytes
are returned; the store logs that once and counts it. The only errors raised are those of the build itself. Why: a cache
only saves time, so its failure may cost no more than that.

Usage:
    store = CacheStore(Path("trt_cache"), max_bytes=20 * 2**30)
    # build(folder) writes folder/"program.pt2", returns a JSON report
    entry = store.get_or_build("dcae", Key.of(material), build)
    program = load_program(entry.read("program.pt2"), device)
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from owl_wms.cache import evict, fs, guard, locks, quarantine, staging, survey
from owl_wms.cache.entry import Entry, EntryGoneError, Expected, Miss, load
from owl_wms.cache.key import Key, entry_name, is_entry_name, label
from owl_wms.cache.manifest import Manifest
from owl_wms.cache.publish import PRIVATE, SHARED, describe, publish, take_program
from owl_wms.cache.tally import Tally
from owl_wms.errors import CacheCorruptError, CacheError, CacheRefusedError
from owl_wms.files import at_home
from owl_wms.temporary import temporary_folder

DEFAULT_MAX_BYTES = 20 * 1024**3
LOCK_TIMEOUT_SECONDS = 300.0
Build = Callable[[Path], Mapping[str, Any]]
Material = Key | Mapping[str, Any]
Waiting = Callable[[], contextlib.AbstractContextManager[None]]

_log = logging.getLogger(__name__)
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class CacheStore:
    """Programs on disk, one directory, many processes and threads.

    Args:
        directory: where entries stand; made with mode 0700 when missing. Never resolved through links.
        max_bytes: entries are evicted, least recently used first, to stay below it; > 0.
        hmac_key: secret that signs manifests. With it unsigned entries are refused and the directory may be shared.
        lock_timeout: seconds to wait for another builder of the same key before building alone.
    """

    def __init__(
        self,
        directory: Path | str,
        max_bytes: int = DEFAULT_MAX_BYTES,
        hmac_key: bytes | None = None,
        *,
        lock_timeout: float = LOCK_TIMEOUT_SECONDS,
    ) -> None:
        self.directory = at_home(directory).absolute()
        self.max_bytes = max_bytes
        self._hmac_key = hmac_key or None
        self._modes = PRIVATE if self._hmac_key is None else SHARED
        self._lock_timeout = lock_timeout
        self._tally = Tally(_log)

    # ---- the two questions a program asks

    def lookup(self, name: str, key: Material, meanwhile: Callable[[], None] | None = None) -> Entry | Miss:
        """The entry of `key`, verified, or why there is none. Never raises for anything the file system does.

        Args:
            name: model label for the directory name.
            key: everything the program depends on; a mapping is made into a `Key`.
            meanwhile: called in this thread while another one reads and hashes a program that is there.
        """
        expected = self._expected(name, key)
        try:
            cache_fd = self._open(create=False)
        except FileNotFoundError:
            found: Entry | Miss = Miss(reason=f"{self.directory} does not exist yet")
        except CacheRefusedError as error:
            self._tally.warn("refused", "%s; programs are built without a cache", error)
            found = Miss(reason=str(error), kind="refused")
        else:
            try:
                found = self._find(cache_fd, expected, meanwhile)
            finally:
                fs.close(cache_fd)
        self._tally.count("misses", int(isinstance(found, Miss)))
        return found

    def get_or_build(
        self,
        name: str,
        key: Material,
        build: Build,
        *,
        waiting: Waiting = contextlib.nullcontext,
        meanwhile: Callable[[], None] | None = None,
    ) -> Entry:
        """The entry of `key`, built if there is none.

        First a look without any lock, for an entry that is there waits for nobody. Then `waiting()`, then the lock file
        of the entry, then a second look, for another process may have built it meanwhile.

        Args:
            name: model label for the directory name.
            key: everything the program depends on; a mapping is made into a `Key`.
            build: called with an empty directory; writes `program.pt2` there and returns a JSON report. Called once, or
                a second time in another place when the cache's file system could not hold the result.
            waiting: entered before the lock file is waited for and left after the build: the turn of this process,
                which must not be waited for while other processes wait for the lock.
            meanwhile: as in `lookup`, for the first look alone.

        Returns:
            An entry with verified bytes; `entry.cached` is False when it could not be stored, and `entry.reason` says
            why.

        Raises:
            CacheError: the build wrote no program, or there is no place at all to build in.
            Exception: whatever `build` raises.
        """
        found = self.lookup(name, key, meanwhile)
        if isinstance(found, Entry):
            return found
        expected = self._expected(name, key)
        with waiting():
            try:
                cache_fd = self._open(create=True)
            except (CacheRefusedError, OSError) as error:
                self._tally.warn("refused", "%s; programs are built without a cache", error)
                return self._build_aside(expected, build, str(error))
            try:
                return self._build_as_one(cache_fd, expected, build)
            finally:
                fs.close(cache_fd)

    # ---- what an operator asks

    def entries(self, current: Mapping[str, Any] | None = None) -> list[survey.EntryInfo]:
        """Every entry with its size, age and, given the present machine's facts, the reason it would miss here.

        Args:
            current: `env.describe_machine()`; None compares nothing.

        Raises:
            CacheRefusedError: the directory may not be trusted.
        """
        with self._opened() as cache_fd:
            return [] if cache_fd is None else survey.survey(self.directory, cache_fd, self._hmac_key, current)

    def verify(self, prefix: str = "", *, repair: bool = False) -> list[survey.EntryInfo]:
        """Hash every entry whose name begins with `prefix`; with `repair` the bad ones among them go to quarantine.

        Raises:
            CacheRefusedError: the directory may not be trusted.
        """
        with self._opened() as cache_fd:
            if cache_fd is None:
                return []
            found = survey.survey(self.directory, cache_fd, self._hmac_key, None, payload=True, prefix=prefix)
            if repair:
                for info in found:
                    if info.status == "corrupt":
                        self._quarantine(info.name, info.reason, cache_fd)
            return found

    def reject(self, name: str, reason: str) -> None:
        """Move an entry that verified, but that its reader could not use, to quarantine; the next call builds it again.

        Args:
            name: `<model>_<16 hex>`, as `Entry.name` says it.
            reason: one line, stored beside the evidence.
        """
        with self._opened() as cache_fd:
            if cache_fd is not None:
                self._quarantine(name, reason, cache_fd)

    def prune(self, max_bytes: int | None = None) -> evict.Shrunk:
        """Sweep what dead writers left, then evict to `max_bytes`.

        Args:
            max_bytes: None means the store's own limit; 0 removes everything that is not in use.

        Raises:
            CacheRefusedError: the directory may not be trusted.
        """
        with self._opened() as cache_fd:
            if cache_fd is None:
                return evict.Shrunk(removed=(), freed_bytes=0, in_use=(), left_bytes=0)
            self._tally.count("swept", staging.sweep(cache_fd))
            shrunk = evict.shrink(cache_fd, self.max_bytes if max_bytes is None else max_bytes, self._modes.directory)
            evict.remove_orphan_markers(cache_fd)
            self._tally.count("evicted", len(shrunk.removed))
            return shrunk

    def stats(self) -> dict[str, Any]:
        """Counters of this object and the state of its directory; never raises.

        Returns:
            `directory`, `max_bytes`, `entries`, `cache_bytes`, `refused` (reason or None) and `tally.COUNTERS`.
        """
        state: dict[str, Any] = {"directory": str(self.directory), "max_bytes": self.max_bytes, "refused": None}
        state["entries"] = state["cache_bytes"] = 0
        try:
            with self._opened() as cache_fd:
                if cache_fd is not None:
                    names = [name for name in fs.listdir(cache_fd) if is_entry_name(name)]
                    state["entries"] = len(names)
                    state["cache_bytes"] = sum(fs.tree_size(name, cache_fd) for name in names)
        except (CacheRefusedError, OSError) as error:
            state["refused"] = str(error)
        return {**state, **self._tally.counts()}

    # ---- finding

    def _find(self, cache_fd: int, expected: Expected, meanwhile: Callable[[], None] | None = None) -> Entry | Miss:
        name = expected.entry
        try:
            entry = load(self.directory, cache_fd, expected, meanwhile)
        except FileNotFoundError:
            return Miss(reason=f"no entry {name}")
        except EntryGoneError as error:
            return Miss(reason=str(error), kind="gone")
        except CacheCorruptError as error:
            self._quarantine(name, str(error), cache_fd)
            return Miss(reason=f"{name}: {error}", kind="corrupt")
        except (OSError, MemoryError) as error:  # a program larger than the free memory is not damaged
            return Miss(reason=f"{name} cannot be read: {str(error) or type(error).__name__}", kind="unreadable")
        with contextlib.suppress(OSError):  # a read-only cache is used without a record of its use
            evict.mark_used(name, cache_fd, self._modes.directory)
        self._tally.count("hits")
        return entry

    def _quarantine(self, name: str, reason: str, cache_fd: int) -> None:
        try:
            quarantine.move(name, reason, cache_fd, self._modes.directory)
        except OSError as error:
            self._tally.warn(
                f"stuck {name}", "%s: %s; it is not used, but cannot be moved away: %s", name, reason, error
            )
            return
        self._tally.count("quarantined")
        _log.warning(
            "%s: %s; it was moved to %s and will be built again", name, reason, self.directory / quarantine.FOLDER
        )

    # ---- building

    def _build_as_one(self, cache_fd: int, expected: Expected, build: Build) -> Entry:
        name = expected.entry
        self._tally.count("swept", staging.sweep(cache_fd))
        folder: Path | None = self.directory / evict.LOCKS
        try:
            fs.close(staging.open_folder(evict.LOCKS, cache_fd, self._modes.directory))
        except OSError:
            folder = None  # a link, a file, or a disk that takes nothing more: build without a lock
        with locks.single_flight(folder, name, self._lock_timeout, self._modes.file) as flight:
            if not flight.held:
                self._tally.count("lock_timeouts", int(flight.timed_out))
                self._tally.warn("lock", "building %s without waiting any longer: %s", name, flight.reason)
            found = self._find(cache_fd, expected)
            if isinstance(found, Entry):
                return found
            return self._build_staged(cache_fd, expected, build)

    def _build_staged(self, cache_fd: int, expected: Expected, build: Build) -> Entry:
        try:
            staged = staging.StagingFolder.open(cache_fd, self.directory, self._modes.directory)
        except OSError as error:
            return self._build_aside(expected, build, f"{self.directory} takes no new entry: {error}")
        try:
            try:
                report = build(staged.path)
                data = take_program(staged.path)
            except Exception as error:
                # The build is the caller's and may word "disk full" in its own way; so the disk is asked as well.
                if not fs.is_storage_trouble(error, str(self.directory)):
                    raise
                reason = f"{self.directory} could not hold the build: {error}"
                staged.close()
                return self._build_aside(expected, build, reason)
            self._tally.count("builds")
            return self._store(staged, cache_fd, expected, data, report)
        finally:
            staged.close()

    def _store(
        self, staged: staging.StagingFolder, cache_fd: int, expected: Expected, data: bytes, report: Mapping[str, Any]
    ) -> Entry:
        manifest = describe(expected, data, report)
        name = expected.entry
        if len(data) > self.max_bytes:
            reason = f"{len(data)} bytes are more than the cache's limit of {self.max_bytes}"
            return self._not_stored(in_memory(manifest, data, reason))
        for attempt in (1, 2):
            try:
                lock_fd = publish(staged, name, manifest, cache_fd, hmac_key=self._hmac_key, modes=self._modes)
            except OSError as error:
                if error.errno not in _OCCUPIED or attempt == 2:
                    reason = f"{self.directory} would not take it: {error}"
                    return self._not_stored(in_memory(manifest, data, reason))
                # A bad one is quarantined by this, which frees the name for the second attempt.
                other = self._find(cache_fd, expected)
                if isinstance(other, Entry):
                    return other
            except CacheCorruptError as error:
                return self._not_stored(in_memory(manifest, data, str(error)))
            else:
                break
        self._tally.count("published")
        with contextlib.suppress(OSError):
            shrunk = evict.shrink(cache_fd, self.max_bytes, self._modes.directory, protected=(name,))
            self._tally.count("evicted", len(shrunk.removed))
        return Entry(name, manifest, data, path=self.directory / name, lock_fd=lock_fd, built=True)

    def _build_aside(self, expected: Expected, build: Build, reason: str) -> Entry:
        entry = build_aside(expected, build, reason)
        self._tally.count("builds")
        return self._not_stored(entry)

    def _not_stored(self, entry: Entry) -> Entry:
        self._tally.count("unpublished")
        self._tally.warn("unpublished", "%s was built and is used, but not stored: %s", entry.name, entry.reason)
        return entry

    # ---- small things

    def _expected(self, name: str, key: Material) -> Expected:
        return Expected(label=label(name), key=_as_key(key), hmac_key=self._hmac_key)

    def _open(self, *, create: bool) -> int:
        return guard.open_trusted(self.directory, shared=self._hmac_key is not None, create=create)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        try:
            cache_fd = self._open(create=False)
        except FileNotFoundError:
            yield None
            return
        try:
            yield cache_fd
        finally:
            fs.close(cache_fd)


class NoStore:
    """A store that stores nothing (`use_cache=False`): every program is built, in a private
    temporary directory, and stays in memory.
    """

    def get_or_build(
        self,
        name: str,
        key: Material,
        build: Build,
        *,
        waiting: Waiting = contextlib.nullcontext,
        meanwhile: Callable[[], None] | None = None,
    ) -> Entry:
        """As `CacheStore.get_or_build`; `meanwhile` is not called, for nothing is read."""
        with waiting():
            expected = Expected(label=label(name), key=_as_key(key), hmac_key=None)
            return build_aside(expected, build, "the settings say use_cache=False")


def _as_key(key: Material) -> Key:
    return key if isinstance(key, Key) else Key.of(key)


def build_aside(expected: Expected, build: Build, reason: str) -> Entry:
    """Build in a private temporary directory and hold the program in memory only; `reason` says why.

    Raises:
        CacheError: there is no place to build in.
        Exception: whatever `build` raises.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder("build"))
        except OSError as error:
            raise CacheError(f"no directory to build in: {reason}; and no temporary one: {error}", path=".") from error
        report = build(folder)
        data = take_program(folder)
    return in_memory(describe(expected, data, report), data, reason)


def in_memory(manifest: Manifest, data: bytes, reason: str) -> Entry:
    """An entry of freshly built bytes that stands in no directory."""
    name = entry_name(manifest.name, manifest.key)
    return Entry(name, manifest, data, path=None, lock_fd=None, built=True, reason=reason)
