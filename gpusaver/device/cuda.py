"""Arrays on CUDA devices, through CuPy.

Copies run on one non-blocking stream per device, ordered by events after the work that the caller had queued.  A
reference to every source is held until its copy has finished.  Every call makes the array's own device current.

Python's ``import cupy`` works without a driver; then the first call here raises FailedPreconditionError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cupy
import numpy as np

from gpusaver.device.base import Event, HostBuffer, Transfer
from gpusaver.device.cuda_memory import DeviceMemory, PinnedBuffer
from gpusaver.device.host import copy_elements
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.tensor import TensorSpec

_log = logging.getLogger("gpusaver")

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_PAGE = 4096


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
        self._strided_lock = threading.Lock()

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
            for copy, array in zip(copies, arrays, strict=True):
                _movable(copy)[...] = _movable(array)
        return copies, memory

    def view(self, array: Any, start: int, nbytes: int) -> memoryview | None:
        return None

    def allocate(self, nbytes: int) -> HostBuffer:
        with cupy.cuda.Device(self._device):
            return PinnedBuffer(nbytes)

    def synchronize(self) -> None:
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), cupy.cuda.Device(self._device):
            self._stream.synchronize()

    def to_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        return self._copy(transfers, slot, to_array=False)

    def from_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        return self._copy(transfers, slot, to_array=True)

    def _copy(self, transfers: Sequence[Transfer], slot: memoryview, *, to_array: bool) -> Event:
        base = np.frombuffer(slot, np.uint8).ctypes.data
        kind = _HOST_TO_DEVICE if to_array else _DEVICE_TO_HOST
        alive: list[Any] = [slot, transfers]
        with cupy.cuda.Device(self._device), self._stream:
            plain = [t for t in transfers if t.array.flags.c_contiguous]
            for device, offset, nbytes in _joined(plain, across_gaps=not to_array):
                host = base + offset
                target, origin = (device, host) if to_array else (host, device)
                cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, self._stream.ptr)
            for array, start, offset, nbytes in transfers if len(plain) < len(transfers) else ():
                if not array.flags.c_contiguous:
                    alive.append(self._copy_strided(_movable(array), start, base + offset, nbytes, to_array=to_array))
            return _Copied(self._stream, alive)

    def _copy_strided(self, array: Any, start: int, host: int, nbytes: int, *, to_array: bool) -> Any:
        """Through contiguous memory, which it returns: to be held until the copy has finished."""
        first, last = start // array.itemsize, -(-(start + nbytes) // array.itemsize)
        part = cupy.empty(last - first, array.dtype)
        device = part.data.ptr + start - first * array.itemsize
        if not to_array:
            copy_elements(array, first, last, part, to_array=False)
            cupy.cuda.runtime.memcpyAsync(host, device, nbytes, _DEVICE_TO_HOST, self._stream.ptr)
            return part
        # Two chunks may share an element: reading it, changing bytes of it and writing it back must stay together.
        with self._strided_lock:
            copy_elements(array, first, last, part, to_array=False)
            cupy.cuda.runtime.memcpyAsync(device, host, nbytes, _HOST_TO_DEVICE, self._stream.ptr)
            copy_elements(array, first, last, part, to_array=True)
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
