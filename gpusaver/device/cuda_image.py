"""Images: memory of a device in which tensors lie as in a data file.

::

    array --gather or copy--> | tensor | pad | tensor | tensor ... |    blocks of at most 256 MiB
                              <------ chunk ------><---- chunk ... copied to slots in one piece

Where everything goes is planned once, and again only when arrays have moved.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.device.base import Column
from gpusaver.device.cuda_memory import DeviceBuffer
from gpusaver.device.launch_plan import column, cut_tiles, enumerated

_PAGE = 4096
#: Of an image: small enough to be found in memory that others have used in pieces.
BLOCK_NBYTES = 256 * 1024 * 1024


class Stretches(NamedTuple):
    """Columns: ``nbytes`` bytes, from byte ``start`` of the row on, at ``offset`` behind the address ``block``."""

    row: Column
    start: Column
    block: Column
    offset: Column
    nbytes: Column


class Image:
    """Memory of one device that holds tensors as a data file will; addressed as one, allocated in blocks."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._starts: list[int] = []
        self._blocks: list[DeviceBuffer] = []

    def grow(self, nbytes: int) -> None:
        """To at least ``nbytes`` bytes.  ResourceExhaustedError, the image as it was, if the device has no room."""
        more: list[DeviceBuffer] = []
        missing = -(-(nbytes - self.nbytes) // _PAGE) * _PAGE
        while missing > 0:
            more.append(DeviceBuffer(min(missing, BLOCK_NBYTES)))
            missing -= more[-1].nbytes
        for block in more:
            self._starts.append(self.nbytes)
            self._blocks.append(block)
            self.nbytes += block.nbytes

    def stretches(self, places: Column, nbytes: Column) -> Stretches:
        """Where the bytes [place, place + nbytes) of each row are."""
        starts, ends = column([*self._starts, self.nbytes]), places + nbytes
        first = np.searchsorted(starts[1:], places, "right")
        last = np.maximum(np.searchsorted(starts[1:], ends - 1, "right"), first)
        row, number = enumerated(last - first + 1)
        block = first[row] + number
        begin = np.maximum(places[row], starts[block])
        pointers = column([block.pointer for block in self._blocks] or [0])
        block = np.minimum(block, len(pointers) - 1)  # behind the last one there may be empty arrays
        return Stretches(
            row,
            begin - places[row],
            pointers[block],
            begin - starts[block],
            np.minimum(ends[row], starts[block + 1]) - begin if self._blocks else np.zeros_like(begin),
        )


class Copy(NamedTuple):
    """A tensor in an image: what a snapshot made of an array."""

    image: Image
    place: int
    nbytes: int


_copy = functools.partial(tuple.__new__, Copy)  # half the time of Copy(...)


class Filling(NamedTuple):
    """How an image is filled, and what is in it then; the same while the arrays are where they were.

    ``signature``: columns of addresses, places, sizes, and of what is contiguous.  ``direct``: rows of target, origin
    and nbytes.  ``strided``: of an array's number, its first byte, the block's address, the offset there, and nbytes.
    ``tiles``: by the block's address.
    """

    signature: Column
    direct: list[list[int]]
    strided: list[list[int]]
    tiles: dict[int, npt.NDArray[np.void]]
    copies: list[Copy]


def plan_filling(image: Image, signature: Column, *, direct_nbytes: int) -> Filling:
    """``direct_nbytes``: what is copied by itself."""
    pointers, places, sizes, contiguous = signature
    row, start, block, offset, nbytes = image.stretches(places, sizes)
    is_plain, sources = contiguous[row] > 0, pointers[row] + start
    is_direct = is_plain & (nbytes >= direct_nbytes)
    is_small = is_plain & ~is_direct & (nbytes > 0)
    tiles = {}
    for address in np.unique(block[is_small]).tolist():
        here = is_small & (block == address)
        tiles[address] = cut_tiles(sources[here], offset[here], nbytes[here], address + offset[here])
    return Filling(
        signature,
        column([block + offset, sources, nbytes])[:, is_direct].T.tolist(),
        column([row, start, block, offset, nbytes])[:, ~is_plain & (nbytes > 0)].T.tolist(),
        tiles,
        list(map(_copy, zip(itertools.repeat(image), places.tolist(), sizes.tolist(), strict=False))),
    )


class Snapshot:
    """An image, and how it was filled last: ``copies`` refer to the image alone, so that it goes when they do."""

    def __init__(self) -> None:
        self.image = Image()
        self.filling: Filling | None = None

    @property
    def nbytes(self) -> int:
        return self.image.nbytes
