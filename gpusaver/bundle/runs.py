"""Parts of stored slices as runs of bytes: which bytes they are, and what their checksums say together.

::

    stored, row-major    | . . . . . . . . . . . . . . . . |     one checksum, of all of it
    rows wanted                  |_run_____|                     one run
    columns wanted         |_|     |_|     |_|     |_|           a run per row, or all where the gaps are small
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gpusaver.bundle.crc import combine

Box = tuple[tuple[int, int], ...]


def widened(box: Box, shape: Sequence[int], itemsize: int, *, max_gap: int, max_runs: int) -> Box:
    """The box of a row-major array of ``shape`` that is read for ``box``: few runs of bytes instead of many short ones.

    A dimension is taken whole where less than ``max_gap`` bytes lie between runs, or the runs are more than
    ``max_runs``.
    """
    wide = list(box)
    for axis in range(len(shape) - 1, -1, -1):
        length = wide[axis][1]
        if length == shape[axis]:
            continue
        stride = itemsize * math.prod(shape[axis + 1 :])
        count = math.prod(size for _, size in wide[:axis])
        if count == 1 or ((shape[axis] - length) * stride > max_gap and count <= max_runs):
            break
        wide[axis] = (0, shape[axis])
    return tuple(wide)


def runs(box: Box, shape: Sequence[int], itemsize: int) -> Iterator[tuple[tuple[int | slice, ...], int, int]]:
    """The bytes of ``box`` in a row-major array of ``shape``: (index within the box, offset, number of bytes)."""
    axis = next((a for a in range(len(shape) - 1, -1, -1) if box[a][1] != shape[a]), -1)
    strides = [itemsize * math.prod(shape[a + 1 :]) for a in range(len(shape))]
    nbytes = itemsize * math.prod(length for _, length in box[max(axis, 0) :])
    base = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    for place in itertools.product(*(range(length) for _, length in box[: max(axis, 0)])):
        yield place, base + sum(map(operator.mul, place, strides)), nbytes


class Run(NamedTuple):
    """Bytes that were read of a stored slice, and their checksum, unmasked."""

    start: int
    nbytes: int
    crc: int


def joined_crc(read: Iterable[Run], nbytes: int) -> int | None:
    """The checksum of a stored slice of ``nbytes`` bytes, if runs that were read make it up; else None."""
    following = {run.start: run for run in sorted(read)}  # of those that begin together the longest
    crc = position = 0
    while position < nbytes:
        run = following.get(position)
        if run is None or not run.nbytes:
            return None
        crc = combine(crc, run.crc, run.nbytes)
        position += run.nbytes
    return crc if position == nbytes else None
