"""Arrays in the host's memory: NumPy, and whatever shares its memory with NumPy."""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.device.base import Checking, Column, Event, HostBuffer, Transfer
from gpusaver.errors import ResourceExhaustedError
from gpusaver.tensor import Buffer, TensorSpec

Array = npt.NDArray[Any]

#: Above this many bytes ``numpy.copyto``, which releases the GIL, beats assigning to a memoryview, which does not.
_RELEASE_GIL_NBYTES = 64 * 1024


_DTYPE = operator.attrgetter("dtype")
_SIZE = operator.attrgetter("size")
_BASE = operator.attrgetter("base")


class HostRuntime:
    """See :class:`gpusaver.device.base.Runtime`.  Holds no state: any thread may use any method at any time."""

    name = "cpu:0"

    def owns(self, value: Any) -> bool:
        return type(value) is np.ndarray

    def order_after_caller(self) -> None:
        pass

    def free_memory(self) -> int | None:
        return None

    def snapshot(
        self, arrays: Sequence[Array], places: Column, memory: Array | None
    ) -> tuple[list[Array], Array, Event | None]:
        ends = (place + array.nbytes for place, array in zip(places.tolist(), arrays, strict=True))
        needed = max(ends, default=0)
        if memory is None or memory.nbytes < needed:
            available = memory_available()
            if available is not None and needed > available:
                raise ResourceExhaustedError(
                    f"a copy of the variables takes {needed} bytes; the host has {available} available"
                )
            memory = allocate_pages(needed)
        copies = []
        for array, place in zip(arrays, places.tolist(), strict=True):
            copy = memory[place : place + array.nbytes].view(little_endian(array.dtype)).reshape(array.shape)
            np.copyto(copy, array)
            copies.append(copy)
        return copies, memory, None

    def view(self, array: Array, start: int, nbytes: int) -> Buffer | None:
        if not is_plain(array):
            return None
        return array if nbytes == array.nbytes else byte_view(array)[start : start + nbytes]

    def to_slot(self, transfers: Iterable[Transfer], slot: memoryview) -> Event | None:
        target: npt.NDArray[np.uint8] | None = None
        for array, start, offset, nbytes in transfers:
            view = byte_view(array)[start : start + nbytes] if is_plain(array) else None
            if view is not None and nbytes < _RELEASE_GIL_NBYTES:
                slot[offset : offset + nbytes] = view
                continue
            if target is None:
                target = np.frombuffer(slot, np.uint8)
            part = target[offset : offset + nbytes]
            if view is not None:
                np.copyto(part, np.frombuffer(view, np.uint8))
            else:
                _copy_strided(array, start, part, to_array=False)
        return None

    def gather(self, arrays: Sequence[Array], slot: memoryview) -> None:
        """Copies whole arrays into the slot, one behind the other: many small ones in few calls."""
        position = 0
        for dtype, members in itertools.groupby(arrays, _DTYPE):
            same = list(members)
            target = np.frombuffer(slot, little_endian(dtype), sum(map(_SIZE, same)), position)
            np.concatenate(same, axis=None, out=target)
            position += target.nbytes

    def from_slot(self, transfers: Iterable[Transfer], slot: memoryview) -> Event | None:
        source: npt.NDArray[np.uint8] | None = None
        for array, start, offset, nbytes in transfers:
            view = byte_view(array)[start : start + nbytes] if is_plain(array) else None
            if view is not None and nbytes < _RELEASE_GIL_NBYTES:
                view[:] = slot[offset : offset + nbytes]
                continue
            if source is None:
                source = np.frombuffer(slot, np.uint8)
            part = source[offset : offset + nbytes]
            if view is not None:
                np.copyto(np.frombuffer(view, np.uint8), part)
            else:
                _copy_strided(array, start, part, to_array=True)
        return None

    def checking(self, arrays: Sequence[Array], combine: Callable[[int, int, int], int]) -> Checking | None:
        return None

    def allocate(self, nbytes: int) -> HostBuffer:
        return _Pages(nbytes)

    def synchronize(self) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def empty(self, spec: TensorSpec) -> Array:
        return np.empty(spec.shape, spec.dtype.numpy_dtype)


class _Pages:
    """See :class:`gpusaver.device.base.HostBuffer`."""

    def __init__(self, nbytes: int) -> None:
        self.view = allocate_pages(nbytes).data

    def free(self) -> None:
        self.view = memoryview(b"")


def memory_available() -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo", "rb") as lines:
            for line in lines:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def allocate_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Fresh, page-aligned memory that goes back to the system when the array is dropped.

    Private: a forked child sees what it was, and changes to it stay its own.  ResourceExhaustedError if there is none.
    """
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ResourceExhaustedError(f"cannot allocate {nbytes} bytes of host memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The first touch of a gigabyte took 0.4 s in huge pages, 2 to 6 s in small ones.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype as its elements are stored in a bundle."""
    return dtype.newbyteorder("<") if dtype.byteorder in "<>=" and dtype.itemsize > 1 else dtype


def is_plain(array: Array) -> bool:
    """Whether the array's memory holds the stored bytes as they are: C-contiguous and little-endian."""
    return array.flags.c_contiguous and _is_little_endian(array.dtype)


@functools.cache
def _is_little_endian(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize == 1 or dtype == little_endian(dtype)


def own_memory(arrays: Iterable[Array]) -> bool:
    """Whether each has memory of its own, which no other one shares: none is a view."""
    return all(map(operator.is_, map(_BASE, arrays), itertools.repeat(None)))


def address(array: Array) -> int:
    """Where its first element lies."""
    found: int = array.__array_interface__["data"][0]
    return found


def byte_view(array: Array) -> memoryview:
    """The memory of a C-contiguous array, as bytes."""
    try:
        return array.data.cast("B")
    except (TypeError, ValueError):  # zero-size, complex, bfloat16 and its kin
        return array.reshape(-1).view(np.uint8).data


def _copy_strided(array: Array, start: int, part: npt.NDArray[np.uint8], *, to_array: bool) -> None:
    """Copies bytes [start, start + part.nbytes) of the row-major little-endian form of any array."""
    itemsize = array.dtype.itemsize
    first, last = start // itemsize, -(-(start + part.nbytes) // itemsize)
    head = start - first * itemsize
    if head == 0 and part.nbytes == (last - first) * itemsize:
        copy_elements(array, first, last, part.view(little_endian(array.dtype)), to_array=to_array)
        return
    # A small tensor that a chunk's border cuts within an element.
    elements = np.empty(last - first, little_endian(array.dtype))
    octets = elements.view(np.uint8)
    copy_elements(array, first, last, elements, to_array=False)
    if not to_array:
        np.copyto(part, octets[head : head + part.nbytes])
        return
    octets[head : head + part.nbytes] = part
    copy_elements(array, first, last, elements, to_array=True)


def copy_elements(array: Any, first: int, last: int, flat: Any, *, to_array: bool) -> None:
    """Copies elements [first, last) in row-major order between an array of any strides and a flat one.

    Takes no other memory: the range is a part of a row, whole rows, and a part of a row, and the parts are such
    ranges with one dimension less.  Both arrays are of one library, NumPy or CuPy.
    """
    if first >= last:
        return
    if array.ndim <= 1:
        ours = array.reshape(1) if array.ndim == 0 else array[first:last]
        _assign(ours, flat, to_array)
        return
    row = array.size // array.shape[0]
    begin, end = -(-first // row), last // row
    if begin > end:  # within one row
        copy_elements(array[end], first - end * row, last - end * row, flat, to_array=to_array)
        return
    done = begin * row - first
    if done:
        copy_elements(array[begin - 1], row - done, row, flat[:done], to_array=to_array)
    if end > begin:
        rows = array[begin:end]
        _assign(rows, flat[done : done + rows.size].reshape(rows.shape), to_array)
        done += rows.size
    if last > end * row:
        copy_elements(array[end], 0, last - end * row, flat[done:], to_array=to_array)


def _assign(ours: Any, theirs: Any, to_array: bool) -> None:
    if to_array:
        ours[...] = theirs
    else:
        theirs[...] = ours


def byte_bounds(array: Any) -> tuple[int, int]:
    """The lowest address of any element of a NumPy or CuPy array, and the one after the highest."""
    first = address(array) if isinstance(array, np.ndarray) else array.data.ptr
    extents = [stride * (size - 1) for stride, size in zip(array.strides, array.shape, strict=True)]
    low = first + sum(extent for extent in extents if extent < 0)
    return low, first + sum(extent for extent in extents if extent > 0) + array.itemsize
