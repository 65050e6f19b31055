"""Sums, means and the like along axes, and where the largest and smallest elements are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import apply, constant_ints
from gpusaver.compat.v1.ops.rules import no_gradient
from gpusaver.compat.v1.shapes import Shape, is_known
from gpusaver.compat.v1.table import op


def _axes(node: Any) -> list[int] | None:
    """The axes that are reduced, counted from 0; None if they are not known before it runs."""
    axes, shape = constant_ints(node.inputs[1]), node.inputs[0].static_shape
    if axes is None or shape is None:
        return None
    rank = len(shape)
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(f"Invalid reduction dimension {axis} for input with {rank} dimensions.")
    return sorted({axis % rank for axis in axes})


def _shape(node: Any) -> list[Shape]:
    shape, axes = node.inputs[0].static_shape, _axes(node)
    keep = node.attrs["keep_dims"]
    if shape is None or axes is None:
        return [(None,) * len(shape) if keep and shape is not None else None]
    if keep:
        return [tuple(1 if axis in axes else size for axis, size in enumerate(shape))]
    return [tuple(size for axis, size in enumerate(shape) if axis not in axes)]


def _reduction(name: str, function: str, gradient: Any = None, dtype: str = "T") -> None:
    attributes = "keep_dims:bool=False Tidx:type=int32" + (" T:type" if dtype == "T" else "")

    def kernel(run: Any, node: Any, x: Any, axes: Any) -> Any:
        axis = tuple(np.atleast_1d(axes).tolist())
        result = getattr(run.xp, function)(x, axis=axis, keepdims=node.attrs["keep_dims"])
        return result if result.dtype == x.dtype else result.astype(x.dtype)

    op(
        name,
        f"input:{dtype} reduction_indices:Tidx! -> {dtype}",
        attributes,
        shape=_shape,
        kernel=kernel,
        gradient=gradient,
    )


def _kept(node: Any) -> list[int] | None:
    """The shape of the output with the reduced axes kept, one unknown size as -1; None: not known before it runs."""
    shape, axes = node.inputs[0].static_shape, _axes(node)
    if axes is None or shape is None:
        return None
    sizes = [1 if axis in axes else -1 if size is None else size for axis, size in enumerate(shape)]
    return sizes if sizes.count(-1) < 2 else None


def _spread(node: Any, values: Any) -> Any:
    """``values``, of the output's shape, broadcast to the input's."""
    x, axes = node.inputs
    sizes, kept = apply("Shape", x), _kept(node)
    if kept is None:
        # The reduced axes have size 1: of all axes' sizes those are replaced.
        rank = apply("Rank", x)
        wrapped = apply("FloorMod", apply("AddV2", axes, rank), rank)
        every = apply("Range", 0, rank, 1)
        kept = apply("DynamicStitch", [every, wrapped], [sizes, apply("Fill", apply("Shape", wrapped), 1)])
    return apply("BroadcastTo", apply("Reshape", values, kept), sizes)


def _sum_gradient(node: Any, g: Any) -> list[Any]:
    return [_spread(node, g), None]


def _mean_gradient(node: Any, g: Any) -> list[Any]:
    x, y = node.inputs[0], node.outputs[0]
    if is_known(x.static_shape) and is_known(y.static_shape):
        count: Any = max(math.prod(x.static_shape), 1) // max(math.prod(y.static_shape), 1)
    else:
        each = apply("Maximum", apply("Size", y), 1)
        count = apply("Cast", apply("FloorDiv", apply("Size", x), each), DstT=x.dtype)
    return [_spread(node, apply("RealDiv", g, count)), None]


def _extreme_gradient(node: Any, g: Any) -> list[Any]:
    """Shared by those that are equally large."""
    x, axes = node.inputs
    chosen = apply("Cast", apply("Equal", x, _spread(node, node.outputs[0])), DstT=x.dtype)
    count = apply("Sum", chosen, axes, keep_dims=True)
    return [apply("Mul", apply("RealDiv", chosen, count), _spread(node, g)), None]


def _product_gradient(node: Any, g: Any) -> list[Any]:
    """The product of all others, from both sides: right where elements are 0 too."""
    x = node.inputs[0]
    axes = _axes(node)
    if axes is None:
        raise LookupError("the gradient of a Prod whose axes are not known before it runs is not there")
    order = [*axes, *(axis for axis in range(len(x.static_shape)) if axis not in axes)]
    moved = apply("Transpose", x, order)
    sizes = apply("Shape", moved)
    reduced = apply("Prod", apply("Slice", sizes, [0], [len(axes)]), [0])
    rows = apply("Reshape", moved, apply("Pack", [reduced, -1], axis=0))
    before = apply("Cumprod", rows, 0, exclusive=True)
    after = apply("Cumprod", rows, 0, exclusive=True, reverse=True)
    others = apply("Reshape", apply("Mul", before, after), sizes)
    inverse = [order.index(axis) for axis in range(len(order))]
    return [apply("Mul", _spread(node, g), apply("Transpose", others, inverse)), None]


_reduction("Sum", "sum", _sum_gradient)
_reduction("Mean", "mean", _mean_gradient)
_reduction("Max", "max", _extreme_gradient)
_reduction("Min", "min", _extreme_gradient)
_reduction("Prod", "prod", _product_gradient)
_reduction("All", "all", no_gradient, dtype="bool")
_reduction("Any", "any", no_gradient, dtype="bool")


def _arg_shape(node: Any) -> list[Shape]:
    shape, axis = node.inputs[0].static_shape, constant_ints(node.inputs[1])
    if shape is None or axis is None:
        return [None]
    if not -len(shape) <= axis[0] < len(shape):
        raise ValueError(f"Dimension {axis[0]} is out of range for input with {len(shape)} dimensions")
    return [tuple(size for number, size in enumerate(shape) if number != axis[0] % len(shape))]


for _name, _function in (("ArgMax", "argmax"), ("ArgMin", "argmin")):
    op(
        _name,
        "input:T dimension:Tidx! -> output_type",
        "T:type Tidx:type=int32 output_type:type=int64",
        shape=_arg_shape,
        kernel=lambda run, node, x, axis, f=_function: getattr(run.xp, f)(x, axis=int(axis)).astype(
            node.attrs["output_type"].numpy_dtype
        ),
        gradient=lambda node, g: [None, None],
    )


def _cumulative_product(run: Any, node: Any, x: Any, axis: Any) -> Any:
    axis = int(axis)
    values = run.xp.flip(x, axis) if node.attrs["reverse"] else x
    result = run.xp.cumprod(values, axis=axis, dtype=x.dtype)
    if node.attrs["exclusive"]:
        ones = run.xp.ones_like(run.xp.take(result, run.xp.arange(1), axis=axis))
        kept = run.xp.take(result, run.xp.arange(x.shape[axis] - 1), axis=axis)
        result = run.xp.concatenate([ones, kept], axis=axis) if x.shape[axis] else result
    return run.xp.flip(result, axis) if node.attrs["reverse"] else result


op(
    "Cumprod",
    "x:T axis:Tidx! -> T",
    "exclusive:bool=False reverse:bool=False T:type Tidx:type=int32",
    shape=lambda node: [node.inputs[0].static_shape],
    kernel=_cumulative_product,
)
