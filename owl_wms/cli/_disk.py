"""Tells what the file system refuses from other errors: nobody's fault in the code, so one line, no traceback.

Why not everywhere an `OSError`: any other that gets this far is a mistake of ours, whose traceback is wanted.
"""

from __future__ import annotations

import errno

from owl_wms.files import refused_with

_CLOSED = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def disk_failure(error: BaseException) -> OSError | None:
    """The disk's refusal in an error or in what led to it (torch's writer raises RuntimeError after it), or None."""
    return refused_with(error, _FULL)


def closed_path(error: BaseException) -> OSError | None:
    """The refusal of a path that was given: a name that is too long, a circle of links, a closed folder."""
    failure = refused_with(error, _CLOSED)
    return failure if failure is not None and failure.filename else None


def described(failure: OSError) -> str:
    """`/data/x.npy: No space left on device`, without the file where it is not known."""
    return f"{failure.filename}: {failure.strerror}" if failure.filename else str(failure.strerror)
