"""Whether a file on a mounted file system is this process's alone."""

from __future__ import annotations

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
    try:
        fd = os.open(path, _FLAGS)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return None
        # The holder of a lease is told by a signal that somebody waits: SIGIO, which ends a process; this one does not.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return status.st_size
    except OSError:
        return None
    finally:
        os.close(fd)
