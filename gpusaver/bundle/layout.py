"""Where every byte of a bundle goes, decided before the first one moves.

::

    shard (a data file)
    | run of owner 0                                | run of owner 1 ...
    ^4096                                           ^4096
    | large | pad | large | pad | small small small |
    ^4096 + 16    ^4096 + 16    packed

    chunks: windows of a run of chunk_nbytes, each a list of pieces (this part of that tensor goes there)

Large tensors lie as far into a page of the file as NumPy's large arrays into a page of memory: so a disk can take the
pages from where they are, and the page cache is copied to and from at full speed.

An *owner* is what can read the tensors' bytes: the host, or one device.  No chunk spans two owners.  Tensors keep the
order in which they are given (the order of their keys) among the large and among the small ones of a run.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Tensors of at least this many bytes start PHASE into a page; padding then costs at most 3 % and 1.5 % on average.
LARGE_NBYTES = 128 * 1024
PAGE = 4096
#: glibc's malloc maps pages for what takes 128 KiB or more, and keeps 16 bytes before what it returns.  Devices, whose
#: arrays begin at multiples of 256, move and check 16 bytes at a time.
PHASE = 16
#: Bounds what one chunk costs in Python, and the size of a device's table of pieces.
MAX_PIECES = 65_536

Column = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """``nbytes`` bytes of ``tensor`` (its number), from its byte ``start`` on, at ``offset`` within the chunk."""

    tensor: int
    start: int
    offset: int
    nbytes: int


_piece = functools.partial(tuple.__new__, Piece)  # a third of the time of Piece(...)


@dataclass(frozen=True)
class Chunk:
    """``nbytes`` bytes at ``offset`` of a shard; between pieces lie gaps.

    ``tensors``: those that have a part here, ascending; ``starts`` and ``ends``: where each of them lies in the shard.
    Only the first and the last may reach beyond the chunk.
    """

    shard: int
    owner: int
    offset: int
    nbytes: int
    tensors: list[int]
    starts: list[int]
    ends: list[int]

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        whole = zip(
            self.tensors,
            itertools.repeat(0),
            [start - self.offset for start in self.starts],
            map(operator.sub, self.ends, self.starts),
        )
        pieces = list(map(_piece, whole))
        for number in self.cut:
            pieces[number] = self.piece(number)
        return pieces

    def piece(self, number: int) -> Piece:
        """The part of ``tensors[number]``."""
        start, end = self.starts[number], self.ends[number]
        begin = max(start, self.offset)
        nbytes = min(end, self.offset + self.nbytes) - begin
        return _piece((self.tensors[number], begin - start, begin - self.offset, nbytes))

    @property
    def cut(self) -> list[int]:
        """Numbers of the tensors of which only a part is here: none, the first, the last, or both."""
        end, last = self.offset + self.nbytes, len(self.tensors) - 1
        return [number for number in {0, last} if self.starts[number] < self.offset or self.ends[number] > end]

    @property
    def whole(self) -> slice:
        """Numbers of the others."""
        cut, last = self.cut, len(self.tensors) - 1
        return slice(int(0 in cut), last + (last not in cut))

    def runs(self, nbytes: int) -> Iterator[range]:
        """Numbers of tensors that lie here whole, side by side, each of less than ``nbytes``; others come alone."""
        if all(end - start >= nbytes for start, end in zip(self.starts, self.ends, strict=True)):
            yield from (range(number, number + 1) for number in range(len(self.tensors)))
            return
        starts, ends = np.asarray(self.starts), np.asarray(self.ends)
        alone = ends - starts >= nbytes
        alone[self.cut] = True
        breaks = alone[1:] | alone[:-1] | (starts[1:] != ends[:-1])
        yield from itertools.starmap(range, itertools.pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(alone)]))

    def halves(self) -> tuple[Chunk, Chunk]:
        """Cut at a page.  Requires: two pages or more of a layout, whose gaps are shorter: each has a tensor."""
        half = _round_up(self.nbytes // 2, PAGE)
        middle = self.offset + half
        before = slice(bisect.bisect_left(self.starts, middle))
        after = slice(bisect.bisect_right(self.ends, middle), None)
        return (
            Chunk(self.shard, self.owner, self.offset, half, *self._columns(before)),
            Chunk(self.shard, self.owner, middle, self.nbytes - half, *self._columns(after)),
        )

    def _columns(self, numbers: slice) -> tuple[list[int], list[int], list[int]]:
        return self.tensors[numbers], self.starts[numbers], self.ends[numbers]

    def padded_nbytes(self, alignment: int) -> int:
        """With what is written behind its end."""
        return _round_up(self.nbytes, alignment)

    @property
    def has_gaps(self) -> bool:
        is_covered = self.starts[0] <= self.offset and self.ends[-1] >= self.offset + self.nbytes
        return not is_covered or self.starts[1:] != self.ends[:-1]


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
        """Every byte of every tensor, or of an owner's, exactly once.  Requires: a multiple of PAGE.

        Those of all owners, with their gaps, are the whole shards: of a file that is written over nothing stays.
        """
        columns = self.shard, self.offset, self.nbytes, self.owner
        order = file_order(*columns)
        if owner is not None:
            order = order[self.owner[order] == owner]
        return chunks(*columns, chunk_nbytes, max_gap=PAGE, alignment=PAGE, within=self.shard_nbytes, order=order)


def plan_layout(
    nbytes: Sequence[int] | Column,
    owner: Sequence[int] | Column,
    shard: Sequence[int] | Column,
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
            end = _place(offsets, sizes, run[is_large], _round_up(end, PAGE), PHASE)
            end = _place(offsets, sizes, run[~is_large], end)
        shard_nbytes.append(end)
    return Layout(shards, offsets, sizes, owners, tuple(shard_nbytes))


def _place(offsets: Column, sizes: Column, members: Column, start: int, phase: int | None = None) -> int:
    """Sets the members' offsets from ``start`` on, each the first of the phase; returns where the last one ends."""
    if not len(members):
        return start
    nbytes = sizes[members]
    ends = start + np.cumsum(nbytes)
    if phase is not None:
        before = np.concatenate(([start], phase + nbytes[:-1]))  # modulo PAGE
        ends += np.cumsum((phase - before) % PAGE)
    offsets[members] = ends - nbytes
    return int(offsets[members[-1]] + sizes[members[-1]])


def _round_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def file_order(shard: Column, offset: Column, nbytes: Column, owner: Column) -> Column:
    """Numbers of byte ranges, but for empty ones: shard by shard, in it owner by owner, and ascending."""
    is_in_order = (shard[1:] == shard[:-1]) & (owner[1:] == owner[:-1]) & (offset[1:] > offset[:-1])
    order = np.arange(len(offset)) if is_in_order.all() else np.lexsort((nbytes, offset, owner, shard))
    return order[nbytes[order] > 0]


def chunks(
    shard: Column,
    offset: Column,
    nbytes: Column,
    owner: Column,
    chunk_nbytes: int,
    *,
    max_gap: int,
    alignment: int = 1,
    within: Sequence[int] | None = None,
    order: Column | None = None,
) -> Iterator[Chunk]:
    """Windows of at most ``chunk_nbytes`` over the given byte ranges, for writing or reading them.

    A new run of windows starts where the shard or the owner changes, where the next range is more than ``max_gap``
    bytes away (not worth reading through), and where it overlaps the one before.  A run starts at a multiple of
    ``alignment``; its windows follow each other without a gap, all but the last a multiple of PAGE long if
    ``chunk_nbytes`` is.  ``within``: the size of each shard; then runs end at a multiple of ``alignment``, too, or
    there.

    ``order``: :func:`file_order`, or what is left of it.
    Requires: ``max_gap`` is less than ``chunk_nbytes``; a window could hold nothing else.
    """
    if order is None:
        order = file_order(shard, offset, nbytes, owner)
    if not len(order):
        return
    shards, owners, starts = shard[order], owner[order], offset[order]
    ends = starts + nbytes[order]
    gaps = starts[1:] - ends[:-1]
    breaks = (shards[1:] != shards[:-1]) | (owners[1:] != owners[:-1]) | (gaps > max_gap) | (gaps < 0)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(order)]
    for first, last in itertools.pairwise(bounds):
        end, run_shard = int(ends[last - 1]), int(shards[first])
        yield from _windows(
            run_shard,
            int(owners[first]),
            order[first:last].tolist(),
            starts[first:last].tolist(),
            ends[first:last].tolist(),
            chunk_nbytes,
            alignment,
            end if within is None else min(_round_up(end, alignment), within[run_shard]),
        )


def _windows(
    shard: int,
    owner: int,
    tensors: list[int],
    starts: list[int],
    ends: list[int],
    chunk_nbytes: int,
    alignment: int,
    run_end: int,
) -> Iterator[Chunk]:
    position = starts[0] // alignment * alignment
    current = 0
    while position < run_end:
        stop = min(position + chunk_nbytes, run_end)
        after = bisect.bisect_left(starts, stop, current)
        if after - current > MAX_PIECES:
            # A page holds fewer than MAX_PIECES pieces, so this still moves on.
            stop = max(position + PAGE, position + (starts[current + MAX_PIECES] - position) // PAGE * PAGE)
            after = bisect.bisect_left(starts, stop, current)
        members = slice(current, after)
        yield Chunk(shard, owner, position, stop - position, tensors[members], starts[members], ends[members])
        current = after - (ends[after - 1] > stop)
        position = stop
