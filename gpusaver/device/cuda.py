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

    def order_after_caller(self, arrays: Sequence[Any]) -> None:
        with cupy.cuda.Device(self._device):
            event = cupy.cuda.Event(block=True, disable_timing=True)
            event.record(cupy.cuda.get_current_stream())
            self._stream.wait_event(event)

    def order_caller_after(self) -> None:
        with cupy.cuda.Device(self._device):
            event = cupy.cuda.Event(block=True, disable_timing=True)
            event.record(self._stream)
            cupy.cuda.get_current_stream().wait_event(event)

    def snapshot(self, arrays: Sequence[Any], memory: Any | None) -> tuple[list[Any], Any]:
        starts = np.cumsum([0, *(-(-array.nbytes // 256) * 256 for array in arrays)]).tolist()
        with cupy.cuda.Device(self._device):
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
                copy[...] = array
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
                if array.flags.c_contiguous:
                    source, part = array.data.ptr + start, array
                else:
                    first, last = start // array.itemsize, -(-(start + nbytes) // array.itemsize)
                    part = cupy.empty(last - first, array.dtype)
                    source = part.data.ptr + start - first * array.itemsize
                    copy_elements(array, first, last, part, to_array=False)
                host = base + offset
                target, origin = (source, host) if to_array else (host, source)
                cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, self._stream.ptr)
                if to_array and part is not array:
                    copy_elements(array, first, last, part, to_array=True)
                alive += (array, part)
            return _Copied(self._stream, slot, *alive)

    def empty(self, spec: TensorSpec) -> Any:
        dtype = spec.dtype.numpy_dtype
        with cupy.cuda.Device(self._device):
            try:
                return cupy.empty(spec.shape, dtype)
            except (TypeError, ValueError):  # a type CuPy lacks, such as float8: its bytes
                return cupy.empty(spec.shape, np.dtype(f"u{dtype.itemsize}"))


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


def to_device(value: Any, device: int) -> Any:
    """``value`` as a CuPy array on the device (itself if it is there already)."""
    cuda_runtime(device)
    with cupy.cuda.Device(device):
        return cupy.asarray(value)


def from_dlpack(value: Any) -> Any:
    return cupy.from_dlpack(value)


def from_cuda_array_interface(value: Any) -> Any:
    return cupy.asarray(value)
