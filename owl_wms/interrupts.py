"""Exceptions that a signal handler of the caller raised: a time limit of a job runner or of a test, say.

Why it exists: such a handler runs between any two instructions, also inside our work, and an exception of its own class
looks like a failure of that work. To answer it by falling back would make the caller's time limit vanish.

Usage:
    try:
        build()
    except Exception as error:
        raise_interrupt(error)      # raises the handler's exception if `error` is one, or came of one
"""

from __future__ import annotations

import signal
from types import CodeType, FrameType, TracebackType
from typing import Any


def raise_interrupt(error: BaseException) -> None:
    """Raise the exception of a signal handler that `error` is, or that led to it; return otherwise.

    One that a caller further up was handling already, when it called us (to try again after its time limit, say), did
    not lead to `error`, though Python names it as the context.
    """
    codes = _handlers()
    found: BaseException | None = error
    seen: set[int] = set()
    callers = _callers_of(error) if codes else set()
    while codes and found is not None and id(found) not in seen:
        if found is not error and _caught_in(found) in callers:
            return
        if _passed(found.__traceback__, codes):
            raise found
        seen.add(id(found))
        found = found.__cause__ or found.__context__


def _caught_in(error: BaseException) -> FrameType | None:
    """Returns the frame that has caught an exception, or in which it was raised if none has."""
    return None if error.__traceback__ is None else error.__traceback__.tb_frame


def _callers_of(error: BaseException) -> set[FrameType | None]:
    frame, found = _caught_in(error), set[FrameType | None]()
    while frame is not None:
        frame = frame.f_back
        found.add(frame)
    return found - {None}


def _handlers() -> set[CodeType]:
    """Returns the code of the Python functions that are signal handlers now."""
    codes: set[CodeType] = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        handler = getattr(handler, "func", handler)  # functools.partial
        for function in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004  (its code is wanted)
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType):
                codes.add(code)
    return codes


def _passed(traceback: TracebackType | None, codes: set[CodeType]) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False
