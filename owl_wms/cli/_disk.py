"""A full or read-only disk, told apart from other errors: nobody's fault in the code, and so one line, no traceback.

Why not everywhere an `OSError`: any other that gets this far is a mistake of ours, whose traceback is wanted.
"""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def disk_failure(error: BaseException) -> OSError | None:
    """The disk's refusal in an error or in what led to it (torch's writer raises RuntimeError after it), or None."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return found
        found = found.__cause__ or found.__context__
    return None


def described(failure: OSError) -> str:
    """`/data/x.npy: No space left on device`, without the file where it is not known."""
    return f"{failure.filename}: {failure.strerror}" if failure.filename else str(failure.strerror)
