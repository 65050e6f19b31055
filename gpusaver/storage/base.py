"""The narrow interface between gpusaver and whatever keeps files.

Paths are ``str``.  Everything raises members of :mod:`gpusaver.errors`, never a bare OSError.  A storage object may
be used from any thread; a file object too, unless :attr:`WritableFile.ordered` says that offsets must ascend.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from gpusaver.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from gpusaver.tensor import Buffer

#: How long a lock is waited for.  Only a save of that very prefix holds it longer, or a process that was stopped.
LOCK_SECONDS = 10.0

#: As in :mod:`gpusaver.bundle.filenames`: for storages that must know these names from others.
TEMPORARY_SUFFIX = ".gpusaver-tmp"
LOCK_SUFFIX = ".gpusaver-lock"


class ChangedError(FailedPreconditionError):
    """A file is not what it was when its lock was taken, because that keeps nobody out (``is_exclusive`` False)."""


class WritableFile(Protocol):
    """A file that nobody else sees under its final name yet."""

    #: Offsets, lengths and buffer addresses must be multiples of this.  Only the last write may end beyond the file's
    #: size: the excess is cut off by :meth:`sync`.  1: no demand, and the file grows as it is written.
    alignment: int
    #: True if offsets must ascend, from one thread at a time (object stores).  What is left out becomes zeros.
    ordered: bool

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes the buffers one after the other from ``offset`` on.  All of it, or an error."""

    def sync(self) -> None:
        """Returns when every byte written is on stable storage."""

    def close(self) -> None:
        """Idempotent."""

    def abort(self) -> None:
        """Closes and removes the file.  Never raises."""


class ReadableFile(Protocol):
    size: int
    #: How many reads at a time are worth having.
    parallel_reads: int

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fills the buffers one after the other from ``offset`` on; OutOfRangeError if the file ends before."""

    def read_each(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        """:meth:`read_into` for each offset, into the buffer beside it: short ones, far apart, at least one."""

    def close(self) -> None:
        """Idempotent."""


class Lock(Protocol):
    #: False where the storage has no locks: then nobody is kept out.
    is_exclusive: bool

    def release(self) -> None:
        """Idempotent.  Never raises.  Does nothing in a forked child, which does not have the lock."""


class Storage(Protocol):
    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> WritableFile:
        """A new file of ``nbytes`` bytes, space reserved; an existing ``path`` is an error.

        ``direct=True`` asks to bypass the page cache where that works; the file's ``alignment`` tells the outcome.
        ``target``: the name that :meth:`replace` will give it, which no file has yet.  Where nothing can be renamed it
        is written there at once (FailedPreconditionError if somebody else was faster), and what has a temporary name
        and no target is kept in memory until then.
        """

    def recycle(self, path: str, spare: str) -> int | None:
        """:meth:`remove`; but a file that nobody else has open, under no other name, may get the name ``spare``.

        Then :meth:`reuse` can write over it, and this returns its size.
        """

    def reuse(self, spare: str, path: str, nbytes: int, *, direct: bool = False) -> WritableFile | None:
        """:meth:`create`, of what :meth:`recycle` has kept in the same directory: old bytes stay until written over.

        The removal is on stable storage before the first of them changes.  None if that file is gone.
        """

    def prefers_direct(self, directory: str) -> bool:
        """Whether large files in this directory profit from ``direct=True`` (probed once, then remembered)."""

    def open(self, path: str, *, uncached: bool = False) -> ReadableFile:
        """``uncached``: what is read comes from the medium, not from memory, as far as the system lets itself be asked.

        NotFoundError if there is no such file.
        """

    def exists(self, path: str) -> bool:
        """Whether there is such a file; an error if that cannot be found out."""

    def is_directory(self, path: str) -> bool: ...

    def version(self, path: str) -> Hashable | None:
        """Of a file that nobody writes any more: equal as long as it is the same with the same content.

        None if there is no such file, or no telling.
        """

    def link(self, source: str, path: str, *, target: str | None = None) -> WritableFile | None:
        """Makes ``path``, which does not exist, the same file as ``source``, or one like it; None where that cannot be.

        It is complete, closed, and as durable as the source but for its name; ``abort`` removes that name.
        ``target``: as for :meth:`create`.  Object stores copy, and only to a ``target``.
        """

    def modified_time(self, path: str) -> float:
        """Seconds since the epoch; NotFoundError if there is no such file."""

    def list(self, directory: str) -> list[str]:
        """Base names in a directory, sorted; empty if it does not exist."""

    def make_directory(self, path: str) -> None:
        """Creates the last level, where there are such things; nothing happens if it exists.

        NotFoundError if there is no such parent.
        """

    def replace(self, source: str, target: str) -> None:
        """Renames atomically, replacing ``target``.

        ChangedError if ``target`` is locked here, by a lock that keeps nobody out, and somebody else has replaced it.
        """

    def remove(self, path: str) -> None:
        """Removes a file; nothing happens if it does not exist."""

    def sync_directory(self, path: str) -> None:
        """Returns when creations, renames and removals in the directory are on stable storage."""

    def lock(self, path: str, *, wait_seconds: float = LOCK_SECONDS) -> Lock:
        """Takes the advisory lock ``path``: of all Savers, in this process or any other, one at a time has it.

        The lock of a process that has died is free.  FailedPreconditionError naming the owner after ``wait_seconds``.
        """

    def free_nbytes(self, directory: str) -> int | None:
        """Bytes that can still be written below the directory; None if there is no telling."""


def new_token() -> str:
    """For the name of a temporary file: 16 hex digits, the first four of which stand for this host."""
    return f"{_host_digits()}{os.urandom(6).hex()}"


def is_token_of_this_host(token: str) -> bool:
    """May be wrong once in 65,536 other hosts."""
    return token.startswith(_host_digits())


def host_name() -> str:
    """What ``socket.gethostname`` says; loading ``socket`` is left out of ``import gpusaver``."""
    return os.uname().nodename


def _host_digits() -> str:
    return f"{zlib.crc32(host_name().encode()) & 0xFFFF:04x}"


def read_bytes(
    storage: Storage,
    path: str,
    *,
    limit: int | None = None,
    check_end: Callable[[bytes, int, str], None] | None = None,
) -> bytes:
    """The content of a small file.  ``limit`` (bytes) guards against absurd sizes: InvalidArgumentError beyond it.

    ``check_end(its last 64 bytes or fewer, its size, its path)`` may raise before the rest is read.
    ResourceExhaustedError if there is no memory for it.
    """
    file = storage.open(path)
    try:
        if limit is not None and file.size > limit:
            raise InvalidArgumentError(f"{path} has {file.size} bytes, expected at most {limit}")
        if check_end is not None:
            end = bytearray(min(file.size, 64))
            file.read_into(file.size - len(end), [memoryview(end)])
            check_end(bytes(end), file.size, path)
        data = bytearray(file.size)
        file.read_into(0, [memoryview(data)])
        return bytes(data)
    except MemoryError as error:
        raise ResourceExhaustedError(f"{path}: no memory for its {file.size} bytes") from error
    finally:
        file.close()


def write_bytes(storage: Storage, path: str, temporary: str, data: bytes) -> None:
    """Replaces ``path`` atomically and durably by a file with this content, by way of the name ``temporary``.

    On any error ``temporary`` is gone and ``path`` is as it was.
    """
    file = storage.create(temporary, len(data))
    try:
        file.write_at(0, [memoryview(data)])
        file.sync()
        file.close()
        storage.replace(temporary, path)
    except BaseException:
        file.abort()
        raise
    storage.sync_directory(os.path.dirname(path))
