"""Every error gpusaver raises on purpose.

::

    Error                                TensorFlow's class names (tf.errors.*), each also the fitting built-in
    ├── NotFoundError           LookupError        no such checkpoint, file or tensor
    ├── InvalidArgumentError    ValueError         shapes, dtypes, slices or names that do not fit
    ├── DataLossError           OSError            a checksum, length or structure is wrong: bytes were damaged
    ├── OutOfRangeError         EOFError           a data file ends before the bytes its index promises
    ├── FailedPreconditionError RuntimeError       the object is closed, forked, or otherwise not in a state to do this
    ├── ResourceExhaustedError  OSError            disk full, quota, too many open files, out of memory
    ├── PermissionDeniedError   OSError            read-only directory or file system, missing permission
    ├── UnknownError            OSError            any other failure that the operating system reported
    ├── DeadlineExceededError   TimeoutError       other ranks did not answer in time
    ├── UnimplementedError      NotImplementedError  a stored thing that gpusaver lists but cannot read
    ├── InternalError           RuntimeError       a bug in gpusaver, or in what wrote the file
    └── CancelledError          concurrent.futures.CancelledError   the save was cancelled

Where TensorFlow raises a built-in class (``TypeError`` for a wrong argument, ``ValueError`` for a missing
directory) so does gpusaver.  Errors of the operating system are translated in one place, ``from_os_error``.
"""

from __future__ import annotations

import concurrent.futures
import errno
from typing import Any


class Error(Exception):
    """Base of all errors below, with what ``tf.errors.OpError`` has.

    ``message``: the text.  ``code``: TensorFlow's number for the class.  ``op``, ``node_def``: the operation that
    failed and its NodeDef, in ``gpusaver.compat.v1``; else None.
    """

    code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.op: Any = None
        self.node_def: Any = None

    @property
    def error_code(self) -> int:
        return self.code

    def __str__(self) -> str:
        return self.message


class NotFoundError(Error, LookupError):
    """A checkpoint, a file or a tensor does not exist."""

    code = 5


class InvalidArgumentError(Error, ValueError):
    """Names, shapes, dtypes or slices do not fit together."""

    code = 3


class DataLossError(Error, OSError):
    """Stored bytes are not what was written.

    ``modified`` lists the names of variables whose memory a restore had already overwritten when the damage was
    found (empty if nothing was touched).
    """

    code = 15

    def __init__(self, message: str, *, modified: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.modified = modified


class OutOfRangeError(Error, EOFError):
    """A data file is shorter than its index says."""

    code = 11


class FailedPreconditionError(Error, RuntimeError):
    """The object is not in a state in which this call makes sense."""

    code = 9


class ResourceExhaustedError(Error, OSError):
    """Disk, quota, file descriptors or memory ran out."""

    code = 8


class PermissionDeniedError(Error, OSError):
    """The operating system refused access."""

    code = 7


class UnknownError(Error, OSError):
    """The operating system reported a failure without a class of its own here (``__cause__`` has it)."""


class DeadlineExceededError(Error, TimeoutError):
    """Other ranks did not take part in a save or a restore in time; ``ranks`` are those."""

    code = 4

    def __init__(self, message: str, *, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class UnimplementedError(Error, NotImplementedError):
    """The file holds something that gpusaver recognises but cannot read or write."""

    code = 12


class InternalError(Error, RuntimeError):
    """A broken promise inside gpusaver, or inside the program that wrote the file."""

    code = 13


class CancelledError(Error, concurrent.futures.CancelledError):
    """The save was cancelled before it was committed."""

    code = 1


_BY_ERRNO: dict[int, type[Error]] = {
    errno.ENOENT: NotFoundError,
    errno.ENOTDIR: NotFoundError,
    errno.ENOSPC: ResourceExhaustedError,
    errno.EDQUOT: ResourceExhaustedError,
    errno.EFBIG: ResourceExhaustedError,
    errno.ENOMEM: ResourceExhaustedError,
    errno.EMFILE: ResourceExhaustedError,
    errno.ENFILE: ResourceExhaustedError,
    errno.EACCES: PermissionDeniedError,
    errno.EPERM: PermissionDeniedError,
    errno.EROFS: PermissionDeniedError,
    errno.EISDIR: InvalidArgumentError,
    errno.ENAMETOOLONG: InvalidArgumentError,
    errno.EINVAL: InvalidArgumentError,
    errno.ELOOP: InvalidArgumentError,
}


def from_os_error(error: OSError, action: str, path: str) -> Error:
    """The member of the tree for ``error``, saying what was done to which path.

    Use as ``raise from_os_error(error, "write", path) from error``.  An error that is already of the tree is
    returned as it is.
    """
    if isinstance(error, Error):
        return error
    kind = _BY_ERRNO.get(error.errno or 0, UnknownError)
    reason = error.strerror or str(error)
    code = errno.errorcode.get(error.errno or 0, "no errno")
    translated = kind(f"cannot {action} {path}: {reason} ({code})")
    if isinstance(translated, OSError):
        translated.errno = error.errno
        translated.filename = path
    return translated
