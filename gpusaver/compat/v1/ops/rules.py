"""What many rows share: shape rules, and gradients of broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import apply, constant_ints
from gpusaver.compat.v1.shapes import Shape, broadcast, merge


def is_text(value: Any) -> bool:
    """Whether it is an array of strings: those are on the host, whatever the session's arrays are."""
    return isinstance(value, np.ndarray) and value.dtype.kind == "O"


def unchanged(op: Any) -> list[Shape]:
    """Of the first input."""
    return [op.inputs[0].static_shape]


def merged(op: Any) -> list[Shape]:
    """All inputs have one shape."""
    shape: Shape = None
    for tensor in op.inputs:
        shape = merge(shape, tensor.static_shape)
    return [shape]


def broadcasted(op: Any) -> list[Shape]:
    return [broadcast(op.inputs[0].static_shape, op.inputs[1].static_shape)]


def scalar(op: Any) -> list[Shape]:
    return [()]


def unknown(op: Any) -> list[Shape]:
    return [None for _ in op.row.output_dtypes(op.attrs)]


def nothing(op: Any) -> list[Shape]:
    return []


def from_shape_input(number: int) -> Callable[[Any], list[Shape]]:
    """The shape that an input holds, if it is constant."""

    def rule(op: Any) -> list[Shape]:
        return [shape_of_value(op.inputs[number])]

    return rule


def shape_of_value(tensor: Any) -> Shape:
    """The shape that a tensor of sizes means; -1 is unknown."""
    sizes = constant_ints(tensor)
    if sizes is not None:
        return tuple(None if size < 0 else size for size in sizes)
    if tensor.op.type == "Shape":
        shape: Shape = tensor.op.inputs[0].static_shape
        return shape
    if tensor.op.type == "Pack":  # some sizes may be known
        parts = [constant_ints(part) for part in tensor.op.inputs]
        return tuple(None if part is None or part[0] < 0 else part[0] for part in parts)
    count = tensor.static_shape
    return (None,) * count[0] if count is not None and len(count) == 1 and count[0] is not None else None


def from_attr(op: Any) -> list[Shape]:
    return [op.attrs["shape"]]


def reduced_to(gradient: Any, tensor: Any, other: Any) -> Any:
    """``gradient`` of an output that ``tensor`` was broadcast into together with ``other``: summed to its shape."""
    if tensor is other:
        return gradient
    axes = _repeated_axes(tensor.static_shape, other.static_shape)
    if axes is None:
        sizes = apply("Shape", tensor)
        found = apply("BroadcastGradientArgs", sizes, apply("Shape", other))[0]
        return apply("Reshape", apply("Sum", gradient, found), sizes)
    added, stretched = axes
    if stretched:
        gradient = apply("Sum", gradient, stretched, keep_dims=True)
    return apply("Sum", gradient, added) if added else gradient


def _repeated_axes(shape: Shape, beside: Shape) -> tuple[list[int], list[int]] | None:
    """Axes of the output that ``shape`` lacks, and those along which its size 1 was stretched; None: not known yet."""
    if shape is None or beside is None:
        return None
    rank = max(len(shape), len(beside))
    added = rank - len(shape)
    padded = (1,) * (rank - len(beside)) + beside
    stretched = []
    for axis, size in enumerate(shape, added):
        if size is None and padded[axis] != 1:
            return None
        if size == 1 and padded[axis] != 1:
            stretched.append(axis)
    return list(range(added)), stretched


def no_gradient(op: Any, *gradients: Any) -> Sequence[None]:
    """Differentiable, with the gradient None: shapes, comparisons."""
    return [None] * len(op.inputs)
