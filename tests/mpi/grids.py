"""Tensors cut into parts, at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from gpusaver import PartitionedVariable

Index = tuple[slice, ...]


@st.composite
def tilings(draw: st.DrawFn, shape: Sequence[int], most: int = 6) -> list[Index]:
    """Boxes that fill the shape without overlapping, not only grids: each step cuts one of them in two."""
    boxes = [tuple((0, size) for size in shape)]
    for _ in range(draw(st.integers(0, most - 1))):
        at = draw(st.integers(0, len(boxes) - 1))
        axes = [axis for axis, (start, stop) in enumerate(boxes[at]) if stop - start > 1]
        if not axes:
            continue
        axis = draw(st.sampled_from(axes))
        start, stop = boxes[at][axis]
        middle = draw(st.integers(start + 1, stop - 1))
        box = boxes.pop(at)
        for piece in ((start, middle), (middle, stop)):
            boxes.append((*box[:axis], piece, *box[axis + 1 :]))
    return [tuple(slice(*extent) for extent in box) for box in boxes]


def parts(array: Any, tiling: Sequence[Index], number: int, count: int) -> list[PartitionedVariable]:
    """Copies of the parts that one of ``count`` ranks has."""
    return [PartitionedVariable(array.shape, index, array[index].copy()) for index in tiling[number::count]]
