"""Whether a file on a mounted file system is this process's alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat

_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def nbytes_if_unshared(path: str) -> int | None:
    """The size of a file that has one name, and that nobody has open or mapped, in this process or another.

    None for any other file, and where the system does not tell.  Linux does: it grants a lease for writing only then
    (fcntl(2), "Leases"), to the owner of the file.  Whoever opens the file meanwhile waits until it is given back.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    nbytes = None
    with contextlib.suppress(OSError):  # one of which says that somebody else has it open
        fd = os.open(path, _FLAGS)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                # The holder of a lease is told by a signal that somebody waits: by SIGIO, which would end the process.
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                nbytes = status.st_size
        finally:
            os.close(fd)
    return nbytes
