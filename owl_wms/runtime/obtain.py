"""Obtains a slot's program once, for whoever decodes or steps, and counts what came of it.

Usage:
    if obtain(slot, find, ledger, strict=False):     # find() is Toolchain.obtain for the slot's request
        finite = slot.run(z, write, check=True)
"""

from __future__ import annotations

from collections.abc import Callable

from owl_wms.errors import FastPathError
from owl_wms.runtime.programs import Loaded
from owl_wms.runtime.slot import Slot
from owl_wms.runtime.stats import Ledger


def obtain(slot: Slot, find: Callable[[], Loaded], ledger: Ledger, *, strict: bool) -> bool:
    """Returns whether there is a program; the first call finds or builds it, other threads wait meanwhile.

    Raises:
        FastPathError: there is none, and the caller is strict.
        Exception: one of the caller's, such as a time limit; see `owl_wms.interrupts`.
    """
    if slot.state == "new" and slot.rested():
        with slot.lock:
            if slot.state == "new" and slot.rested():
                _fill(slot, find, ledger, strict)
    failure = slot.failure
    if failure is not None and strict:
        raise failure.again()
    return slot.state == "ready"


def _fill(slot: Slot, find: Callable[[], Loaded], ledger: Ledger, strict: bool) -> None:
    try:
        loaded = find()
    except FastPathError as failure:
        slot.switch_off(failure.sentence, failure)
        if failure.quiet:
            ledger.note(failure.reason, f"PyTorch decodes: {failure.sentence}")
        else:
            ledger.failure(failure, raised=strict)
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
