"""Constants, and ops that move elements or say how many there are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import apply, constant_ints
from gpusaver.compat.v1.ops.rules import (
    from_attr,
    from_shape_input,
    no_gradient,
    scalar,
    shape_of_value,
    unchanged,
)
from gpusaver.compat.v1.shapes import Shape, is_known
from gpusaver.compat.v1.table import op
from gpusaver.errors import InvalidArgumentError


def _const_shape(node: Any) -> list[Shape]:
    value = node.attrs["value"]
    return [value.shape if isinstance(value, np.ndarray) else None]


def _const(run: Any, node: Any) -> Any:
    value = node.attrs["value"]
    if not isinstance(value, np.ndarray):
        raise InvalidArgumentError("its value cannot be read")
    return value


op("Const", "-> dtype", "value:tensor dtype:type", shape=_const_shape, kernel=_const, gradient=no_gradient)


def _placeholder(run: Any, node: Any) -> Any:
    shape = node.attrs["shape"]
    text = "<unknown>" if shape is None else "[" + ",".join("?" if n is None else str(n) for n in shape) + "]"
    dtype = node.attrs["dtype"].enum_name.removeprefix("DT_").lower()
    raise InvalidArgumentError(
        f"You must feed a value for placeholder tensor '{node.name}' with dtype {dtype} and shape {text}"
    )


op(
    "Placeholder",
    "-> dtype",
    "dtype:type shape:shape=None",
    shape=from_attr,
    kernel=_placeholder,
    gradient=no_gradient,
)
op(
    "PlaceholderWithDefault",
    "input:dtype -> dtype",
    "dtype:type shape:shape",
    shape=from_attr,
    kernel=lambda run, node, x: x,
    gradient=lambda node, g: [g],
)
op(
    "Identity",
    "input:T -> T",
    "T:type",
    shape=unchanged,
    kernel=lambda run, node, x: x,
    gradient=lambda node, g: [g],
)
op("StopGradient", "input:T -> T", "T:type", shape=unchanged, kernel=lambda run, node, x: x, gradient=no_gradient)


def _prevented(node: Any, g: Any) -> Any:
    raise LookupError(f"Gradient explicitly disabled. Reason: {node.attrs['message']!r}")


op(
    "PreventGradient",
    "input:T -> T",
    "T:type message:string=''",
    shape=unchanged,
    kernel=lambda run, node, x: x,
    gradient=_prevented,
)


def _assert(run: Any, node: Any, condition: Any, *data: Any) -> tuple[()]:
    if not condition.all():
        shown = [str(value)[:80] for value in data[: node.attrs["summarize"]]]
        raise InvalidArgumentError(f"assertion failed: {' '.join(shown)}")
    return ()


op(
    "Assert",
    "condition:bool! data:T* ->",
    "T:list(type) summarize:int=3",
    shape=lambda node: [],
    kernel=_assert,
)
op("NoOp", "", shape=lambda node: [], kernel=lambda run, node: ())
op(
    "ZerosLike",
    "x:T -> T",
    "T:type",
    shape=unchanged,
    kernel=lambda run, node, x: run.xp.zeros_like(x),
    gradient=no_gradient,
)


# -- sizes


def _rank_shape(node: Any) -> list[Shape]:
    shape = node.inputs[0].static_shape
    return [(None if shape is None else len(shape),)]


def _integer(node: Any, value: Any) -> Any:
    return np.asarray(value, node.attrs["out_type"].numpy_dtype)


op(
    "Shape",
    "input:T -> out_type",
    "T:type out_type:type=int32",
    shape=_rank_shape,
    kernel=lambda run, node, x: _integer(node, x.shape),
    gradient=no_gradient,
)
op(
    "ShapeN",
    "input:N*T -> N*out_type",
    "N:int T:type out_type:type=int32",
    shape=lambda node: [(None if tensor.static_shape is None else len(tensor.static_shape),) for tensor in node.inputs],
    kernel=lambda run, node, *xs: tuple(_integer(node, x.shape) for x in xs),
    gradient=no_gradient,
)
op(
    "Size",
    "input:T -> out_type",
    "T:type out_type:type=int32",
    shape=scalar,
    kernel=lambda run, node, x: _integer(node, math.prod(x.shape)),
    gradient=no_gradient,
)
op(
    "Rank",
    "input:T -> int32",
    "T:type",
    shape=scalar,
    kernel=lambda run, node, x: np.asarray(x.ndim, np.int32),
    gradient=no_gradient,
)


# -- made from sizes


def _fill(run: Any, node: Any, dims: Any, value: Any) -> Any:
    return run.xp.full(tuple(dims.tolist()), value, value.dtype)


def _range(run: Any, node: Any, start: Any, limit: Any, delta: Any) -> Any:
    return np.arange(start, limit, delta, dtype=node.attrs["Tidx"].numpy_dtype)


def _range_shape(node: Any) -> list[Shape]:
    values = [constant_ints(tensor) for tensor in node.inputs]
    if node.attrs["Tidx"].numpy_dtype.kind != "i" or None in values:
        return [(None,)]
    return [(len(range(*(value[0] for value in values if value is not None))),)]


def _reshape_shape(node: Any) -> list[Shape]:
    tensor, sizes = node.inputs
    wanted, shape = shape_of_value(sizes), tensor.static_shape
    if wanted is None or not is_known(shape):
        return [wanted]
    count = math.prod(shape)
    if None in wanted and constant_ints(sizes) is not None:
        known = math.prod(size for size in wanted if size is not None)
        if wanted.count(None) != 1 or (known and count % known):
            raise ValueError(f"Cannot reshape a tensor with {count} elements to shape {list(wanted)}")
        return [tuple(count // max(known, 1) if size is None else size for size in wanted)]
    if None not in wanted and math.prod(n for n in wanted if n is not None) != count:
        raise ValueError(f"Cannot reshape a tensor with {count} elements to shape {list(wanted)}")
    return [wanted]


op(
    "Fill",
    "dims:index_type! value:T -> T",
    "T:type index_type:type=int32",
    shape=from_shape_input(0),
    kernel=_fill,
    gradient=lambda node, g: [None, apply("Sum", g, apply("Range", 0, apply("Rank", g), 1))],
)
op(
    "Range",
    "start:Tidx! limit:Tidx! delta:Tidx! -> Tidx",
    "Tidx:type=int32",
    shape=_range_shape,
    kernel=_range,
    gradient=no_gradient,
)
op(
    "Reshape",
    "tensor:T shape:Tshape! -> T",
    "T:type Tshape:type=int32",
    shape=_reshape_shape,
    kernel=lambda run, node, x, shape: x.reshape(tuple(shape.tolist())),
    gradient=lambda node, g: [apply("Reshape", g, _sizes(node.inputs[0])), None],
)


def _sizes(tensor: Any) -> Any:
    """The shape of a tensor, as a list where it is known."""
    shape = tensor.static_shape
    return list(shape) if is_known(shape) else apply("Shape", tensor)


def _broadcast_to_gradient(node: Any, g: Any) -> list[Any]:
    x = node.inputs[0]
    sizes = apply("Shape", x)
    axes = apply("BroadcastGradientArgs", sizes, apply("Shape", g))[0]
    return [apply("Reshape", apply("Sum", g, axes), sizes), None]


op(
    "BroadcastTo",
    "input:T shape:Tidx! -> T",
    "T:type Tidx:type=int32",
    shape=from_shape_input(1),
    kernel=lambda run, node, x, shape: run.xp.broadcast_to(x, tuple(shape.tolist())),
    gradient=_broadcast_to_gradient,
)


def broadcast_axes(run: Any, node: Any, s0: Any, s1: Any) -> tuple[Any, Any]:
    """For each of two shapes the axes along which it was repeated to fit the other."""
    first, second = s0.tolist(), s1.tolist()
    rank = max(len(first), len(second))
    first, second = [1] * (rank - len(first)) + first, [1] * (rank - len(second)) + second
    added = rank - s0.size, rank - s1.size
    axes = [
        [axis for axis in range(rank) if axis < new or (one[axis] == 1 and other[axis] != 1)]
        for one, other, new in ((first, second, added[0]), (second, first, added[1]))
    ]
    dtype = node.attrs["T"].numpy_dtype
    return np.array(axes[0], dtype), np.array(axes[1], dtype)


op(
    "BroadcastGradientArgs",
    "s0:T! s1:T! -> T T",
    "T:type=int32",
    shape=lambda node: [(None,), (None,)],
    kernel=broadcast_axes,
)


# -- axes


def _squeeze_shape(node: Any) -> list[Shape]:
    shape, axes = node.inputs[0].static_shape, node.attrs["squeeze_dims"]
    if shape is None or (not axes and None in shape):
        return [None]
    chosen = {axis % len(shape) for axis in axes} if axes else {n for n, size in enumerate(shape) if size == 1}
    for axis in chosen:
        if shape[axis] not in (1, None):
            raise ValueError(f"Can not squeeze dim[{axis}], expected a dimension of 1, got {shape[axis]}")
    return [tuple(size for axis, size in enumerate(shape) if axis not in chosen)]


def _expand_shape(node: Any) -> list[Shape]:
    shape, axis = node.inputs[0].static_shape, constant_ints(node.inputs[1])
    if shape is None or axis is None:
        return [None]
    if not -len(shape) - 1 <= axis[0] <= len(shape):
        raise ValueError(f"dim {axis[0]} not in the interval [{-len(shape) - 1}, {len(shape)}]")
    place = axis[0] % (len(shape) + 1)
    return [(*shape[:place], 1, *shape[place:])]


def _transpose_shape(node: Any) -> list[Shape]:
    shape, perm = node.inputs[0].static_shape, constant_ints(node.inputs[1])
    if shape is None or perm is None:
        return [None if shape is None else (None,) * len(shape)]
    if sorted(perm) != list(range(len(shape))):
        raise ValueError(f"perm {perm} is no permutation of {len(shape)} dimensions")
    return [tuple(shape[axis] for axis in perm)]


def _inverse(run: Any, node: Any, x: Any) -> Any:
    return np.argsort(x).astype(x.dtype)


op(
    "Squeeze",
    "input:T -> T",
    "T:type squeeze_dims:list(int)=[]",
    shape=_squeeze_shape,
    kernel=lambda run, node, x: run.xp.squeeze(x, axis=tuple(node.attrs["squeeze_dims"]) or None),
    gradient=lambda node, g: [apply("Reshape", g, _sizes(node.inputs[0]))],
)
op(
    "ExpandDims",
    "input:T dim:Tdim! -> T",
    "T:type Tdim:type=int32",
    shape=_expand_shape,
    kernel=lambda run, node, x, axis: run.xp.expand_dims(x, int(axis.reshape(()))),
    gradient=lambda node, g: [apply("Reshape", g, _sizes(node.inputs[0])), None],
)
op(
    "Transpose",
    "x:T perm:Tperm! -> T",
    "T:type Tperm:type=int32",
    shape=_transpose_shape,
    kernel=lambda run, node, x, perm: run.xp.transpose(x, tuple(perm.tolist())),
    gradient=lambda node, g: [apply("Transpose", g, apply("InvertPermutation", node.inputs[1])), None],
)
op("InvertPermutation", "x:T! -> T", "T:type=int32", shape=unchanged, kernel=_inverse)
