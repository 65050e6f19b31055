"""Arrays on CUDA devices, through CuPy.

Copies run on one non-blocking stream per device, ordered by events after the work that the caller had queued.  A
reference to every source is held until its copy has finished.  Every call makes the array's own device current.

Python's ``import cupy`` works without a driver; then the first call here raises FailedPreconditionError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import numpy as np

from gpusaver.device.base import Event, HostBuffer, Transfer
from gpusaver.device.cuda_kernels import Kernels, load
from gpusaver.device.cuda_memory import DeviceMemory, PinnedBuffer
from gpusaver.device.host import copy_elements
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.tensor import TensorSpec

_log = logging.getLogger("gpusaver")

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_PAGE = 4096
#: A chunk of more pieces than this is gathered into one copy first: each copy costs some microseconds of its own.
_MAX_DIRECT_COPIES = 4
_BLOCK_NBYTES = 8 * 1024 * 1024


def _installed_wheels() -> list[str]:
    names = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-7-0")
    found = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def _warn_about_two_wheels() -> None:
    """They overwrite each other's files, so which one runs is chance, and removing one breaks the other."""
    wheels = _installed_wheels()
    if len(wheels) > 1:
        _log.warning(
            "two CuPy packages are installed in one environment (%s): uninstall all of them, then install one",
            " and ".join(wheels),
        )


_warn_about_two_wheels()


class _Copied:
    """The event of copies; keeps alive what they read or write.  Never recorded anew while somebody may wait for it."""

    def __init__(self, stream: Any, alive: Sequence[Any]) -> None:
        # The default kind of event spins on a core while waiting.
        self._event = cupy.cuda.Event(block=True, disable_timing=True)
        self._event.record(stream)
        self._device = cupy.cuda.runtime.getDevice()
        self._alive = alive

    def synchronize(self) -> None:
        self._event.synchronize()
        self._alive = ()

    def hold_back(self, stream: Any) -> None:
        with cupy.cuda.Device(self._device):
            _cupy_stream(stream).wait_event(self._event)


class CudaRuntime:
    """See :class:`gpusaver.device.base.Runtime`; one per device, for the life of the process."""

    small_alignment = 16

    def __init__(self, device: int) -> None:
        self.name = f"cuda:{device}"
        self._device = device
        with cupy.cuda.Device(device):
            self._stream = cupy.cuda.Stream(non_blocking=True)
        #: Queueing what belongs together: through the block, and what reads, changes and writes back an element.
        self._queueing = threading.Lock()
        self._block: DeviceMemory | None = None
        self._kernels: Kernels | None = None
        self._kernels_loaded = False
        #: What a snapshot still reads; the first copy from it comes later in the copy stream, and takes these over.
        self._keep: list[Any] = []

    def order_after_caller(self, arrays: Sequence[Any]) -> None:
        with cupy.cuda.Device(self._device):
            event = cupy.cuda.Event(block=True, disable_timing=True)
            event.record(_callers_stream())
            self._stream.wait_event(event)

    def order_caller_after(self) -> None:
        with cupy.cuda.Device(self._device):
            event = cupy.cuda.Event(block=True, disable_timing=True)
            event.record(self._stream)
            _callers_stream().wait_event(event)

    def snapshot(
        self, arrays: Sequence[Any], places: Sequence[int], memory: DeviceMemory | None
    ) -> tuple[list[Any], DeviceMemory]:
        needed = max((place + array.nbytes for place, array in zip(places, arrays, strict=True)), default=0)
        with cupy.cuda.Device(self._device):
            _callers_stream()
            if memory is None or memory.nbytes < needed:
                try:
                    memory = DeviceMemory(needed)
                except ResourceExhaustedError as error:
                    raise ResourceExhaustedError(
                        f"{self.name}: no room for a copy of the variables: {error}"
                    ) from error
            copies = [memory.array(p, a.shape, a.dtype) for p, a in zip(places, arrays, strict=True)]
            kernels = self.kernels()
            if kernels is None:
                for copy, array in zip(copies, arrays, strict=True):
                    _movable(copy)[...] = _movable(array)
            else:
                whole = [Transfer(a, 0, p, a.nbytes) for p, a in zip(places, arrays, strict=True)]
                kernels.gather(whole, memory.pointer, cupy.cuda.get_current_stream(), self._keep)
            self._keep += arrays
        return copies, memory

    def view(self, array: Any, start: int, nbytes: int) -> memoryview | None:
        return None

    def allocate(self, nbytes: int) -> HostBuffer:
        with cupy.cuda.Device(self._device):
            return PinnedBuffer(nbytes)

    def synchronize(self) -> None:
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), cupy.cuda.Device(self._device):
            self._stream.synchronize()
        self._keep.clear()

    def kernels(self) -> Kernels | None:
        """The compiled kernels, or None where CuPy cannot compile (then said once)."""
        if not self._kernels_loaded:
            with cupy.cuda.Device(self._device):
                self._kernels, reason = load(self._device)
            self._kernels_loaded = True
            if reason:
                _log.warning("%s: arrays are copied one by one, which is slow for many small ones", reason)
        return self._kernels

    def to_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        base = np.frombuffer(slot, np.uint8).ctypes.data
        with self._queueing, cupy.cuda.Device(self._device), self._stream:
            keep, self._keep = self._keep, []
            alive: list[Any] = [slot, transfers, *keep]
            copies = _direct_copies(transfers, across_gaps=True)
            kernels = self.kernels() if copies is None else None
            if copies is not None:
                for device, offset, nbytes in copies:
                    self._memcpy(base + offset, device, nbytes, _DEVICE_TO_HOST)
            elif kernels is not None:
                block, begin, nbytes = self._block_for(transfers)
                kernels.gather(transfers, block.pointer, self._stream, alive)
                self._memcpy(base + begin, block.pointer + begin, nbytes, _DEVICE_TO_HOST)
            else:
                for transfer in transfers:
                    alive.append(self._copy_one(transfer, base, to_array=False))
            return _Copied(self._stream, alive)

    def from_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        base = np.frombuffer(slot, np.uint8).ctypes.data
        with self._queueing, cupy.cuda.Device(self._device), self._stream:
            alive: list[Any] = [slot, transfers]
            copies = _direct_copies(transfers, across_gaps=False)
            kernels = self.kernels() if copies is None else None
            if copies is not None:
                for device, offset, nbytes in copies:
                    self._memcpy(device, base + offset, nbytes, _HOST_TO_DEVICE)
            elif kernels is not None:
                block, begin, nbytes = self._block_for(transfers)
                self._memcpy(block.pointer + begin, base + begin, nbytes, _HOST_TO_DEVICE)
                kernels.scatter(transfers, block.pointer, self._stream, alive)
            else:
                for transfer in transfers:
                    alive.append(self._copy_one(transfer, base, to_array=True))
            return _Copied(self._stream, alive)

    def _memcpy(self, target: int, origin: int, nbytes: int, kind: int) -> None:
        cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, self._stream.ptr)

    def _block_for(self, transfers: Sequence[Transfer]) -> tuple[DeviceMemory, int, int]:
        """Device memory for one chunk, and the stretch of it that the transfers cover.

        One is enough: all that uses it is queued in one stream.
        """
        begin = min(transfer.offset for transfer in transfers)
        end = max(transfer.offset + transfer.nbytes for transfer in transfers)
        if self._block is None or self._block.nbytes < end:
            self.synchronize()  # the old one may be in use
            self._block = DeviceMemory(max(end, _BLOCK_NBYTES))
        return self._block, begin, end - begin

    def _copy_one(self, transfer: Transfer, base: int, *, to_array: bool) -> Any:
        """Without kernels; returns the contiguous memory in between, to be held until the copy has finished."""
        array, start, offset, nbytes = transfer
        host = base + offset
        if array.flags.c_contiguous:
            device = array.data.ptr + start
            if to_array:
                self._memcpy(device, host, nbytes, _HOST_TO_DEVICE)
            else:
                self._memcpy(host, device, nbytes, _DEVICE_TO_HOST)
            return array
        array = _movable(array)
        first, last = start // array.itemsize, -(-(start + nbytes) // array.itemsize)
        part = cupy.empty(last - first, array.dtype)
        device = part.data.ptr + start - first * array.itemsize
        copy_elements(array, first, last, part, to_array=False)
        if to_array:  # elements that the chunk's border cuts keep their other bytes
            self._memcpy(device, host, nbytes, _HOST_TO_DEVICE)
            copy_elements(array, first, last, part, to_array=True)
        else:
            self._memcpy(host, device, nbytes, _DEVICE_TO_HOST)
        return part

    def empty(self, spec: TensorSpec) -> Any:
        with cupy.cuda.Device(self._device):
            return cupy.empty(spec.shape, spec.dtype.numpy_dtype)


@functools.cache
def cuda_runtime(device: int) -> CudaRuntime:
    """The runtime of one device.  FailedPreconditionError if there is no such device."""
    count = device_count()
    if device >= count:
        raise FailedPreconditionError(f"cuda:{device}: CuPy sees {count} CUDA devices")
    return CudaRuntime(device)


def device_count() -> int:
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise FailedPreconditionError(f"CuPy is installed, but CUDA cannot be used: {error}") from error


def _callers_stream() -> Any:
    """The current stream.  An event recorded in a capture would draw the copy stream into the graph, and break both."""
    stream = cupy.cuda.get_current_stream()
    if stream.is_capturing():
        raise FailedPreconditionError(
            "the current stream is being captured into a CUDA graph; save, restore and fence before or after that"
        )
    return stream


def _movable(array: Any) -> Any:
    """The array as CuPy's kernels can copy it: float8 and its kin, which it only stores, as integers."""
    dtype = array.dtype
    return array.view(np.dtype(f"u{dtype.itemsize}")) if dtype.isbuiltin == 2 else array


def _joined(transfers: Sequence[Transfer], *, across_gaps: bool) -> Iterator[tuple[int, int, int]]:
    """``(device address, slot offset, nbytes)`` of copies that serve all transfers, as few as possible.

    Parts of one allocation that lie at the same distance on both sides go in one; with ``across_gaps`` together with
    what is between them, if that is less than a page (a snapshot lies in memory as it will in the file).
    """
    device = offset = nbytes = 0
    memory: Any = None
    for array, start, part_offset, part_nbytes in transfers:
        address = array.data.ptr + start
        gap = part_offset - offset - nbytes
        is_near = gap == 0 or (across_gaps and 0 < gap < _PAGE)
        if memory is array.data.mem and is_near and address - part_offset == device - offset:
            nbytes += gap + part_nbytes
            continue
        if nbytes:
            yield device, offset, nbytes
        device, offset, nbytes, memory = address, part_offset, part_nbytes, array.data.mem
    if nbytes:
        yield device, offset, nbytes


def _direct_copies(transfers: Sequence[Transfer], *, across_gaps: bool) -> list[tuple[int, int, int]] | None:
    """The copies that serve all transfers, if they are few; None if a kernel serves better."""
    if not all(transfer.array.flags.c_contiguous for transfer in transfers):
        return None
    copies = list(itertools.islice(_joined(transfers, across_gaps=across_gaps), _MAX_DIRECT_COPIES + 1))
    return copies if len(copies) <= _MAX_DIRECT_COPIES else None


def _cupy_stream(stream: Any) -> Any:
    """A CuPy stream for what a caller may name: None (the current one), CuPy's, or any with ``__cuda_stream__``."""
    if stream is None:
        return _callers_stream()
    if isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream):
        return stream
    _, handle = stream.__cuda_stream__()
    return cupy.cuda.ExternalStream(handle)


def to_device(value: Any, device: int) -> Any:
    """``value`` as a CuPy array on the device (itself if it is there already)."""
    cuda_runtime(device)
    with cupy.cuda.Device(device):
        return cupy.asarray(value)


def from_dlpack(value: Any) -> Any:
    return cupy.from_dlpack(value)


def from_cuda_array_interface(value: Any) -> Any:
    pointer = value.__cuda_array_interface__["data"][0]
    # With another device current, asarray would copy to that one.
    device = cupy.cuda.runtime.pointerGetAttributes(pointer).device if pointer else None
    with cupy.cuda.Device(device):
        return cupy.asarray(value)
