"""Launches the kernels of ``kernels/*.cu``: many pieces in one launch, where CuPy would copy tensor by tensor.

A launch with a table uploads it first, with one asynchronous copy from page-locked memory::

    pinned    | records | checksums |          a Table, on loan until the work is over
                  |            ^
    device    | records | checksums |

Nothing here waits for a device.  What a launch reads or writes must stay until its stream got there: the launch adds it
to the ``held`` of the work that it is part of, before anything is queued.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Iterable
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from gpusaver.device.base import Column, Transfer, Transfers, are_contiguous
from gpusaver.device.cuda_memory import Held, Pool, Table
from gpusaver.device.cuda_streams import on_device
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
#: Room for the tables of 10,000 pieces.
TABLE_NBYTES = 256 * 1024
_MULTIPROCESSOR_COUNT = 16  # cudaDevAttrMultiProcessorCount
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2


class Kernels:
    """The compiled kernels of one device.

    Any thread may launch, whatever its current device and stream are.  ``stream`` is a CuPy stream of the device, in
    which all work of a launch is queued.  Addresses are of the device's memory, at any alignment.
    """

    def __init__(self, device: int) -> None:
        """Compiles; CuPy remembers on disk what it compiled.  Raises whatever CuPy raises if it cannot compile."""
        self._device = device
        self.tables: Pool[Table] = Pool(Table, TABLE_NBYTES)
        self._functions: dict[str, Any] = {}
        with on_device(device):
            self._multiprocessors: int = cupy.cuda.runtime.deviceGetAttribute(_MULTIPROCESSOR_COUNT, device)
            folder = importlib.resources.files("gpusaver.device").joinpath("kernels")
            for file, names in _SOURCES.items():
                module = cupy.RawModule(code=folder.joinpath(file).read_text("utf-8"), options=COMPILE_OPTIONS)
                module.compile()
                self._functions |= {name: module.get_function(name) for name in names}

    def gather(self, transfers: Iterable[Transfer], image: int, stream: Any, held: Held) -> None:
        """Copies the parts of the arrays, of any strides, to their offsets from the address ``image``."""
        self._copy("gather", transfers, image, stream, held)

    def scatter(self, transfers: Iterable[Transfer], image: int, stream: Any, held: Held) -> None:
        """Copies the bytes at the offsets from the address ``image`` to the parts of the arrays, of any strides.

        Requires: no two elements of an array share memory.
        """
        self._copy("scatter", transfers, image, stream, held)

    def copy_tiles(self, name: str, tiles: npt.NDArray[np.void], image: int, stream: Any, held: Held) -> None:
        """The same ("gather", "scatter") of contiguous bytes that are cut already, and held."""
        if not len(tiles):
            return
        with on_device(self._device), stream:
            table, nbytes = self._table([tiles], held)
            _upload(table, nbytes, stream)
            arguments = (np.uint64(table.device.pointer), np.uint64(image))
            self._functions[name]((len(tiles),), (_THREADS,), arguments)

    def crc32c(self, addresses: Column, sizes: Column, held: Held) -> Callable[[Any], npt.NDArray[np.uint32]]:
        """``launch(stream)``, to be called once, which queues the computing of the checksums of pieces, unmasked, as
        :func:`gpusaver.bundle.crc.crc32c` computes them; memory for that is borrowed now.

        It returns an array in page-locked memory of ``held``: its values are there when the stream got there, and until
        ``held`` is released.
        """
        parts = cut_parts(addresses, sizes, part_nbytes(int(sizes.sum()), self._multiprocessors))
        with on_device(self._device):
            table, nbytes = self._table([parts, initial_checksums(sizes)], held)

        def launch(stream: Any) -> npt.NDArray[np.uint32]:
            checksums = table.host[parts.nbytes : nbytes].view(np.uint32)
            if len(parts):
                with on_device(self._device), stream:
                    _upload(table, nbytes, stream)
                    blocks = -(-len(parts) // WARPS_PER_BLOCK)
                    grid = min(blocks, _CRC_BLOCKS_PER_MULTIPROCESSOR * self._multiprocessors)
                    device = table.device.pointer + parts.nbytes
                    arguments = (np.uint64(table.device.pointer), np.uint32(len(parts)), np.uint64(device))
                    self._functions["crc32c"]((grid,), (32, WARPS_PER_BLOCK), arguments)
                    cupy.cuda.runtime.memcpyAsync(
                        checksums.ctypes.data, device, checksums.nbytes, _DEVICE_TO_HOST, stream.ptr
                    )
            return checksums

        return launch

    def _copy(self, name: str, transfers: Iterable[Transfer], image: int, stream: Any, held: Held) -> None:
        transfers = Transfers.of(transfers)
        held.keep(transfers.arrays)
        plain = are_contiguous(transfers.arrays)
        if not all(plain):
            with on_device(self._device), stream:
                for (array, start, offset, nbytes), is_plain in zip(transfers, plain, strict=True):
                    if not is_plain:
                        self._copy_strided(f"{name}_strided", array, start, nbytes, image + offset)
        addresses = (column([array.data.ptr for array in transfers.arrays]) + transfers.starts)[plain]
        offsets, sizes = transfers.offsets[plain], transfers.nbytes[plain]
        targets = addresses if name == "scatter" else image + offsets
        self.copy_tiles(name, cut_tiles(addresses, offsets, sizes, targets), image, stream, held)

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

    def _table(self, columns: Iterable[npt.NDArray[Any]], held: Held) -> tuple[Table, int]:
        """The columns one after the other in a table, and how many bytes they are."""
        octets = np.concatenate([values.view(np.uint8) for values in columns])
        table = held.borrow(self.tables, max(octets.nbytes, 1))
        table.host[: octets.nbytes] = octets
        return table, octets.nbytes


def _upload(table: Table, nbytes: int, stream: Any) -> None:
    cupy.cuda.runtime.memcpyAsync(table.device.pointer, table.host.ctypes.data, nbytes, _HOST_TO_DEVICE, stream.ptr)


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
