"""Where every byte of a bundle goes, decided before the first one moves.

::

    shard (a data file)
    | run of owner 0                                | run of owner 1 ...
    ^4096                                           ^4096
    | large | pad | large | pad | small small small |
    ^4096         ^4096         packed

    chunks: windows of a run of chunk_nbytes, each a list of pieces (this part of that tensor goes there)

An *owner* is what can read the tensors' bytes: the host, or one device.  No chunk spans two owners.  Tensors keep the
order in which they are given (the order of their keys) among the large and among the small ones of a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Tensors of at least this many bytes start at multiples of PAGE; padding then costs at most 3 % and 1.5 % on average.
LARGE_NBYTES = 128 * 1024
PAGE = 4096
#: Bounds what one chunk costs in Python, and the size of a device's table of pieces.
MAX_PIECES = 65_536

Column = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """``nbytes`` bytes of ``tensor`` (its number), from its byte ``start`` on, at ``offset`` within the chunk."""

    tensor: int
    start: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """``nbytes`` bytes at ``offset`` of a shard; between pieces lie gaps."""

    shard: int
    owner: int
    offset: int
    nbytes: int
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns by tensor number, and the size of each shard."""

    shard: Column
    offset: Column
    nbytes: Column
    owner: Column
    shard_nbytes: tuple[int, ...]

    def places(self) -> Column:
        """Where each tensor lies in an image of all that its owner has: runs behind one another, as in the files."""
        places = np.zeros(len(self.nbytes), dtype=np.int64)
        for owner in np.unique(self.owner):
            end = 0
            for shard in np.unique(self.shard[self.owner == owner]):
                run = np.flatnonzero((self.owner == owner) & (self.shard == shard))
                begin = int(self.offset[run].min()) // PAGE * PAGE
                places[run] = self.offset[run] - begin + end
                end = _round_up(int((places[run] + self.nbytes[run]).max()), PAGE)
        return places

    def chunks(self, chunk_nbytes: int, owner: int | None = None) -> Iterator[Chunk]:
        """Every byte of every tensor, or of an owner's, exactly once.  Requires: a multiple of PAGE."""
        return chunks(self.shard, self.offset, self.nbytes, self.owner, chunk_nbytes, max_gap=PAGE, only=owner)


def plan_layout(
    nbytes: Sequence[int],
    owner: Sequence[int],
    shard: Sequence[int],
    num_shards: int,
) -> Layout:
    """Places tensors given as columns: their stored sizes in bytes, their owners and their shards."""
    sizes = np.asarray(nbytes, dtype=np.int64)
    owners = np.asarray(owner, dtype=np.int64)
    shards = np.asarray(shard, dtype=np.int64)
    offsets = np.zeros(len(sizes), dtype=np.int64)
    shard_nbytes = []
    for number in range(num_shards):
        in_shard = shards == number
        end = 0
        for run_owner in np.unique(owners[in_shard]):
            run = np.flatnonzero(in_shard & (owners == run_owner))
            is_large = sizes[run] >= LARGE_NBYTES
            end = _round_up(end, PAGE)
            for members, alignment in ((run[is_large], PAGE), (run[~is_large], 1)):
                end = _place(offsets, sizes, members, end, alignment)
        shard_nbytes.append(end)
    return Layout(shards, offsets, sizes, owners, tuple(shard_nbytes))


def _place(offsets: Column, sizes: Column, members: Column, start: int, alignment: int) -> int:
    """Sets the members' offsets from ``start`` on; returns where the last one ends."""
    if not len(members):
        return start
    padded = -(-sizes[members] // alignment) * alignment
    offsets[members] = _round_up(start, alignment) + np.cumsum(padded) - padded
    return int(offsets[members[-1]] + sizes[members[-1]])


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def chunks(
    shard: Column,
    offset: Column,
    nbytes: Column,
    owner: Column,
    chunk_nbytes: int,
    *,
    max_gap: int,
    only: int | None = None,
) -> Iterator[Chunk]:
    """Windows of at most ``chunk_nbytes`` over the given byte ranges (of one owner), for writing or reading them.

    A new run of windows starts where the shard or the owner changes, where the next range is more than ``max_gap``
    bytes away (not worth reading through), and where it overlaps the one before.  Windows of a run follow each other
    without a gap, all but the last a multiple of PAGE long if ``chunk_nbytes`` is.

    Requires: ``max_gap`` is less than ``chunk_nbytes``; a window could hold nothing else.
    """
    order = np.lexsort((nbytes, offset, owner, shard))
    order = order[(nbytes[order] > 0) & ((owner[order] == only) if only is not None else True)]
    if not len(order):
        return
    shards, owners, starts = shard[order], owner[order], offset[order]
    ends = starts + nbytes[order]
    gaps = starts[1:] - ends[:-1]
    breaks = (shards[1:] != shards[:-1]) | (owners[1:] != owners[:-1]) | (gaps > max_gap) | (gaps < 0)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(order)]
    for first, last in itertools.pairwise(bounds):
        yield from _windows(
            int(shards[first]),
            int(owners[first]),
            order[first:last].tolist(),
            starts[first:last].tolist(),
            ends[first:last].tolist(),
            chunk_nbytes,
        )


def _windows(
    shard: int, owner: int, tensors: list[int], starts: list[int], ends: list[int], chunk_nbytes: int
) -> Iterator[Chunk]:
    position, run_end = starts[0], ends[-1]
    current = 0
    while position < run_end:
        stop = min(position + chunk_nbytes, run_end)
        if current + MAX_PIECES < len(starts) and starts[current + MAX_PIECES] < stop:
            # A page holds fewer than MAX_PIECES pieces, so this still moves on.
            stop = max(position + PAGE, position + (starts[current + MAX_PIECES] - position) // PAGE * PAGE)
        pieces = []
        while current < len(starts) and starts[current] < stop:
            start, end = starts[current], ends[current]
            begin = max(start, position)
            pieces.append(Piece(tensors[current], begin - start, begin - position, min(end, stop) - begin))
            if end > stop:
                break
            current += 1
        yield Chunk(shard, owner, position, stop - position, pieces)
        position = stop
