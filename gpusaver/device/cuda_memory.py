"""Memory of gpusaver's own for copies: page-locked on the host, and private on the device.

::

    PinnedBuffer    a slot of the ring: 8 MiB of page-locked memory, whole pages
    DeviceBuffer    room for one chunk, in which it is gathered or from which it is scattered
    Table           what one launch of a kernel reads: page-locked, and as many bytes on the device
    Image           a snapshot, in blocks of at most 256 MiB

The slots are ``mmap`` registered with CUDA: page-aligned, so that O_DIRECT takes them as well, and not inherited by
forked children, whose writes would otherwise move their pages under a copy (cudaHostAlloc promises neither).  The
device's memory is allocated past CuPy's pool, whose arenas belong to the calling thread's streams, and whose
out-of-memory path frees the user's blocks.

What queued work uses must stay until somebody has waited for that work: :class:`Held` keeps it, and lends buffers from
a :class:`Pool`, so that no destructor and no traceback decides when memory is free.  Destructors free what a Saver had
that nobody closed.  In a forked child, where CUDA must not be called, freeing does nothing.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import cupy
import numpy as np
import numpy.typing as npt

from gpusaver.device.cuda_streams import on_device
from gpusaver.errors import ResourceExhaustedError

#: cudaHostRegisterPortable and cudaHostAllocPortable: pinned for every device of the process.
_PORTABLE = 1
_OUT_OF_MEMORY = 2


class _Owner(abc.ABC):
    """Of memory, which it frees at the latest when nobody has its owner any more."""

    @abc.abstractmethod
    def free(self) -> None:
        """Idempotent.  Requires: no work uses it any more."""

    def __del__(self) -> None:
        """Says nothing, even at the interpreter's end, when modules may be empty and contextlib gone."""
        try:
            if not sys.is_finalizing():  # the process's end frees all, and CUDA may have ended
                self.free()
        except Exception:
            pass


class PinnedBuffer:
    """See :class:`gpusaver.device.base.HostBuffer`.  Who drops it need not free it."""

    def __init__(self, nbytes: int) -> None:
        self._pages = _Pages(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._pages.madvise(mmap.MADV_DONTFORK)
        array = np.frombuffer(self._pages, np.uint8)
        array[:: mmap.PAGESIZE] = 0  # pages are made now, not one by one under the first copy
        self.view = array.data
        self._pages.register(array.ctypes.data)

    def free(self) -> None:
        """Idempotent.  Requires: no copy to or from it is in flight."""
        self._pages.free()


class _Pages(_Owner, mmap.mmap):
    """Unregistered before they are unmapped: the driver would keep the pages, and refuse what is mapped there next.

    The destructor comes before the unmapping, and when no memoryview of the pages is left: not while a copy is in
    flight, since :class:`Held` keeps one.
    """

    def __init__(self, fileno: int, nbytes: int, *, flags: int) -> None:
        self._process = os.getpid()
        self._device: int = cupy.cuda.runtime.getDevice()
        self._address = 0

    def register(self, address: int) -> None:
        """``address``: theirs."""
        self._address = address  # before the call, so that Ctrl-C cannot come between
        with _room(f"cannot pin {len(self)} bytes of host memory for copies"):
            try:
                cupy.cuda.runtime.hostRegister(address, len(self), _PORTABLE)
            except cupy.cuda.runtime.CUDARuntimeError:
                self._address = 0
                raise

    def free(self) -> None:
        address, self._address = self._address, 0
        if address and os.getpid() == self._process:
            # A device that has failed for good refuses this as well.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), on_device(self._device):
                cupy.cuda.runtime.hostUnregister(address)

    def __del__(self) -> None:
        super().__del__()
        try:
            if os.getpid() != self._process:
                # MADV_DONTFORK: a child has something else there, or nothing.  With one reference too many the pages
                # are never unmapped.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        except Exception:
            pass


class DeviceBuffer(_Owner):
    """``nbytes`` bytes of the current device, outside every pool.  ResourceExhaustedError if it has no room."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pointer = 0
        self._process = os.getpid()
        self._device: int = cupy.cuda.runtime.getDevice()
        with _room(f"no room for {nbytes} bytes on the device"):
            self.pointer = cupy.cuda.runtime.malloc(nbytes)

    def free(self) -> None:
        """Idempotent; waits for the device.  Requires: no work uses it any more."""
        pointer, self.pointer = self.pointer, 0
        if pointer and os.getpid() == self._process:
            with on_device(self._device):
                cupy.cuda.runtime.free(pointer)


class Table(_Owner):
    """As many bytes of page-locked memory as of the current device's."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._process = os.getpid()
        self._device: int = cupy.cuda.runtime.getDevice()
        self._address = 0
        self.device = DeviceBuffer(nbytes)
        with _room(f"cannot pin {nbytes} bytes of host memory for the tables of kernels"):
            self._address = cupy.cuda.runtime.hostAlloc(nbytes, _PORTABLE)
        memory = (ctypes.c_uint8 * nbytes).from_address(self._address)
        self.host: npt.NDArray[np.uint8] = np.ctypeslib.as_array(memory)

    def free(self) -> None:
        """Idempotent.  Requires: no work uses it, and nobody looks at ``host``, any more."""
        address, self._address = self._address, 0
        if address and os.getpid() == self._process:
            with on_device(self._device):
                cupy.cuda.runtime.freeHost(address)
        self.device.free()


@contextlib.contextmanager
def _room(complaint: str) -> Iterator[None]:
    try:
        yield
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != _OUT_OF_MEMORY:
            raise
        raise ResourceExhaustedError(f"{complaint}: {error}") from error


class _Buffer(Protocol):
    nbytes: int

    def free(self) -> None: ...


B = TypeVar("B", bound=_Buffer)


class Pool(Generic[B]):
    """Buffers of one device, lent to queued work and kept for the next.  Any thread may use it.

    ``make(nbytes)`` makes one on the current device; ``nbytes`` is the least size.
    """

    def __init__(self, make: Callable[[int], B], nbytes: int) -> None:
        self._make = make
        self._nbytes = nbytes
        self._free: list[B] = []
        self._lock = threading.Lock()

    def borrow(self, nbytes: int) -> B:
        """One that is large enough; making it may wait for all work of the device."""
        with self._lock:
            for number, buffer in enumerate(self._free):
                if buffer.nbytes >= nbytes:
                    return self._free.pop(number)
        return self._make(max(self._nbytes, 1 << (nbytes - 1).bit_length()))

    def give_back(self, buffer: B) -> None:
        with self._lock:
            self._free.append(buffer)

    def trim(self) -> None:
        """Frees what is not lent."""
        with self._lock:
            free, self._free = self._free, []
        for buffer in free:
            buffer.free()


class Held:
    """What some queued work uses: references, and buffers on loan.  Given up by :meth:`release` alone.

    ``results``: what the work writes into a buffer on loan, for the host.
    """

    def __init__(self) -> None:
        self.results: npt.NDArray[Any] | None = None
        self._kept: list[Any] = []
        self._loans: list[Callable[[], None]] = []

    def keep(self, *objects: Any) -> None:
        self._kept += objects

    def borrow(self, pool: Pool[B], nbytes: int) -> B:
        """ResourceExhaustedError if there is no room."""
        buffer = pool.borrow(nbytes)
        self._loans.append(lambda: pool.give_back(buffer))
        return buffer

    def release(self) -> None:
        """Idempotent; the results stay.  Requires: the work is over."""
        self._kept.clear()
        if self._loans and self.results is not None:
            self.results = self.results.copy()
        while self._loans:
            self._loans.pop()()
