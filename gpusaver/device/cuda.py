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
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from gpusaver.device.base import Event, Transfer
from gpusaver.device.host import copy_elements
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.tensor import TensorSpec

_log = logging.getLogger("gpusaver")

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2


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
    """The event of a copy; keeps alive what the copy reads or writes."""

    def __init__(self, stream: Any, *alive: Any) -> None:
        # The default kind of event spins on a core while waiting.
        self._event = cupy.cuda.Event(block=True, disable_timing=True)
        self._event.record(stream)
        self._alive = alive

    def synchronize(self) -> None:
        self._event.synchronize()
        self._alive = ()


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

    def snapshot(self, arrays: Sequence[Any], memory: Any | None) -> tuple[list[Any], Any]:
        starts = np.cumsum([0, *(-(-array.nbytes // 256) * 256 for array in arrays)]).tolist()
        with cupy.cuda.Device(self._device):
            _callers_stream()
            if memory is None or memory.nbytes < starts[-1]:
                try:
                    memory = cupy.empty(max(starts[-1], 1), np.uint8)
                except cupy.cuda.memory.OutOfMemoryError as error:
                    raise ResourceExhaustedError(
                        f"{self.name}: no room for a copy of the variables ({starts[-1]} bytes): {error}"
                    ) from error
            copies = []
            for array, start in zip(arrays, starts, strict=False):
                copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
                _movable(copy)[...] = _movable(array)
                copies.append(copy)
        return copies, memory

    def view(self, array: Any, start: int, nbytes: int) -> memoryview | None:
        return None

    def to_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        return self._copy(transfers, slot, to_array=False)

    def from_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        return self._copy(transfers, slot, to_array=True)

    def _copy(self, transfers: Sequence[Transfer], slot: memoryview, *, to_array: bool) -> Event:
        base = np.frombuffer(slot, np.uint8).ctypes.data
        kind = _HOST_TO_DEVICE if to_array else _DEVICE_TO_HOST
        alive: list[Any] = []
        with cupy.cuda.Device(self._device), self._stream:
            for array, start, offset, nbytes in transfers:
                host = base + offset
                alive.append(array)
                if not array.flags.c_contiguous:
                    alive.append(self._copy_strided(_movable(array), start, host, nbytes, to_array=to_array))
                    continue
                device = array.data.ptr + start
                target, origin = (device, host) if to_array else (host, device)
                cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, self._stream.ptr)
            return _Copied(self._stream, slot, *alive)

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
