"""Arrays on CUDA devices, through CuPy.

::

    save       array --gather or copy--> [Image ----checksums---->] slot        snapshots go by way of an image,
                             [DeviceBuffer]                                      many small pieces by way of a buffer
    restore    slot --copy--> [DeviceBuffer --scatter-->] array ----checksums---->

Each device has two non-blocking streams of ours: one for copies, ordered by events after the work that the caller had
queued, and one for checksums, so that no copy waits for them.  What queued work uses is held until somebody has waited
for that work.  Every call makes the array's own device current.

Python's ``import cupy`` works without a driver; then the first call here raises FailedPreconditionError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from gpusaver.device.base import Event, HostBuffer, Transfer
from gpusaver.device.cuda_kernels import Kernels, load
from gpusaver.device.cuda_memory import DeviceBuffer, Held, Image, PinnedBuffer, Pool
from gpusaver.device.cuda_streams import callers_streams, handle_of, on_device, record, wait_for
from gpusaver.device.launch_plan import cut_rows
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.tensor import TensorSpec

_log = logging.getLogger("gpusaver")

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
#: A copy of this size is worth queueing alone; smaller ones go together, by a kernel.
DIRECT_NBYTES = 1024 * 1024
#: On their way at once, in a save by the pipeline's rule and in a restore by the number of its readers.
_QUEUED_CHUNKS = 2
#: Of the buffers that chunks are gathered in.
_BUFFER_NBYTES = 8 * 1024 * 1024


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


class Copy(NamedTuple):
    """A tensor in an image: what a snapshot made of an array."""

    image: Image
    place: int


class _Copied:
    """See :class:`gpusaver.device.base.Event`.  Never recorded anew, since somebody may still wait for it.

    ``held``: what was used by the work that ends with the events, and by earlier work without an event of its own.
    """

    def __init__(self, runtime: CudaRuntime, copied: Any, checked: Any, held: list[Held]) -> None:
        self.checksums: list[int] | None = None
        self._runtime = runtime
        self._copied = copied
        self._checked = checked
        self._held = held

    def synchronize(self) -> None:
        try:
            self._copied.synchronize()
            if self._checked is not None:
                self._checked.synchronize()
        except BaseException:
            self._runtime.synchronize()
            raise
        self._runtime.land(self._held)
        results = self._held[0].results
        self.checksums = results.tolist() if results is not None else None

    def hold_back(self, stream: Any) -> None:
        with on_device(self._runtime.device):
            handles = callers_streams(self._runtime.device) if stream is None else [handle_of(stream)]
            for handle in handles:
                wait_for(handle, self._copied)


class CudaRuntime:
    """See :class:`gpusaver.device.base.Runtime`; one per device, for the life of the process."""

    def __init__(self, device: int) -> None:
        self.name = f"cuda:{device}"
        self.device = device
        with on_device(device):
            self._copies = cupy.cuda.Stream(non_blocking=True)
            self._checks = cupy.cuda.Stream(non_blocking=True)  # the default priority is the lowest there is
        #: Whoever queues work that belongs together has it.
        self._lock = threading.RLock()
        self._buffers: Pool[DeviceBuffer] = Pool(DeviceBuffer, _BUFFER_NBYTES)
        #: Of all work that nobody has waited for yet; and of that, what no event of its own will tell the end of.
        self._in_flight: set[Held] = set()
        self._unmarked: list[Held] = []
        self._loaded: tuple[Kernels | None, str] | None = None

    def owns(self, value: Any) -> bool:
        return type(value) is cupy.ndarray and value.data.device_id == self.device

    def order_after_caller(self) -> None:
        with on_device(self.device):
            for handle in callers_streams(self.device):
                wait_for(self._copies.ptr, record(handle))

    def free_memory(self) -> int | None:
        with on_device(self.device):
            free, _ = cupy.cuda.runtime.memGetInfo()
        return int(free)

    def snapshot(self, arrays: Sequence[Any], places: Sequence[int], memory: Image | None) -> tuple[list[Copy], Image]:
        needed = max((place + array.nbytes for place, array in zip(places, arrays, strict=True)), default=0)
        image = memory or Image()
        with on_device(self.device):
            callers = callers_streams(self.device)
            try:
                image.grow(needed)
            except ResourceExhaustedError as error:
                raise ResourceExhaustedError(f"{self.name}: no room for a copy of the variables: {error}") from error
        with self._queueing() as held:
            held.keep(arrays)  # not the image: who frees device memory waits for the device
            for handle in callers:
                wait_for(self._copies.ptr, record(handle))
            self._fill(image, arrays, places, held)
            filled = record(self._copies.ptr)
            for handle in (*callers, self._checks.ptr):
                wait_for(handle, filled)
            self._unmarked.append(held)
        return [Copy(image, place) for place in places], image

    def _fill(self, image: Image, arrays: Sequence[Any], places: Sequence[int], held: Held) -> None:
        kernels = self.kernels()
        small: dict[DeviceBuffer, list[Transfer]] = {}
        for array, place in zip(arrays, places, strict=True):
            is_plain = array.flags.c_contiguous
            start = 0
            for block, address, nbytes in image.stretches(place, array.nbytes):
                if kernels is None or (is_plain and nbytes >= DIRECT_NBYTES):
                    self._move(Transfer(array, start, 0, nbytes), address, _DEVICE_TO_DEVICE)
                else:
                    small.setdefault(block, []).append(Transfer(array, start, address - block.pointer, nbytes))
                start += nbytes
        for block, transfers in small.items():
            assert kernels is not None
            try:
                kernels.gather(transfers, block.pointer, self._copies, held)
            except ResourceExhaustedError:  # no room for the kernel's table
                for transfer in transfers:
                    self._move(transfer, block.pointer + transfer.offset, _DEVICE_TO_DEVICE)

    def view(self, array: Any, start: int, nbytes: int) -> memoryview | None:
        return None

    def allocate(self, nbytes: int) -> HostBuffer:
        with on_device(self.device):
            return PinnedBuffer(nbytes)

    def to_slot(self, transfers: Sequence[Transfer], slot: memoryview) -> Event | None:
        base = _address_of(slot)
        with self._queueing() as held:
            held.keep(slot, [transfer.array for transfer in transfers])
            if isinstance(transfers[0].array, Copy):
                return self._from_image(transfers, base, held)
            copies = _direct_copies(transfers)
            if copies is not None:
                for device, offset, nbytes in copies:
                    self._memcpy(base + offset, device, nbytes, _DEVICE_TO_HOST)
            elif not self._gather(transfers, base, held):
                for transfer in transfers:
                    self._move(transfer, base + transfer.offset, _DEVICE_TO_HOST)
            return self._mark(held)

    def _gather(self, transfers: Sequence[Transfer], base: int, held: Held) -> bool:
        """Whether there are kernels, and room on the device to gather in."""
        kernels = self.kernels()
        if kernels is None:
            return False
        begin, end = _extent(transfers)
        with contextlib.suppress(ResourceExhaustedError):
            buffer = held.borrow(self._buffers, end)
            kernels.gather(transfers, buffer.pointer, self._copies, held)
            self._memcpy(base + begin, buffer.pointer + begin, end - begin, _DEVICE_TO_HOST)
            return True
        return False

    def _from_image(self, transfers: Sequence[Transfer], base: int, held: Held) -> _Copied:
        """A chunk lies in the image as it will in the file: the pieces and what is between them are copied at once."""
        copy, start, offset, _ = transfers[0]
        begin, end = _extent(transfers)
        first = copy.place + start
        for _, device, nbytes in copy.image.stretches(first, end - begin):
            self._memcpy(base + offset, device, nbytes, _DEVICE_TO_HOST)
            offset += nbytes
        return self._mark(held, self._pieces_in(transfers))

    def _pieces_in(self, transfers: Sequence[Transfer]) -> list[tuple[int, int]] | None:
        """Where the pieces are, for their checksums; None where a border of blocks cuts one."""
        pieces = []
        for (image, place), start, _, nbytes in transfers:
            stretches = list(image.stretches(place + start, nbytes))
            if len(stretches) != 1:
                return None
            pieces.append((stretches[0][1], nbytes))
        return pieces

    def from_slot(self, transfers: Sequence[Transfer], slot: memoryview, *, checked: bool = False) -> Event | None:
        base = _address_of(slot)
        with self._queueing() as held:
            held.keep(slot, [transfer.array for transfer in transfers])
            copies = _direct_copies(transfers)
            pieces: list[tuple[int, int]] | None
            if copies is not None:
                for device, offset, nbytes in copies:
                    self._memcpy(device, base + offset, nbytes, _HOST_TO_DEVICE)
                pieces = [(array.data.ptr + start, nbytes) for array, start, _, nbytes in transfers]
            else:
                pieces = self._scatter(transfers, base, held)
                if pieces is None:
                    for transfer in transfers:
                        self._move(transfer, base + transfer.offset, _HOST_TO_DEVICE)
            return self._mark(held, pieces if checked else None, are_copied=True)

    def _scatter(self, transfers: Sequence[Transfer], base: int, held: Held) -> list[tuple[int, int]] | None:
        """Where on the device the bytes were scattered from; None without kernels, or room for the bytes."""
        kernels = self.kernels()
        if kernels is None:
            return None
        begin, end = _extent(transfers)
        with contextlib.suppress(ResourceExhaustedError):
            buffer = held.borrow(self._buffers, end)
            self._memcpy(buffer.pointer + begin, base + begin, end - begin, _HOST_TO_DEVICE)
            kernels.scatter(transfers, buffer.pointer, self._copies, held)
            return [(buffer.pointer + offset, nbytes) for _, _, offset, nbytes in transfers]
        return None

    def synchronize(self) -> None:
        with self._lock, on_device(self.device):
            if _has_ended(self._copies.synchronize, self._checks.synchronize):
                self.land(self._in_flight)

    def warm_up(self) -> None:
        kernels = self.kernels()
        if kernels is not None:
            with self._queueing() as held, contextlib.suppress(ResourceExhaustedError):
                for _ in range(_QUEUED_CHUNKS):  # each is scattered and checked
                    held.borrow(self._buffers, _BUFFER_NBYTES)
                    held.borrow(kernels.tables, 1)
                    held.borrow(kernels.tables, 1)
            self.land([held])

    def trim(self) -> None:
        self.synchronize()
        kernels = self._loaded[0] if self._loaded is not None else None
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), on_device(self.device):
            self._buffers.trim()
            if kernels is not None:
                kernels.tables.trim()

    def empty(self, spec: TensorSpec) -> Any:
        with on_device(self.device):
            return cupy.empty(spec.shape, spec.dtype.numpy_dtype)

    def kernels(self) -> Kernels | None:
        """None where CuPy cannot compile them, which is then said once."""
        with self._lock:
            if self._loaded is None:
                self._loaded = load(self.device)
                if self._loaded[0] is None:
                    _log.warning("%s: arrays are copied one by one, and the host checks them", self._loaded[1])
            return self._loaded[0]

    # -- queueing

    @contextlib.contextmanager
    def _queueing(self) -> Iterator[Held]:
        """Around queueing work that belongs together, with what it uses; after an error nothing is in flight."""
        with self._lock, on_device(self.device):
            held = Held()
            self._in_flight.add(held)
            try:
                yield held
            except BaseException:
                self.synchronize()
                raise

    def _mark(
        self, held: Held, pieces: Sequence[tuple[int, int]] | None = None, *, are_copied: bool = False
    ) -> _Copied:
        """The event that ends the work, and the checksums of the pieces, if any, where kernels can compute them.

        ``are_copied``: the pieces are there when the copies have ended; else they were there before.
        """
        kernels = self.kernels()
        copied = record(self._copies.ptr)
        checked = None
        if pieces is not None and kernels is not None:
            if are_copied:
                wait_for(self._checks.ptr, copied)
            with contextlib.suppress(ResourceExhaustedError):  # then the host computes them
                held.results = kernels.crc32c(pieces, self._checks, held)
                checked = record(self._checks.ptr)
        ended, self._unmarked = [held, *self._unmarked], []
        return _Copied(self, copied, checked, ended)

    def land(self, helds: set[Held] | list[Held]) -> None:
        """Gives up what was held for work that somebody has waited for."""
        with self._lock:
            for held in list(helds):
                self._in_flight.discard(held)
                held.release()

    def _memcpy(self, target: int, origin: int, nbytes: int, kind: int) -> None:
        cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, self._copies.ptr)

    def _move(self, transfer: Transfer, flat: int, kind: int) -> None:
        """One part of an array, of any strides, to or from contiguous memory at the address ``flat``."""
        array, start, _, nbytes = transfer
        for rows in cut_rows(array.data.ptr, array.shape, array.strides, array.itemsize, start, nbytes):
            ours, theirs = (rows.address, rows.pitch), (flat + rows.flat, rows.width)
            target, origin = (ours, theirs) if kind == _HOST_TO_DEVICE else (theirs, ours)
            if rows.height == 1:
                self._memcpy(target[0], origin[0], rows.width, kind)
                continue
            cupy.cuda.runtime.memcpy2DAsync(*target, *origin, rows.width, rows.height, kind, self._copies.ptr)


def _has_ended(*waits: Any) -> bool:
    """Whether waiting succeeded; of the whole device where a stream will not be waited for."""
    for attempt in (*waits,), (cupy.cuda.runtime.deviceSynchronize,):
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            for wait in attempt:
                wait()
            return True
    return False


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


def is_available() -> bool:
    """Whether CuPy finds a GPU that it can use; never raises."""
    return bool(cupy.cuda.is_available())


def array_module() -> Any:
    """CuPy itself.  FailedPreconditionError if it finds no GPU."""
    device_count()
    return cupy


def _address_of(slot: memoryview) -> int:
    return int(np.frombuffer(slot, np.uint8).ctypes.data)


def _extent(transfers: Sequence[Transfer]) -> tuple[int, int]:
    """Of the slot, what the transfers cover.  They are in ascending order."""
    return transfers[0].offset, transfers[-1].offset + transfers[-1].nbytes


def _direct_copies(transfers: Sequence[Transfer]) -> list[tuple[int, int, int]] | None:
    """``(device address, slot offset, nbytes)`` of the copies that serve all transfers, None if a kernel serves better.

    Parts of one allocation that follow each other on both sides go in one copy.
    """
    most = 1 + sum(transfer.nbytes for transfer in transfers) // DIRECT_NBYTES
    copies: list[tuple[int, int, int]] = []
    device = offset = nbytes = 0
    memory: Any = None
    for array, start, part_offset, part_nbytes in transfers:
        if not array.flags.c_contiguous:
            return None
        address = array.data.ptr + start
        if memory is array.data.mem and address == device + nbytes and part_offset == offset + nbytes:
            nbytes += part_nbytes
            copies[-1] = (device, offset, nbytes)
            continue
        if len(copies) == most:
            return None
        device, offset, nbytes, memory = address, part_offset, part_nbytes, array.data.mem
        copies.append((device, offset, nbytes))
    return copies


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
