"""Launches the kernels of ``kernels/*.cu``: many pieces in one launch, where CuPy would copy tensor by tensor.

A launch with a table uploads it first, with one asynchronous copy from page-locked memory::

    pinned    | records | checksums |          a buffer of Kernels, lent to one launch at a time
                  |            ^
    device    | records | checksums |

Nothing here waits for a device.  What a launch reads or writes must stay alive until its stream got there: the launch
appends it to the list ``keep``, and the caller drops the list afterwards.  The table's buffer is then lent again.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from gpusaver.device.base import Transfer
from gpusaver.device.launch_plan import (
    COMPILE_OPTIONS,
    MAX_DIMS,
    TILE_UNITS,
    WARPS_PER_BLOCK,
    column,
    cut_parts,
    cut_tiles,
    initial_checksums,
    part_nbytes,
    plan_strided,
)

_THREADS = 256
_SOURCES = {"copy.cu": ("gather", "scatter", "gather_strided", "scatter_strided"), "crc32c.cu": ("crc32c",)}
#: Blocks of the checksum kernel that a multiprocessor runs at once (48 registers a thread, 33 KiB of shared memory).
_CRC_BLOCKS_PER_MULTIPROCESSOR = 5
#: Room for the tables of 10,000 pieces; as many buffers as launches are usually queued at once.
_BUFFER_NBYTES, _BUFFERS = 256 * 1024, 2
_MULTIPROCESSOR_COUNT = 16  # cudaDevAttrMultiProcessorCount
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2


class _Buffer:
    """As many bytes of page-locked memory as of the current device's."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.host = cupy.cuda.PinnedMemory(nbytes)
        self.device = cupy.cuda.Memory(nbytes)


class _Loan:
    """A buffer in use: its host bytes as an array interface, so that views of them keep the loan."""

    def __init__(self, buffer: _Buffer, free: deque[_Buffer]) -> None:
        self._free = free
        self.buffer = buffer
        self.__array_interface__ = {
            "version": 3,
            "data": (buffer.host.ptr, False),
            "shape": (buffer.nbytes,),
            "typestr": "|u1",
        }

    def __del__(self) -> None:
        self._free.append(self.buffer)


class Kernels:
    """The compiled kernels of one device.

    Any thread may launch, whatever its current device and stream are.  ``stream`` is a CuPy stream of the device, in
    which all work of a launch is queued.  Addresses are of the device's memory, at any alignment.
    """

    def __init__(self, device: int) -> None:
        """Compiles, and allocates what most launches need, so that they do not wait.

        CuPy remembers on disk what it compiled.  Raises whatever CuPy raises if it cannot compile.
        """
        self._device = device
        self._functions: dict[str, Any] = {}
        with cupy.cuda.Device(device):
            self._free = deque(_Buffer(_BUFFER_NBYTES) for _ in range(_BUFFERS))
            self._multiprocessors: int = cupy.cuda.runtime.deviceGetAttribute(_MULTIPROCESSOR_COUNT, device)
            folder = importlib.resources.files("gpusaver.device").joinpath("kernels")
            for file, names in _SOURCES.items():
                module = cupy.RawModule(code=folder.joinpath(file).read_text("utf-8"), options=COMPILE_OPTIONS)
                module.compile()
                self._functions |= {name: module.get_function(name) for name in names}

    def gather(self, transfers: Sequence[Transfer], image: int, stream: Any, keep: list[Any]) -> None:
        """Copies the parts of the arrays, of any strides, to their offsets from the address ``image``."""
        self._copy("gather", transfers, image, stream, keep)

    def scatter(self, transfers: Sequence[Transfer], image: int, stream: Any, keep: list[Any]) -> None:
        """Copies the bytes at the offsets from the address ``image`` to the parts of the arrays, of any strides.

        Requires: no two elements of an array share memory.
        """
        self._copy("scatter", transfers, image, stream, keep)

    def gather_strided(self, array: Any, start: int, nbytes: int, flat: int, stream: Any) -> None:
        """Copies bytes [start, start + nbytes) of the array's row-major form to the address ``flat``.

        One launch, or several if the array has more than MAX_DIMS dimensions that cannot be seen as fewer.  Nothing is
        kept alive.
        """
        with cupy.cuda.Device(self._device), stream:
            self._copy_strided("gather_strided", array, start, nbytes, flat)

    def scatter_strided(self, array: Any, start: int, nbytes: int, flat: int, stream: Any) -> None:
        """The reverse of :meth:`gather_strided`.  Requires: no two elements of the array share memory."""
        with cupy.cuda.Device(self._device), stream:
            self._copy_strided("scatter_strided", array, start, nbytes, flat)

    def crc32c(self, pieces: Sequence[tuple[int, int]], stream: Any, keep: list[Any]) -> npt.NDArray[np.uint32]:
        """The checksums of (address, nbytes) pieces, unmasked, as :func:`gpusaver.bundle.crc.crc32c` computes them.

        The array is in page-locked memory: its values are there once the stream got there.  It may outlive ``keep``.
        """
        addresses, sizes = column([address for address, _ in pieces]), column([nbytes for _, nbytes in pieces])
        parts = cut_parts(addresses, sizes, part_nbytes(int(sizes.sum()), self._multiprocessors))
        with cupy.cuda.Device(self._device), stream:
            loan = self._upload([parts, initial_checksums(sizes)], stream, keep)
            device, host = loan.buffer.device.ptr + parts.nbytes, np.asarray(loan)
            checksums = host[parts.nbytes : parts.nbytes + 4 * len(sizes)].view(np.uint32)
            if len(parts):
                blocks = -(-len(parts) // WARPS_PER_BLOCK)
                grid = min(blocks, _CRC_BLOCKS_PER_MULTIPROCESSOR * self._multiprocessors)
                arguments = (np.uint64(loan.buffer.device.ptr), np.uint32(len(parts)), np.uint64(device))
                self._functions["crc32c"]((grid,), (32, WARPS_PER_BLOCK), arguments)
                cupy.cuda.runtime.memcpyAsync(
                    checksums.ctypes.data, device, checksums.nbytes, _DEVICE_TO_HOST, stream.ptr
                )
        return checksums

    def trim(self) -> None:
        """Frees the buffers that no launch uses; later launches make them anew."""
        self._free.clear()

    def _copy(self, name: str, transfers: Sequence[Transfer], image: int, stream: Any, keep: list[Any]) -> None:
        keep += [transfer.array for transfer in transfers]
        pointers, offsets, sizes = [], [], []
        with cupy.cuda.Device(self._device), stream:
            for array, start, offset, nbytes in transfers:
                if not nbytes:
                    continue
                if array.flags.c_contiguous:
                    pointers.append(array.data.ptr + start)
                    offsets.append(offset)
                    sizes.append(nbytes)
                else:
                    self._copy_strided(f"{name}_strided", array, start, nbytes, image + offset)
            if not pointers:
                return
            addresses, places = column(pointers), column(offsets)
            targets = addresses if name == "scatter" else image + places
            tiles = cut_tiles(addresses, places, column(sizes), targets)
            loan = self._upload([tiles], stream, keep)
            arguments = (np.uint64(loan.buffer.device.ptr), np.uint64(image))
            self._functions[name]((len(tiles),), (_THREADS,), arguments)

    def _copy_strided(self, name: str, array: Any, start: int, nbytes: int, flat: int) -> None:
        pointer = array.data.ptr
        plan = plan_strided(pointer, array.shape, array.strides, array.itemsize, start, nbytes, flat)
        padding = MAX_DIMS - len(plan.sizes)
        if padding < 0:
            row = array.nbytes // array.shape[0]
            for number in range(start // row, -(-(start + nbytes) // row)):
                begin, end = max(start, number * row), min(start + nbytes, (number + 1) * row)
                self._copy_strided(name, array[number], begin - number * row, end - begin, flat + begin - start)
            return
        if not plan.units:
            return
        arguments = (
            *(np.uint64(pointer), np.uint64(flat), np.int64(plan.first), np.int64(plan.units)),
            *(np.uint32(plan.unit_nbytes), np.uint32(len(plan.sizes))),
            *(np.int64(size) for size in [*plan.sizes, *[1] * padding]),
            *(np.int64(stride) for stride in [*plan.strides, *[0] * padding]),
        )
        self._functions[name]((-(-plan.units // TILE_UNITS),), (_THREADS,), arguments)

    def _upload(self, tables: Iterable[npt.NDArray[Any]], stream: Any, keep: list[Any]) -> _Loan:
        """The tables one after the other in a buffer, on the way to the device."""
        octets = np.concatenate([table.view(np.uint8) for table in tables])
        loan = _Loan(self._buffer(octets.nbytes), self._free)
        keep.append(loan)
        np.asarray(loan)[: octets.nbytes] = octets
        host, device = loan.buffer.host.ptr, loan.buffer.device.ptr
        cupy.cuda.runtime.memcpyAsync(device, host, octets.nbytes, _HOST_TO_DEVICE, stream.ptr)
        return loan

    def _buffer(self, nbytes: int) -> _Buffer:
        """A free one, or a new one if none is large enough; making one may wait for all work of the device."""
        for _ in range(len(self._free)):
            try:
                buffer = self._free.popleft()
            except IndexError:  # another thread took it
                break
            if buffer.nbytes >= nbytes:
                return buffer
            self._free.append(buffer)
        return _Buffer(max(_BUFFER_NBYTES, 1 << (nbytes - 1).bit_length()))


@functools.cache
def load(device: int) -> tuple[Kernels | None, str]:
    """The kernels of a device, or None and the reason in words; takes seconds where CuPy has not compiled them before.

    Without NVRTC, which CuPy's wheels do not bring, there are none: arrays are then copied one by one, and the host
    computes the checksums.  An error of the device itself is raised.
    """
    try:
        return Kernels(device), ""
    except cupy.cuda.runtime.CUDARuntimeError:
        raise
    except Exception as error:
        # CuPy raises what it likes here: RuntimeError for a missing library, CompileException, driver errors.
        first_line = str(error).strip().splitlines()[:1]
        return None, f"cuda:{device}: no kernels: {type(error).__name__}: {' '.join(first_line)}"
