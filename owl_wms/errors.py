"""The exceptions of owl_wms. Each has the path, key, shape or stage that explains it as an attribute.

Why one file: a caller can catch `OwlError` for everything that files, settings and machines cause, and a reader finds
all of it here. A wrong argument of a function inside the package is a ValueError. Messages state the rule, the value
received and, if there is one, the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MOST_SHOWN = 4000
"""Characters of a message; of a longer one its beginning and its end are kept."""


def printable(text: str, limit: int = MOST_SHOWN) -> str:
    """Returns text as one line that a terminal shows as it is: what is not printable becomes its escape (`\\n`).

    Names of files and of weights come from others. One with an escape sequence could rewrite a terminal, and one with a
    lone surrogate (bytes that are no UTF-8) cannot be printed at all.
    """
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-(limit // 2) :]}"
    if text.isprintable():
        return text
    escaped = (sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)
    return "".join(escaped)


class OwlError(Exception):
    """Base of all errors of this package; its message is made `printable`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Keeps the attributes when the error is copied, or crosses to another process."""
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[OwlError], args: tuple[Any, ...]) -> OwlError:
    return Exception.__new__(kind, *args)


class ConfigError(OwlError, ValueError):
    """A configuration file or value that cannot be used.

    Attributes:
        path: the file, or None when the value came from a call or the environment.
        key: dotted key inside it, for example `model.ch_max`.
    """

    def __init__(self, message: str, *, path: Path | str | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)
        self.key = key


class CheckpointError(OwlError, ValueError):
    """Weights that cannot be read or do not belong to the requested architecture.

    Attributes:
        path: the checkpoint file.
        mismatch: the first key or shape that disagrees, when that is the reason.
    """

    def __init__(self, message: str, *, path: Path | str, mismatch: str | None = None) -> None:
        super().__init__(message)
        self.path = Path(path)
        self.mismatch = mismatch


class LatentShapeError(OwlError, ValueError):
    """Latents whose rank or channel count a decoder cannot take.

    Attributes:
        got: shape received.
        expected: human-readable shape wanted, for example `[b, n, 128, h, w]`.
    """

    def __init__(self, message: str, *, got: tuple[int, ...], expected: str) -> None:
        super().__init__(message)
        self.got = got
        self.expected = expected


class DataError(OwlError, ValueError):
    """A data set, latent file or clip that cannot be used.

    Attributes:
        path: the file or folder.
        index: row, window or frame inside it, when that is known.
    """

    def __init__(self, message: str, *, path: Path | str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)
        self.index = index


class BatchError(OwlError, RuntimeError):
    """A run over a whole dataset that cannot go on: outputs cannot be written, or another run is writing them.

    Attributes:
        out: where the outputs go.
    """

    def __init__(self, message: str, *, out: str) -> None:
        super().__init__(message)
        self.out = out


class TrainingError(OwlError, RuntimeError):
    """A training run that cannot go on: its numbers are no longer finite, or another rank gave up.

    Attributes:
        step: optimiser steps done when it was noticed.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


FAILED = {
    "import": "Torch-TensorRT cannot be used",
    "export": "this decoder cannot be compiled",
    "build": "no program could be built",
    "parity": "a program's frames are not right",
    "save": "the program could not be saved",
    "load": "the program could not be loaded",
    "run": "the program cannot be used",
}
"""By stage, the words for a user: a failure's reason follows them after a colon."""


class FastPathError(OwlError, RuntimeError):
    """The compiled path failed at a stage; the caller normally gets PyTorch's answer instead of this.

    Attributes:
        stage: `import`, `export`, `build`, `parity`, `save`, `load` or `run`.
        reason: what happened, one sentence.
        remedy: what a user can do about it, one sentence.
        sentence: what failed (`FAILED`) and the reason, to be shown to a user.
        quiet: nothing is wrong, so it is logged at info level and not as a warning.
    """

    quiet = False

    def __init__(self, stage: str, reason: str, remedy: str = "") -> None:
        self.sentence = reason if self.quiet else f"{FAILED.get(stage, stage)}: {reason}"
        super().__init__(self.sentence + (f" ({remedy})" if remedy else ""))
        self.stage = stage
        self.reason = reason
        self.remedy = remedy

    def again(self) -> FastPathError:
        """Returns a new error with the same stage, reason and remedy. Store and raise the copy: the traceback of the
        original keeps the local variables of every frame it passed through (tensors, engines) in memory.
        """
        return FastPathError(self.stage, self.reason, self.remedy)


class NoDeviceError(FastPathError):
    """There is no GPU that the compiled path could run on, which is no fault."""

    quiet = True

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__("import", reason, remedy)

    def again(self) -> NoDeviceError:
        return NoDeviceError(self.reason, self.remedy)


class DecodeMemoryError(OwlError, MemoryError):
    """Not even one frame could be decoded, or the output could not be allocated, in the memory there is.

    Attributes:
        frames: how many frames were asked for at once when memory ran out.
        latent_shape: `(c, h, w)` of one latent frame.
    """

    def __init__(self, message: str, *, frames: int, latent_shape: tuple[int, ...]) -> None:
        super().__init__(message)
        self.frames = frames
        self.latent_shape = latent_shape


class NonFiniteError(OwlError, ArithmeticError):
    """Decoded frames or sound with NaN or infinity in them, where the caller asked for an error; or encoded latents.

    Attributes:
        frame: the first frame of the batch in which they are, counted through all clips; of sound, the first clip.
    """

    def __init__(self, message: str, *, frame: int) -> None:
        super().__init__(message)
        self.frame = frame


class CacheError(OwlError):
    """Base of what the on-disk cache refuses.

    Attributes:
        path: directory or file concerned.
    """

    def __init__(self, message: str, *, path: Path | str) -> None:
        super().__init__(message)
        self.path = Path(path)


class CacheCorruptError(CacheError):
    """An entry whose manifest, size or digest is wrong; it was not deserialized."""


class CacheRefusedError(CacheError):
    """A cache directory that cannot be trusted or used (ownership, mode, symlink, not a directory)."""
