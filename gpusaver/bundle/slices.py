"""Parts of partitioned tensors: their keys, their overlaps, and whether they make up the whole (section 6).

A part is a rectangular box.  A whole tensor can be read if its stored parts do not overlap and fill the box that is
wanted; parts that do not overlap fill it exactly if their volumes inside it add up to its volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.coding import encode_slice_key, printable
from gpusaver.errors import InternalError, InvalidArgumentError, UnimplementedError
from gpusaver.tensor import TensorSlice

#: Pairs of parts, times dimensions, that are compared before giving up, a second's work.  Real partitionings stay far
#: below; a grid of 400 by 400 reaches it.
_MAX_PAIRS = 1 << 26


def slice_key(name: bytes, part: TensorSlice) -> bytes:
    """The key of the entry that holds ``part`` of the tensor ``name``."""
    return encode_slice_key(name, part)


def intersect(a: TensorSlice, b: TensorSlice, shape: Sequence[int]) -> TensorSlice | None:
    """The common part, with explicit extents in the coordinates of the whole tensor; None if there is no element.

    The only part of a scalar is the scalar: ``TensorSlice(())``.  InvalidArgumentError if a part does not fit.
    """
    extents = []
    for (a_start, a_length), (b_start, b_length) in zip(a.resolve(shape), b.resolve(shape), strict=True):
        start = max(a_start, b_start)
        length = min(a_start + a_length, b_start + b_length) - start
        if length <= 0:
            return None
        extents.append((start, length))
    return TensorSlice(tuple(extents))


def check_tiling(
    name: bytes, shape: Sequence[int], slices: Sequence[TensorSlice], wanted: TensorSlice | None = None
) -> None:
    """Returns if ``slices`` do not overlap and fill ``wanted`` (default: the whole tensor).

    Raises InternalError for an overlap, which no writer may produce, and InvalidArgumentError for a gap (which a
    checkpoint of some partitions only has) or a part that reaches outside the shape.
    """
    wanted = wanted or TensorSlice.full(len(shape))
    boxes = [(part, part.resolve(shape)) for part in slices]
    boxes = [(part, box) for part, box in boxes if all(length for _, length in box)]
    goal = wanted.resolve(shape)
    volume = math.prod(length for _, length in goal)
    covered = 0
    if len(boxes) == 1 or (boxes and not shape):
        if len(boxes) > 1:
            raise _overlap(name, boxes[0][0], boxes[1][0])
        covered = _common_volume(boxes[0][1], goal)
    elif boxes:
        extents = np.array([box for _, box in boxes], dtype=np.int64)
        starts = extents[:, :, 0]
        stops = starts + extents[:, :, 1]
        pair = _find_overlap(starts, stops)
        if pair is not None:
            raise _overlap(name, boxes[pair[0]][0], boxes[pair[1]][0])
        low, high = np.array(goal, dtype=np.int64).T
        common = np.minimum(stops, low + high) - np.maximum(starts, low)
        covered = int(np.prod(common[(common > 0).all(axis=1)], axis=1).sum())
    if covered != volume:
        raise InvalidArgumentError(
            f"Does not have sufficient slices for partitioned tensor {printable(name)} to restore in slice_spec: "
            f"{wanted}; the {len(slices)} stored slices hold {covered} of its {volume} elements"
        )


def _common_volume(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> int:
    return math.prod(
        max(0, min(a_start + a_length, b_start + b_length) - max(a_start, b_start))
        for (a_start, a_length), (b_start, b_length) in zip(a, b, strict=True)
    )


def _find_overlap(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """Two rows that have an element in common.  Boxes are not empty and have at least one dimension.

    In the order of their starts along an axis, a box can only overlap those that follow it and start before it
    stops; along the best axis these are few or none.
    """
    count, rank = starts.shape
    best: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
    for axis in range(rank):
        order = np.argsort(starts[:, axis], kind="stable")
        ends = np.searchsorted(starts[order, axis], stops[order, axis])
        pairs = int((ends - np.arange(1, count + 1)).sum())
        if best is None or pairs < best[0]:
            best = (pairs, order, ends)
    assert best is not None
    pairs, order, ends = best
    if pairs * rank > _MAX_PAIRS:
        raise UnimplementedError(f"{count} slices of one tensor lie too intricately to be checked for overlaps")
    starts, stops = starts[order], stops[order]
    for row in np.flatnonzero(ends > np.arange(1, count + 1)):
        others = slice(row + 1, int(ends[row]))
        apart = (starts[others] >= stops[row]) | (stops[others] <= starts[row])
        overlapping = np.flatnonzero(~apart.any(axis=1))
        if len(overlapping):
            return int(order[row]), int(order[row + 1 + overlapping[0]])
    return None


def _overlap(name: bytes, first: TensorSlice, second: TensorSlice) -> InternalError:
    return InternalError(
        f"Overlapping slices of tensor {printable(name)}: existing slice = {first}, new slice = {second}"
    )
