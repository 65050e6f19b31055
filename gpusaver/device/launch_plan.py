"""How the work of the kernels is cut up: pure functions from addresses and sizes to the tables that kernels read.

::

    pieces   | piece 0                    | piece 1 | piece 2
    tiles    | tile | tile | tile | tile  | tile    | tile       copies: at most TILE_NBYTES, cut where the target is
                                                                 at a multiple of LINE_NBYTES
    parts    | part | part    | part      | part    | part       checksums: cut from the piece's end, so that all but
                                                                 the first have the same size

Constants and record layouts are those of ``kernels/copy.cu`` and ``kernels/crc32c.cu``.  All addresses, offsets and
sizes are in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.device.base import Column

#: For NVRTC; CuPy adds the architecture and ``-ftz=true --device-as-default-execution-space``.
COMPILE_OPTIONS = ("-std=c++17",)

TILE_NBYTES = 32 * 1024
LINE_NBYTES = 128
TILE = np.dtype([("array", "<i8"), ("offset", "<i8"), ("nbytes", "<i8")])

#: How many dimensions, and how many units a block of threads, the strided kernels take.
MAX_DIMS = 8
TILE_UNITS = 1024
#: Of a copy of rows: cudaDevAttrMaxPitch.
_MAX_PITCH = 2**31 - 1

PART = np.dtype([("address", "<i8"), ("nbytes", "<u4"), ("exponent", "<u4"), ("piece", "<u4"), ("flips", "<u4")])
WARPS_PER_BLOCK = 8
_ORDER = 2**31 - 1  # x^_ORDER = 1 modulo the polynomial of CRC-32C
_MIN_PART_NBYTES, _MAX_PART_NBYTES = 8 * 1024, 64 * 1024


def cut_tiles(array: Column, offset: Column, nbytes: Column, target: Column) -> npt.NDArray[np.void]:
    """One record per tile, of type TILE.  The columns describe the pieces; ``target`` is where each of them goes."""
    shift = target % LINE_NBYTES
    count = np.where(nbytes > 0, -(-(nbytes + shift) // TILE_NBYTES), 0)
    piece, number = enumerated(count)
    begin = np.maximum(number * TILE_NBYTES - shift[piece], 0)
    tiles = np.empty(len(piece), TILE)
    tiles["array"] = array[piece] + begin
    tiles["offset"] = offset[piece] + begin
    tiles["nbytes"] = np.minimum((number + 1) * TILE_NBYTES - shift[piece], nbytes[piece]) - begin
    return tiles


class Strided(NamedTuple):
    """Units [first, first + units) of an array's row-major form; sizes and strides begin with the innermost."""

    unit_nbytes: int
    first: int
    units: int
    sizes: list[int]
    strides: list[int]


def plan_strided(
    pointer: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, start: int, nbytes: int, flat: int
) -> Strided:
    """Bytes [start, start + nbytes) of the row-major form of an array at ``pointer``, which are or go at ``flat``.

    Dimensions that follow each other in memory become one; there may still be more than MAX_DIMS.
    """
    dims = _byte_dims(shape, strides, itemsize)
    run = dims[0][0]
    unit = math.gcd(16, run, pointer, flat, start, nbytes, *(stride for _, stride in dims[1:]))
    if run == unit:
        del dims[0]
    else:
        dims[0] = (run // unit, unit)
    return Strided(unit, start // unit, nbytes // unit, [size for size, _ in dims], [stride for _, stride in dims])


def _byte_dims(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    """(size, stride in bytes) of an array of bytes, the innermost first; what follows each other in memory is one."""
    dims = [(itemsize, 1)]
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        inner_size, inner_stride = dims[-1]
        if stride == inner_size * inner_stride:
            dims[-1] = (inner_size * size, inner_stride)
        elif size != 1:
            dims.append((size, stride))
    return dims


class Rows(NamedTuple):
    """``height`` times ``width`` bytes, every ``pitch`` from ``address`` on; side by side from byte ``flat`` on."""

    address: int
    flat: int
    width: int
    pitch: int
    height: int


def cut_rows(
    pointer: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, start: int, nbytes: int
) -> Iterator[Rows]:
    """Bytes [start, start + nbytes) of the row-major form of an array, as two-dimensional copies; ``flat`` begins at 0.

    For where no kernel can be compiled: as many copies as there are rows that no pitch joins.
    """
    dims = _byte_dims(shape, strides, itemsize)
    yield from _rows(dims, len(dims) - 1, pointer, start, start + nbytes, 0)


def _rows(dims: list[tuple[int, int]], level: int, address: int, begin: int, end: int, flat: int) -> Iterator[Rows]:
    """Bytes [begin, end) of what the dimensions up to ``level`` span from ``address`` on."""
    if begin >= end:
        return
    if level == 0:
        yield Rows(address + begin, flat, end - begin, end - begin, 1)
        return
    row = math.prod(size for size, _ in dims[:level])
    _, stride = dims[level]
    first, last = -(-begin // row), end // row
    if first > last:  # within one row
        yield from _rows(dims, level - 1, address + last * stride, begin - last * row, end - last * row, flat)
        return
    head = first * row - begin
    if head:
        yield from _rows(dims, level - 1, address + (first - 1) * stride, row - head, row, flat)
    if level == 1 and row <= stride <= _MAX_PITCH:
        if last > first:
            yield Rows(address + first * stride, flat + head, row, stride, last - first)
    else:
        for number in range(first, last):
            at = flat + head + (number - first) * row
            yield from _rows(dims, level - 1, address + number * stride, 0, row, at)
    done = head + (last - first) * row
    yield from _rows(dims, level - 1, address + last * stride, 0, end - last * row, flat + done)


def part_nbytes(total_nbytes: int, multiprocessors: int) -> int:
    """A size of parts that keeps every warp of a device busy and is worth the work at its end."""
    share = total_nbytes // (64 * multiprocessors)
    return min(max(1 << share.bit_length() >> 1, _MIN_PART_NBYTES), _MAX_PART_NBYTES)


def cut_parts(address: Column, nbytes: Column, size: int) -> npt.NDArray[np.void]:
    """One record per part, of type PART.  The columns describe the pieces; Requires: ``size`` is a multiple of 512.

    The first part of a piece has up to 16 bytes more than ``size``, or fewer: the four bytes whose complement stands
    for the checksum's initial value are never cut.
    """
    end = address + nbytes
    padded_end = -(-end // 16) * 16
    count = np.where(nbytes > 0, np.maximum(-(-(padded_end - address - 16) // size), 1), 0)
    piece, number = enumerated(count)
    part_end = padded_end[piece] - (count[piece] - 1 - number) * size
    parts = np.empty(len(piece), PART)
    parts["address"] = np.where(number == 0, address[piece], part_end - size)
    parts["nbytes"] = np.minimum(part_end, end[piece]) - parts["address"]
    parts["exponent"] = 8 * (end[piece] - part_end) % _ORDER
    parts["piece"] = piece
    parts["flips"] = np.where(number == 0, np.minimum(nbytes[piece], 4), 0)
    return parts


def initial_checksums(nbytes: Column) -> npt.NDArray[np.uint32]:
    """What the parts' results are added to: the complements that begin and end a checksum.

    The one that begins it reaches four bytes into a piece, which the parts see to, or beyond the end of a shorter one.
    """
    beyond = 8 * np.minimum(nbytes, 4).astype(np.uint64)
    return (np.uint64(0xFFFFFFFF) ^ (np.uint64(0xFFFFFFFF) >> beyond)).astype(np.uint32)


def enumerated(count: Column) -> tuple[Column, Column]:
    """For count[i] records of each piece i: the piece's number, and the record's own within the piece."""
    piece = np.repeat(np.arange(len(count)), count)
    return piece, np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count)


def column(values: Sequence[Any]) -> Column:
    return np.array(values, np.int64)
