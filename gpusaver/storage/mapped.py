"""Long writes to files in memory (tmpfs), by a copy into a mapping of huge pages.

``pwritev`` makes such a file of pages of 4 KiB, under a lock: 2.8 GB/s, from however many threads.  Here the kernel
makes pages of 2 MiB, also where the file system is mounted without them, and all threads fill theirs at once.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpusaver.tensor import Buffer

HUGE_NBYTES = 2 << 20
_PAGE_NBYTES = 4096
#: For a huge page, which takes 0.25 ms, or 4 where a virtual machine has handed it back to its host.  Its bytes take
#: 0.9 ms by pwritev, which one thread does at a time.
PAGE_SECONDS = 1.2e-3
#: Beyond that, for those of one file: where some are slow not all are.
SPARE_SECONDS = 0.1

#: Linux's numbers, of which Python has only some.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23  # Linux 5.14 and later
_MADV_COLLAPSE = 25  # Linux 6.1 and later
_FAILED = ctypes.c_void_p(-1).value


def can_map() -> bool:
    """Whether :class:`HugePages` works here."""
    return sys.platform == "linux" and sys.maxsize >= 1 << 32 and mmap.PAGESIZE == _PAGE_NBYTES


class HugePages:
    """Of one file; its threads may use it at once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._spare = SPARE_SECONDS

    def write(self, offset: int, nbytes: int, buffers: Sequence[Buffer]) -> bool:
        """Whether ``buffers``, of ``nbytes`` in all, are there now; if not, it and those to come had better be
        :func:`os.pwritev`, which also says what is wrong if something is.

        Requires: ``offset`` is a multiple of HUGE_NBYTES; no buffer is empty; nobody cuts the file short meanwhile.
        """
        map_, unmap, advise = _calls()
        # The address must be a multiple of 2 MiB too: there is room for the next one.
        room = nbytes + HUGE_NBYTES
        reserved = map_(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        if reserved == _FAILED:
            return False
        try:
            start = -(-reserved // HUGE_NBYTES) * HUGE_NBYTES
            access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
            if map_(start, nbytes, access, kind, self._fd, offset) == _FAILED:
                return False
            end = start + nbytes
            begun_at = time.perf_counter()
            for address in range(start, end, HUGE_NBYTES):
                advise(address, _PAGE_NBYTES, _MADV_POPULATE_WRITE)  # a hole alone does not collapse
                if advise(address, min(HUGE_NBYTES, end - address), _MADV_COLLAPSE):
                    return False
                before, begun_at = begun_at, time.perf_counter()
                # Threads that change it at once make it wrong by a page.
                self._spare = min(self._spare + PAGE_SECONDS - (begun_at - before), SPARE_SECONDS)
                if self._spare < 0:
                    return False
            # Once all pages are there no access fails, which would end the process (SIGBUS).
            if advise(start, nbytes, _MADV_POPULATE_WRITE):
                return False
            target = np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(start)), np.uint8)
            np.concatenate([np.frombuffer(buffer, np.uint8) for buffer in buffers], out=target)
            return True
        finally:
            unmap(reserved, room)


@functools.cache
def _calls() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The system's mmap, munmap and madvise: Python's take no address."""
    system = ctypes.CDLL(None)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    system.mmap.argtypes, system.mmap.restype = [pointer, size, number, number, number, ctypes.c_int64], pointer
    system.munmap.argtypes = [pointer, size]
    system.madvise.argtypes = [pointer, size, number]
    return system.mmap, system.munmap, system.madvise
