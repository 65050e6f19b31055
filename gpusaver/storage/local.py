"""Files on a mounted file system, through the page cache or around it (O_DIRECT)."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import operator
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gpusaver.errors import Error, NotFoundError, OutOfRangeError, from_os_error
from gpusaver.storage import locks
from gpusaver.storage.base import LOCK_SECONDS, new_token
from gpusaver.storage.mapped import HUGE_NBYTES, HugePages, can_map
from gpusaver.storage.unshared import nbytes_if_unshared
from gpusaver.tensor import Buffer

#: What O_DIRECT wants of offset, length and address on every device in use (512 would do on some).
DIRECT_ALIGNMENT = 4096
#: pwritev refuses more buffers (EINVAL), and moves at most 2,147,479,552 bytes.
_MAX_BUFFERS = 1024
_MAX_BYTES = 0x7FFFF000

#: Where writing around the page cache was measured to be at least as fast as through it.  On network and parallel
#: file systems (NFS, Lustre) it is slower; tmpfs has no such thing.
DIRECT_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "f2fs"})

#: Where this host alone knows who has a file open, and where what is written over keeps its place.
RECYCLED_FILE_SYSTEMS = DIRECT_FILE_SYSTEMS | {"tmpfs"}

#: What file systems without reservation answer (FUSE, some network file systems); then ENOSPC shows when writing.
_CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


#: What says that there is no such file; any other error leaves that open.
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_WRITE_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FLAGS = _WRITE_FLAGS | os.O_CREAT | os.O_EXCL


@contextlib.contextmanager
def _translated(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except Error:  # some are OSErrors too
        raise
    except OSError as error:
        raise from_os_error(error, action, path) from error


#: From here on it pays to ask what kind of file it is.
_LONG_NBYTES = 1 << 20
#: Buffers of this size on average are coarse.
_COARSE_NBYTES = 64 * 1024
_NBYTES = operator.attrgetter("nbytes")
#: So short a way from one buffer's place to the next one's is read sooner than skipped.
_NEAR_NBYTES = 64 * 1024


def _move(call: Callable[[int, Any, int], int], fd: int, offset: int, buffers: Sequence[Buffer]) -> tuple[int, int]:
    """Runs ``os.pwritev`` or ``os.preadv`` until all is moved or nothing moves; the bytes moved, and those wanted."""
    pending = list(filter(_NBYTES, buffers))
    sizes = list(map(_NBYTES, pending))
    wanted = sum(sizes)
    moved = first = 0
    while moved < wanted:
        batch = pending[first : first + _MAX_BUFFERS]
        if batch[0].nbytes > _MAX_BYTES:
            batch = [_octets(batch[0])[:_MAX_BYTES]]
        count = call(fd, batch, offset + moved)
        moved += count
        if count == sum(sizes[first : first + _MAX_BUFFERS]):  # nearly always
            first += _MAX_BUFFERS
            continue
        if count == 0:
            break
        while first < len(pending) and count >= sizes[first]:
            count -= sizes[first]
            first += 1
        if count:
            pending[first] = _octets(pending[first])[count:]
            sizes[first] -= count
    return moved, wanted


def _joined(offsets: Sequence[int], buffers: Sequence[Buffer]) -> Iterator[tuple[int, int]]:
    """Where the disk had better read what lies near at once: offsets and lengths."""
    first = end = offsets[0]
    for offset, nbytes in zip(offsets, map(_NBYTES, buffers), strict=True):
        if offset - end > _NEAR_NBYTES:
            yield first, end - first
            first = offset
        end = max(end, offset + nbytes)
    yield first, end - first


def _copied(buffers: Sequence[Buffer]) -> memoryview:
    copy = np.frombuffer(mmap.mmap(-1, sum(map(_NBYTES, buffers))), np.uint8)
    np.concatenate([np.frombuffer(buffer, np.uint8) for buffer in buffers], out=copy)
    return copy.data


def _octets(buffer: Buffer) -> memoryview:
    return np.frombuffer(buffer, np.uint8).data  # memoryview() knows no bfloat16


class LocalWritableFile:
    """See :class:`gpusaver.storage.base.WritableFile`."""

    ordered = False

    def __init__(self, path: str, fd: int, nbytes: int, alignment: int, *, is_in_memory: bool = False) -> None:
        self.alignment = alignment
        self._path = path
        self._fd = fd
        self._nbytes = nbytes
        self._huge_pages = HugePages(fd) if is_in_memory and can_map() else None
        self._is_padded = False
        self._aborted = False
        self._turn = threading.Lock()

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        # Many short buffers keep the interpreter busy: threads would take turns for it and for the file, and do no two
        # things at once.
        nbytes = sum(map(_NBYTES, buffers))
        is_coarse = nbytes >= len(buffers) * _COARSE_NBYTES
        if is_coarse and self._write_mapped(offset, nbytes, buffers):
            return
        # The page cache lets one thread write to a file at a time; others that wait in the kernel keep cores busy.
        turn = self._turn if is_coarse and self.alignment == 1 else contextlib.nullcontext()
        with _translated("write", self._path), turn:
            try:
                moved, wanted = _move(os.pwritev, self._fd, offset, buffers)
            except OSError as error:
                if error.errno != errno.EFAULT or self.alignment == 1:
                    raise
                # Memory of which the kernel cannot hold the pages while a disk reads them, such as a driver's.
                moved, wanted = _move(os.pwritev, self._fd, offset, [_copied(buffers)])
            if moved != wanted:
                raise OSError(errno.EIO, "wrote nothing")
        if self.alignment > 1 and offset + wanted > self._nbytes:
            self._is_padded = True

    def _write_mapped(self, offset: int, nbytes: int, buffers: Sequence[Buffer]) -> bool:
        huge_pages = self._huge_pages  # another thread may give them up
        if huge_pages is None or nbytes < HUGE_NBYTES or offset % HUGE_NBYTES:
            return False
        is_written = huge_pages.write(offset, nbytes, list(filter(_NBYTES, buffers)))
        if not is_written:
            self._huge_pages = None
        return is_written

    def sync(self) -> None:
        if self._fd < 0:  # closed, or a link
            return
        with _translated("sync", self._path):
            if self._is_padded:
                os.ftruncate(self._fd, self._nbytes)
            _full_sync(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with _translated("close", self._path):
                os.close(fd)

    def abort(self) -> None:
        with contextlib.suppress(Error):
            self.close()
        if not self._aborted:
            self._aborted = True
            with contextlib.suppress(OSError):
                os.unlink(self._path)


class LocalReadableFile:
    """See :class:`gpusaver.storage.base.ReadableFile`."""

    parallel_reads = 1

    def __init__(self, path: str, fd: int, size: int) -> None:
        self.size = size
        self._path = path
        self._fd = fd
        self._turn = threading.Lock()

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        turn = self._turn if self._is_cold(offset, buffers) else contextlib.nullcontext()
        with _translated("read", self._path), turn:
            moved, wanted = _move(os.preadv, self._fd, offset, buffers)
        if moved != wanted:
            raise OutOfRangeError(
                f"{self._path} ends at byte {offset + moved}: expected {wanted} at offset {offset}, found {moved}. "
                "The file was cut short"
            )

    def read_each(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        if self._waits(offsets[0]):
            with contextlib.suppress(OSError):  # a hint
                for first, nbytes in _joined(offsets, buffers):
                    os.posix_fadvise(self._fd, first, nbytes, os.POSIX_FADV_WILLNEED)
        read: Callable[[int, Any, int], int] = os.preadv
        with _translated("read", self._path):
            for offset, buffer in zip(offsets, buffers, strict=True):
                if read(self._fd, (buffer,), offset) != buffer.nbytes:
                    self.read_into(offset, [buffer])  # all of it, or what is wrong

    def _is_cold(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Whether a long read has to wait for the disk.

        Threads take turns for it: the kernel reads ahead, in large requests, of one that goes through a file in order.
        """
        return sum(map(_NBYTES, buffers[:2])) >= _LONG_NBYTES and self._waits(offset)

    def _waits(self, offset: int) -> bool:
        """Whether the byte there is not in memory; False where the system does not say."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError as error:  # others: of a file system that cannot say
            return isinstance(error, BlockingIOError)
        return False

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with _translated("close", self._path):
                os.close(fd)


class LocalStorage:
    """See :class:`gpusaver.storage.base.Storage`.  Relative paths are relative to the current directory."""

    def __init__(self) -> None:
        self._direct: dict[int, bool] = {}
        self._lock = threading.Lock()

    def create(self, path: str, nbytes: int, *, direct: bool = False, target: str | None = None) -> LocalWritableFile:
        with _translated("create", path):
            fd, alignment = _open(path, _CREATE_FLAGS, direct)
        return _reserved(path, fd, nbytes, alignment)

    def recycle(self, path: str, spare: str) -> int | None:
        version = self.version(path)
        if version is None or file_system(version[0]) not in RECYCLED_FILE_SYSTEMS:
            self.remove(path)
            return None
        with _translated("rename", path):
            os.replace(path, spare)  # before it is asked who has it open: from now on nobody opens it
        nbytes = nbytes_if_unshared(spare)
        if nbytes is None:
            self.remove(spare)
        return nbytes

    def reuse(self, spare: str, path: str, nbytes: int, *, direct: bool = False) -> LocalWritableFile | None:
        try:
            # Or a crash might bring back the old name, and with it a checkpoint, of bytes that are no more.
            self.sync_directory(os.path.dirname(path))
            with _translated(f"rename {spare} to", path):
                os.replace(spare, path)
            with _translated("open", path):
                fd, alignment = _open(path, _WRITE_FLAGS, direct)
        except NotFoundError:
            return None
        except BaseException:
            for left in (spare, path):
                with contextlib.suppress(OSError):
                    os.unlink(left)
            raise
        return _reserved(path, fd, nbytes, alignment, is_used=True)

    def prefers_direct(self, directory: str) -> bool:
        if not _O_DIRECT:
            return False
        directory = directory or "."
        with _translated("look at", directory):
            device = os.stat(directory).st_dev
        with self._lock:
            if device not in self._direct:
                self._direct[device] = file_system(device) in DIRECT_FILE_SYSTEMS and _direct_works(directory)
            return self._direct[device]

    def open(self, path: str, *, uncached: bool = False) -> LocalReadableFile:
        with _translated("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EISDIR, "not a regular file")
            except OSError:
                os.close(fd)
                raise
        if uncached:
            _drop_cache(fd)
        return LocalReadableFile(path, fd, status.st_size)

    def exists(self, path: str) -> bool:
        """Whether ``path`` is a regular file."""
        status = _status(path)
        return status is not None and stat.S_ISREG(status.st_mode)

    def is_directory(self, path: str) -> bool:
        status = _status(path or ".")
        return status is not None and stat.S_ISDIR(status.st_mode)

    def version(self, path: str) -> tuple[int, ...] | None:
        try:
            status = os.lstat(path)
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def link(self, source: str, path: str, *, target: str | None = None) -> LocalWritableFile | None:
        try:
            os.link(source, path)
        except OSError:  # none is there, too many are, or the file system has no such thing
            return None
        return LocalWritableFile(path, -1, 0, 1)

    def modified_time(self, path: str) -> float:
        with _translated("look at", path):
            return os.stat(path).st_mtime

    def list(self, directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory or "."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise from_os_error(error, "list", directory) from error

    def make_directory(self, path: str) -> None:
        with _translated("make directory", path), contextlib.suppress(FileExistsError):
            os.mkdir(path)
            self.sync_directory(os.path.dirname(path))

    def replace(self, source: str, target: str) -> None:
        with _translated(f"rename {source} to", target):
            os.replace(source, target)

    def remove(self, path: str) -> None:
        with _translated("remove", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def sync_directory(self, path: str) -> None:
        with _translated("sync directory", path):
            fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _full_sync(fd)
            finally:
                os.close(fd)

    def lock(self, path: str, *, wait_seconds: float = LOCK_SECONDS) -> locks.FileLock:
        with _translated("lock", path):
            return locks.acquire(path, wait_seconds)

    def free_nbytes(self, directory: str) -> int | None:
        with _translated("look at", directory):
            status = os.statvfs(directory or ".")
        return status.f_bavail * status.f_frsize


def _status(path: str) -> os.stat_result | None:
    """None if nothing is there, or nothing can be.  Unlike os.path.isfile: a failing disk is no answer."""
    with _translated("look at", path):
        try:
            return os.stat(path)
        except ValueError:  # a null byte
            return None
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise


def _open(path: str, flags: int, direct: bool) -> tuple[int, int]:
    """The descriptor, and the alignment of what is written."""
    if direct and _O_DIRECT:
        # EINVAL: the file system has no O_DIRECT.  The page cache serves as well, so this is no error.
        try:
            return os.open(path, flags | _O_DIRECT, 0o666), DIRECT_ALIGNMENT
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if flags & os.O_CREAT:  # Linux creates the file before it finds that the flag does not fit
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
    return os.open(path, flags, 0o666), 1


def _reserved(path: str, fd: int, nbytes: int, alignment: int, *, is_used: bool = False) -> LocalWritableFile:
    """The file, which may have a content already, with its size and the room for it."""
    try:
        with _translated(f"reserve {nbytes} bytes for", path):
            is_in_memory = nbytes >= _LONG_NBYTES and file_system(os.fstat(fd).st_dev) == "tmpfs"
            if is_used:
                os.ftruncate(fd, nbytes)
            _reserve(fd, nbytes, is_in_memory=is_in_memory)
    except BaseException:
        LocalWritableFile(path, fd, nbytes, alignment).abort()
        raise
    return LocalWritableFile(path, fd, nbytes, alignment, is_in_memory=is_in_memory)


def _reserve(fd: int, nbytes: int, *, is_in_memory: bool) -> None:
    """Fails with ENOSPC now rather than after minutes of copying, and keeps the file in few extents."""
    if nbytes == 0:
        return
    # In memory every page would be cleared first, which takes as long as to fill it.
    if hasattr(os, "posix_fallocate") and not is_in_memory:
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
    os.ftruncate(fd, nbytes)


def _drop_cache(fd: int) -> None:
    """Of pages that have been written back; those that another process has mapped stay."""
    with contextlib.suppress(OSError):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        elif sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def _full_sync(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        # fsync on macOS leaves the bytes in the drive's cache.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


@functools.lru_cache(maxsize=64)
def file_system(device: int) -> str:
    """Type of the mounted file system with this device number, as Linux names it; "" if unknown."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.split()
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass
    return ""


def _direct_works(directory: str) -> bool:
    """Tries one aligned block.  A refusal (EINVAL, EFAULT) shows here, not in the middle of a save."""
    path = os.path.join(directory, f"probe.{new_token()}.gpusaver-tmp")
    block = mmap.mmap(-1, DIRECT_ALIGNMENT)
    fd = -1
    try:
        fd = os.open(path, _CREATE_FLAGS | _O_DIRECT, 0o600)
        return os.pwrite(fd, block, 0) == DIRECT_ALIGNMENT
    except OSError:
        return False
    finally:
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(OSError):  # it may be there even if it could not be opened
            os.unlink(path)
        block.close()
