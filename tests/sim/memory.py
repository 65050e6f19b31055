"""The memory of the simulated devices, and what the driver knows of the host's.

::

    device 0                                      device 1
    | block | block |  | block (pool, 3 chunks) | | block ...
    ^1 << 48    state of every 512 bytes: free, live, or cached by a pool

No process has memory at 1 << 48 or above, so a device's pointer that is taken for one of the host's faults.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from sim.errors import CUDARuntimeError, SimulationError

GRANULE = 512
POISON = 0xDB
_DEVICE_SPACING = 1 << 48
_FREE, _LIVE, _CACHED = 0, 1, 2


def round_up(size: int) -> int:
    return -(-size // GRANULE) * GRANULE


class DeviceMemory:
    """One device's memory: blocks from the driver, each byte of them live or cached by a memory pool."""

    def __init__(self, device: int, capacity: int) -> None:
        self.base = (device + 1) * _DEVICE_SPACING
        self.capacity = capacity
        self.arena: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, round_up(capacity)), np.uint8)
        self._state = np.zeros(len(self.arena) // GRANULE, np.uint8)
        self._gaps = [(0, len(self.arena))]
        self._sizes: dict[int, int] = {}

    @property
    def used(self) -> int:
        return sum(self._sizes.values())

    def owns(self, pointer: int) -> bool:
        return self.base <= pointer < self.base + _DEVICE_SPACING

    def allocate(self, size: int) -> int:
        """The lowest address where it fits, so that freed memory is in use again at once."""
        size = max(round_up(size), GRANULE)
        if self.used + size > self.capacity:
            raise CUDARuntimeError(2)
        for number, (start, length) in enumerate(self._gaps):
            if length >= size:
                self._gaps[number : number + 1] = [(start + size, length - size)] if length > size else []
                break
        else:
            raise CUDARuntimeError(2)
        self._sizes[start] = size
        self._mark(start, size, _LIVE)
        self.arena[start : start + size] = POISON
        return self.base + start

    def release(self, pointer: int) -> None:
        start = pointer - self.base
        size = self._sizes.pop(start, None)
        if size is None:
            raise CUDARuntimeError(1)
        self._mark(start, size, _FREE)
        self.arena[start : start + size] = POISON
        place = bisect.bisect(self._gaps, (start, 0))
        self._gaps.insert(place, (start, size))
        for left in (place, place - 1):
            if 0 <= left < len(self._gaps) - 1 and sum(self._gaps[left]) == self._gaps[left + 1][0]:
                self._gaps[left : left + 2] = [(self._gaps[left][0], self._gaps[left][1] + self._gaps[left + 1][1])]

    def set_cached(self, pointer: int, size: int, is_cached: bool) -> None:
        self._mark(pointer - self.base, size, _CACHED if is_cached else _LIVE)

    def is_live(self, pointer: int, size: int) -> bool:
        """Whether someone holds all of it; the pool's cache does not count."""
        return bool((self._states(pointer, size) == _LIVE).all())

    def is_allocated(self, pointer: int, size: int) -> bool:
        """Whether the device can reach all of it; what a pool has cached still is."""
        return bool((self._states(pointer, size) != _FREE).all())

    def view(self, pointer: int, size: int) -> npt.NDArray[np.uint8]:
        return self.arena[pointer - self.base : pointer - self.base + size]

    def array_view(self, pointer: int, shape: Any, dtype: Any, strides: Any) -> npt.NDArray[Any]:
        return np.ndarray(shape, dtype, self.arena.data, pointer - self.base, strides)

    def _mark(self, start: int, size: int, state: int) -> None:
        self._state[start // GRANULE : (start + size) // GRANULE] = state

    def _states(self, pointer: int, size: int) -> npt.NDArray[np.uint8]:
        start = pointer - self.base
        last = -(-(start + max(size, 1)) // GRANULE)
        outside = np.zeros(1, np.uint8)
        return self._state[start // GRANULE : last] if start >= 0 and last <= len(self._state) else outside


class HostMemory:
    """The host memory that is page-locked: registered by the user, or allocated by the driver.

    Whole pages are locked, and until cudaHostUnregister: nobody tells the driver that they were unmapped, and then
    what is mapped there next cannot be registered.  (So the CUDA runtime API has it, and an H200 did it.)
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.allocated: dict[int, mmap.mmap] = {}

    def register(self, pointer: int, size: int) -> None:
        """cudaHostRegister; cudaErrorHostMemoryAlreadyRegistered for a page that is locked already."""
        if size <= 0:
            raise CUDARuntimeError(1)
        pages = _pages(pointer, size)
        if any(pages.start < other.stop and other.start < pages.stop for other in self._locked()):
            raise CUDARuntimeError(712)
        check_mapped(pointer, size)
        self.registered[pointer] = size

    def unregister(self, pointer: int) -> int:
        """cudaHostUnregister takes the pointer that was registered, and none from within or of cudaHostAlloc."""
        if pointer not in self.registered:
            raise CUDARuntimeError(1 if any(pointer in pages for pages in self._locked()) else 713)
        return self.registered.pop(pointer)

    def allocate(self, size: int) -> int:
        pages = mmap.mmap(-1, max(size, 1))
        pointer = address_of(pages)
        self.allocated[pointer] = pages
        return pointer

    def release(self, pointer: int) -> int:
        pages = self.allocated.pop(pointer, None)
        if pages is None:
            raise CUDARuntimeError(1)
        return len(pages)

    def is_pinned(self, pointer: int, size: int) -> bool:
        """CUDARuntimeError if only a part is."""
        for base, length in self._regions():
            if base <= pointer and pointer + size <= base + length:
                return True
            if pointer < base + length and base < pointer + size:
                raise CUDARuntimeError(1)
        return False

    def _locked(self) -> list[range]:
        return [_pages(pointer, size) for pointer, size in self._regions()]

    def _regions(self) -> list[tuple[int, int]]:
        return [*self.registered.items(), *((pointer, len(pages)) for pointer, pages in self.allocated.items())]


def _pages(pointer: int, size: int) -> range:
    """The addresses of all pages that it touches."""
    page = mmap.PAGESIZE
    return range(pointer // page * page, -(-(pointer + size) // page) * page)


def address_of(buffer: Any) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def check_mapped(pointer: int, size: int) -> None:
    """SimulationError, where reading the memory would kill the process."""
    pages = _pages(pointer, size)
    vector = ctypes.create_string_buffer(len(pages) // mmap.PAGESIZE)
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(pages.start), ctypes.c_size_t(len(pages)), vector) != 0:
        raise SimulationError(f"host memory at {pointer:#x} ({size} bytes) was unmapped while the device still uses it")
