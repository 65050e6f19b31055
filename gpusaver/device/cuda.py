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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cupy
import numpy as np

from gpusaver.device.base import Checking, Column, Event, HostBuffer, Transfer, Transfers, are_contiguous
from gpusaver.device.cuda_image import Copy, Filling, Snapshot, plan_filling
from gpusaver.device.cuda_kernels import Kernels, load
from gpusaver.device.cuda_memory import DeviceBuffer, Held, PinnedBuffer, Pool
from gpusaver.device.cuda_streams import callers_streams, handle_of, on_device, record, wait_for
from gpusaver.device.launch_plan import column, cut_rows
from gpusaver.errors import FailedPreconditionError, ResourceExhaustedError
from gpusaver.tensor import TensorSpec

_log = logging.getLogger("gpusaver")

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
#: A copy of this size is worth queueing alone; smaller ones go together, by a kernel.
DIRECT_NBYTES = 3 * 1024 * 1024
#: On their way at once, in a save by the pipeline's rule and in a restore by the number of its readers.
_QUEUED_CHUNKS = 4
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


class _Ended:
    """See :class:`gpusaver.device.base.Event`.  Never recorded anew, since somebody may still wait for it.

    ``held``: what was used by the work that ends with the event.
    """

    def __init__(self, runtime: CudaRuntime, event: Any, held: Held) -> None:
        self._runtime = runtime
        self._event = event
        self._held = held

    def synchronize(self) -> None:
        try:
            self._event.synchronize()
        except BaseException:
            self._runtime.synchronize()
            raise
        self._runtime.land([self._held])

    def hold_back(self, stream: Any) -> None:
        with on_device(self._runtime.device):
            handles = callers_streams(self._runtime.device) if stream is None else [handle_of(stream)]
            for handle in handles:
                wait_for(handle, self._event)


class _Checking:
    """See :class:`gpusaver.device.base.Checking`.  ``rows``: of which array each piece is; in order."""

    def __init__(
        self,
        runtime: CudaRuntime,
        kernels: Kernels,
        rows: Column,
        addresses: Column,
        sizes: Column,
        combine: Callable[[int, int, int], int],
    ) -> None:
        self._runtime = runtime
        self._combine = combine
        self._rows = rows
        self._sizes = sizes
        self._held = Held()
        self._ended: _Ended | None = None
        self._launch = kernels.crc32c(addresses, sizes, self._held)

    def start(self) -> None:
        self._ended = self._runtime.check(self._launch, self._held)

    def result(self) -> list[int]:
        assert self._ended is not None
        self._ended.synchronize()
        assert self._held.results is not None
        found: list[int] = self._held.results.tolist()
        if not len(found) or len(found) == self._rows[-1] + 1:
            return found
        whole: list[int] = []
        for row, crc, nbytes in zip(self._rows.tolist(), found, self._sizes.tolist(), strict=True):
            if row == len(whole):
                whole.append(crc)
            else:
                whole[row] = self._combine(whole[row], crc, nbytes)
        return whole

    def close(self) -> None:
        if self._ended is None:
            self._held.release()
        else:
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                self._ended.synchronize()


class CudaRuntime:
    """See :class:`gpusaver.device.base.Runtime`; one per device, for the life of the process."""

    def __init__(self, device: int) -> None:
        self.name = f"cuda:{device}"
        self.device = device
        with on_device(device):
            self._copies = cupy.cuda.Stream(non_blocking=True)
            self._checks = cupy.cuda.Stream(non_blocking=True)  # the default priority is the lowest there is
        self._lock = threading.RLock()
        self._buffers: Pool[DeviceBuffer] = Pool(DeviceBuffer, _BUFFER_NBYTES)
        #: Of all work that nobody has waited for yet.
        self._in_flight: set[Held] = set()
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

    def snapshot(
        self, arrays: Sequence[Any], places: Column, memory: Snapshot | None
    ) -> tuple[list[Copy], Snapshot, Event | None]:
        snapshot, sizes = memory or Snapshot(), column([array.nbytes for array in arrays])
        with on_device(self.device):
            callers = callers_streams(self.device)
            try:
                snapshot.image.grow(int((places + sizes).max(initial=0)))
            except ResourceExhaustedError as error:
                raise ResourceExhaustedError(f"{self.name}: no room for a copy of the variables: {error}") from error
        with self._queueing(Held()) as held:
            held.keep(arrays)  # not the image: who frees device memory waits for the device
            for handle in callers:
                wait_for(self._copies.ptr, record(handle))
            filling = self._fill(snapshot, arrays, places, sizes, held)
            filled = record(self._copies.ptr)
            for handle in callers:
                wait_for(handle, filled)
        return filling.copies, snapshot, _Ended(self, filled, held)

    def _fill(self, snapshot: Snapshot, arrays: Sequence[Any], places: Column, sizes: Column, held: Held) -> Filling:
        kernels = self.kernels()
        pointers = column([array.data.ptr for array in arrays])
        signature = column([pointers, places, sizes, are_contiguous(arrays)])
        filling = snapshot.filling
        if filling is None or not np.array_equal(filling.signature, signature):
            direct_nbytes = DIRECT_NBYTES if kernels is not None else 1
            filling = snapshot.filling = plan_filling(snapshot.image, signature, direct_nbytes=direct_nbytes)
        for target, origin, nbytes in filling.direct:
            self._memcpy(target, origin, nbytes, _DEVICE_TO_DEVICE)
        for row, start, block, offset, nbytes in filling.strided:
            transfer = Transfer(arrays[row], start, offset, nbytes)
            if kernels is not None:
                kernels.gather([transfer], block, self._copies, held)
            else:
                self._move(transfer, block + offset, _DEVICE_TO_DEVICE)
        for block, tiles in filling.tiles.items():
            assert kernels is not None
            try:
                kernels.copy_tiles("gather", tiles, block, self._copies, held)
            except ResourceExhaustedError:  # no room for the kernel's table
                for origin, offset, nbytes in tiles.tolist():
                    self._memcpy(block + offset, origin, nbytes, _DEVICE_TO_DEVICE)
        return filling

    def view(self, array: Any, start: int, nbytes: int) -> memoryview | None:
        return None

    def allocate(self, nbytes: int) -> HostBuffer:
        with on_device(self.device):
            return PinnedBuffer(nbytes)

    def to_slot(self, transfers: Iterable[Transfer], slot: memoryview) -> Event | None:
        base, transfers = _address_of(slot), Transfers.of(transfers)
        with self._queueing(Held()) as held:
            held.keep(slot, transfers.arrays)
            if isinstance(transfers.arrays[0], Copy):
                return self._from_image(transfers, base, held)
            copies = _direct_copies(transfers)
            if copies is not None:
                for device, offset, nbytes in copies:
                    self._memcpy(base + offset, device, nbytes, _DEVICE_TO_HOST)
            elif not self._gather(transfers, base, held):
                for transfer in transfers:
                    self._move(transfer, base + transfer.offset, _DEVICE_TO_HOST)
            return self._mark(held)

    def _gather(self, transfers: Transfers, base: int, held: Held) -> bool:
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

    def _from_image(self, transfers: Transfers, base: int, held: Held) -> _Ended:
        """A chunk lies in the image as it will in the file: the pieces and what is between them are copied at once."""
        copy: Copy = transfers.arrays[0]
        begin, end = _extent(transfers)
        places, sizes = copy.place + transfers.starts[:1], column([end - begin])
        _, starts, block, offset, nbytes = copy.image.stretches(places, sizes)
        for target, origin, size in column([base + begin + starts, block + offset, nbytes]).T.tolist():
            self._memcpy(target, origin, size, _DEVICE_TO_HOST)
        return self._mark(held)

    def from_slot(self, transfers: Iterable[Transfer], slot: memoryview) -> Event | None:
        base, transfers = _address_of(slot), Transfers.of(transfers)
        with self._queueing(Held()) as held:
            held.keep(slot, transfers.arrays)
            copies = _direct_copies(transfers)
            if copies is not None:
                for device, offset, nbytes in copies:
                    self._memcpy(device, base + offset, nbytes, _HOST_TO_DEVICE)
            elif not self._scatter(transfers, base, held):
                for transfer in transfers:
                    self._move(transfer, base + transfer.offset, _HOST_TO_DEVICE)
            return self._mark(held)

    def _scatter(self, transfers: Transfers, base: int, held: Held) -> bool:
        """Whether there are kernels, and room on the device to scatter from."""
        kernels = self.kernels()
        if kernels is None:
            return False
        begin, end = _extent(transfers)
        with contextlib.suppress(ResourceExhaustedError):
            buffer = held.borrow(self._buffers, end)
            self._memcpy(buffer.pointer + begin, base + begin, end - begin, _HOST_TO_DEVICE)
            kernels.scatter(transfers, buffer.pointer, self._copies, held)
            return True
        return False

    def checking(self, arrays: Sequence[Any], combine: Callable[[int, int, int], int]) -> Checking | None:
        kernels = self.kernels()
        if kernels is None:
            return None
        if isinstance(arrays[0], Copy):
            places, sizes = column([copy.place for copy in arrays]), column([copy.nbytes for copy in arrays])
            rows, _, block, offset, sizes = arrays[0].image.stretches(places, sizes)
            addresses = block + offset
        else:
            rows = np.arange(len(arrays))
            addresses, sizes = column([a.data.ptr for a in arrays]), column([a.nbytes for a in arrays])
        with contextlib.suppress(ResourceExhaustedError):
            return _Checking(self, kernels, rows, addresses, sizes, combine)
        return None

    def check(self, launch: Callable[[Any], Any], held: Held) -> _Ended:
        """Queues a kernel that computes checksums, after all copies so far."""
        with self._queueing(held):
            wait_for(self._checks.ptr, record(self._copies.ptr))
            held.results = launch(self._checks)
            return _Ended(self, record(self._checks.ptr), held)

    def synchronize(self) -> None:
        with on_device(self.device):
            landed = list(self._in_flight)
            if _has_ended(self._copies.synchronize, self._checks.synchronize):
                self.land(landed)

    def warm_up(self) -> None:
        kernels = self.kernels()
        if kernels is not None:
            with self._queueing(Held()) as held, contextlib.suppress(ResourceExhaustedError):
                for _ in range(_QUEUED_CHUNKS):
                    held.borrow(self._buffers, _BUFFER_NBYTES)
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
    def _queueing(self, held: Held) -> Iterator[Held]:
        """Around queueing work, with what it uses; after an error nothing is in flight.

        Without a lock: threads that each call CUDA several times would hold each other up, since every call gives the
        GIL away.  Until all is queued ``held`` is this thread's alone, so that no other one lands it.
        """
        with on_device(self.device):
            try:
                yield held
            except BaseException:
                self.synchronize()
                self.land([held])
                raise
            self._in_flight.add(held)

    def _mark(self, held: Held) -> _Ended:
        """The end of the copies queued so far."""
        return _Ended(self, record(self._copies.ptr), held)

    def land(self, helds: Sequence[Held]) -> None:
        """Gives up what was held for work that somebody has waited for."""
        with self._lock:
            for held in helds:
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


def _extent(transfers: Transfers) -> tuple[int, int]:
    """Of the slot, what the transfers cover.  They are in ascending order."""
    return int(transfers.offsets[0]), int(transfers.offsets[-1] + transfers.nbytes[-1])


def _direct_copies(transfers: Transfers) -> list[tuple[int, int, int]] | None:
    """``(device address, slot offset, nbytes)`` of the copies that serve all transfers, None if a kernel serves better.

    Parts of one allocation that follow each other on both sides go in one copy.
    """
    most = 1 + int(transfers.nbytes.sum()) // DIRECT_NBYTES
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
