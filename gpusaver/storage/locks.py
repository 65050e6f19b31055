"""Advisory locks on a mounted file system: one owner at a time, among the threads and processes of all hosts.

::

    X.gpusaver-lock     {"pid": 4711, "host": "node3", "since": "2026-11-25T22:13:00+00:00"}

The lock is the kernel's (``flock``), and ends with its owner, however that ends: no lock is ever stale, and a file
that a killed owner left is taken over.  What the file says is for people.  It is removed while the lock is still held,
so whoever gets the lock of a file looks whether that file still has the name.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import stat
import threading
import time

from gpusaver.errors import FailedPreconditionError
from gpusaver.storage.base import host_name

#: What file systems without locks answer.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_POLL_SECONDS = 0.01
_RECORD_LIMIT_BYTES = 1024
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

_log = logging.getLogger("gpusaver")
_warned: set[int] = set()


class FileLock:
    """See :class:`gpusaver.storage.base.Lock`."""

    def __init__(self, path: str, fd: int) -> None:
        self.is_exclusive = fd >= 0
        self._path = path
        self._fd = fd
        self._process = os.getpid()
        if fd >= 0:
            _held.add(fd)

    def release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0 or os.getpid() != self._process:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing would leave it to a child forked by other means than Python's
        _held.discard(fd)
        with contextlib.suppress(OSError):  # the descriptor is free all the same
            os.close(fd)

    def __del__(self) -> None:
        self.release()


#: Descriptors of all locks of this process.  A forked child closes its copies, or it would keep the locks when its
#: parent has died.
_held: set[int] = set()


def _close_in_child() -> None:
    for fd in list(_held):
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def acquire(path: str, wait_seconds: float) -> FileLock:
    """Takes the lock, waiting for it so long.  Raises FailedPreconditionError naming the owner, or OSError."""
    deadline = time.monotonic() + wait_seconds
    while True:
        fd = os.open(path, _FLAGS, 0o666)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            is_ours = _try_lock(fd)
            if is_ours is None:
                _warn_once(status.st_dev, path)
                os.unlink(path)
                return FileLock(path, -1)
            if is_ours and _has_name(status, path):
                _write_record(fd)
                lock = FileLock(path, fd)
                fd = -1
                return lock
            owner = "" if is_ours else _owner(fd)
        finally:
            if fd >= 0:
                os.close(fd)
        if not is_ours:
            if time.monotonic() >= deadline:
                raise FailedPreconditionError(
                    f"cannot lock {path}: held by {owner}. Two Savers must not write the same file at the same time: "
                    "wait for the other one, end it, or save elsewhere"
                )
            time.sleep(_POLL_SECONDS)


def _try_lock(fd: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def _has_name(status: os.stat_result, path: str) -> bool:
    try:
        return os.path.samestat(status, os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_record(fd: int) -> None:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = json.dumps({"pid": os.getpid(), "host": host_name(), "since": since}).encode()
    with contextlib.suppress(OSError):  # on a full disk the lock serves without a record
        os.ftruncate(fd, 0)
        os.pwrite(fd, record, 0)


def _owner(fd: int) -> str:
    try:
        record = json.loads(os.pread(fd, _RECORD_LIMIT_BYTES, 0))
        pid, host, since = int(record["pid"]), str(record["host"]), str(record["since"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process, which left no record"
    this = ", this one," if (pid, host) == (os.getpid(), host_name()) else ""
    return f"process {pid}{this} on host {host} since {since}"


def _warn_once(device: int, path: str) -> None:
    with _warning:
        is_new = device not in _warned
        _warned.add(device)
    if is_new:
        _log.warning("%s: this file system has no locks; two Savers with one prefix would disturb each other", path)


_warning = threading.Lock()
