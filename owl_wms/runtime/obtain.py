"""Obtains a slot's program once, for decodes and for steps of a stream, and counts the result.

A program is found or built in the thread that decodes first, or, with `background`, in a thread of its own: then
PyTorch decodes until the program is ready. A program that is in the cache is waited for in both cases.

Usage:
    if obtain(slot, find, ledger, strict=False):     # find(progress) is Toolchain.obtain for the slot's request
        finite = slot.run(z, write, check=True)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from owl_wms import ending
from owl_wms.errors import FastPathError
from owl_wms.runtime.programs import MISSED, Loaded, Progress
from owl_wms.runtime.slot import Slot
from owl_wms.runtime.stats import Ledger

Find = Callable[[Progress | None], Loaded]


def obtain(
    slot: Slot,
    find: Find,
    ledger: Ledger,
    *,
    strict: bool,
    progress: Progress | None = None,
    background: bool = False,
    wait: bool = False,
) -> bool:
    """Returns whether there is a program; the first call finds or builds it, other threads wait meanwhile.

    Args:
        slot: of the program.
        find: finds or builds it, and calls the progress that it is given.
        ledger: counts.
        strict: raise if there is none.
        progress: receives build events.
        background: return False, in this and other threads, while a program is built.
        wait: wait for what is built in the background, whoever began it; other threads do not.

    Raises:
        FastPathError: there is none, and the caller is strict.
        Exception: one of the caller's, such as a time limit; see `owl_wms.interrupts`.
    """
    if background:
        if slot.state == "new" and slot.rested() and not _begin(slot, find, ledger, strict, progress) and not wait:
            return False
        if wait and slot.state == "building":
            with slot.lock:  # held by whoever is just starting the thread
                search = slot.search
            if search is not None:
                search.join()
    elif slot.state == "new" and slot.rested():
        with slot.lock:
            if slot.state == "new" and slot.rested():
                _fill(slot, lambda: find(progress), ledger, strict)
    failure = slot.failure
    if failure is not None and strict:
        raise failure.again()
    return slot.state == "ready"


def _begin(slot: Slot, find: Find, ledger: Ledger, strict: bool, progress: Progress | None) -> bool:
    """Starts the search in a thread of its own. Returns True once it has ended, False if something is to be built."""
    settled, missed = threading.Event(), threading.Event()

    def tell(event: dict[str, Any]) -> None:
        if event.get("stage") == MISSED:
            missed.set()
            settled.set()
        if progress is not None:
            progress(event)

    def work() -> None:
        try:
            _fill(slot, lambda: find(tell), ledger, strict)
        except FastPathError:
            pass  # the slot holds it, and the next call of a strict caller raises it
        except Exception as error:  # no caller is here to raise it to, nor to make a time limit of its own
            failure = FastPathError("build", f"{type(error).__name__}: {error}", "run owl-wms doctor")
            _give_up(slot, failure, ledger, strict)
        finally:
            settled.set()

    with slot.lock:
        if slot.state == "new":
            try:
                slot.begin(lambda: ending.begin(work, name="owl-wms-program"))
            except RuntimeError as error:  # the system gives no more threads, or the interpreter is shutting down
                remedy = "end other threads, or set TENSORRT_BUILD=wait"
                _give_up(slot, FastPathError("build", f"no thread to build in: {error}", remedy), ledger, strict)
                settled.set()
        else:  # another thread was faster
            settled.set()
    settled.wait()
    return not missed.is_set()


def _fill(slot: Slot, find: Callable[[], Loaded], ledger: Ledger, strict: bool) -> None:
    try:
        loaded = find()
    except FastPathError as failure:
        _give_up(slot, failure, ledger, strict)
        if strict:
            raise
        return
    except Exception:
        slot.rest()
        raise
    slot.accept(loaded)
    ledger.add("builds" if loaded.built else "hits")
    ledger.spend("build", loaded.build_seconds)
    ledger.spend("load", loaded.load_seconds)
    shape = slot.request.input_shape
    ledger.note(f"ready {shape}", f"{slot.reason} decodes {list(shape)}")


def _give_up(slot: Slot, failure: FastPathError, ledger: Ledger, strict: bool) -> None:
    slot.switch_off(failure.sentence, failure)
    if failure.quiet or ending.over():
        ledger.note(failure.reason, f"PyTorch decodes: {failure.sentence}")
    else:
        ledger.failure(failure, raised=strict)
