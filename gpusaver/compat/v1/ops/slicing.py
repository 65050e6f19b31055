"""Parts of tensors: slices, rows by number, and their gradients; padding, one-hot rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import apply, constant_ints
from gpusaver.compat.v1.ops.rules import no_gradient, shape_of_value
from gpusaver.compat.v1.shapes import Shape
from gpusaver.compat.v1.table import op
from gpusaver.errors import InvalidArgumentError

_MASKS = "begin_mask:int=0 end_mask:int=0 ellipsis_mask:int=0 new_axis_mask:int=0 shrink_axis_mask:int=0"


def _index(node: Any, begin: list[int], end: list[int], strides: list[int]) -> tuple[Any, ...]:
    """The Python index that the numbers and masks of a StridedSlice mean."""
    attrs = node.attrs
    index: list[Any] = []
    for number, (first, last, step) in enumerate(zip(begin, end, strides, strict=True)):
        bit = 1 << number
        if attrs["ellipsis_mask"] & bit:
            index.append(Ellipsis)
        elif attrs["new_axis_mask"] & bit:
            index.append(None)
        elif attrs["shrink_axis_mask"] & bit:
            index.append(first)
        else:
            start = None if attrs["begin_mask"] & bit else first
            index.append(slice(start, None if attrs["end_mask"] & bit else last, step))
    return tuple(index)


def _strided_shape(node: Any) -> list[Shape]:
    shape = node.inputs[0].static_shape
    begin, end, strides = (constant_ints(tensor) for tensor in node.inputs[1:])
    if shape is None or begin is None or end is None or strides is None:
        return [None]
    index = _index(node, begin, end, strides)
    # Unknown sizes: an array that is as large as an index can name, whose slices tell what stays known.
    if Ellipsis not in index and sum(part is not None for part in index) > len(shape):
        raise ValueError(f"Index out of range using input dim {len(shape)}; input has only {len(shape)} dims")
    sizes: list[int | None] = []
    rest = list(shape)
    for place, part in enumerate(index):
        if part is None:
            sizes.append(1)
        elif part is Ellipsis:
            after = sum(other is not None for other in index[place + 1 :])
            while len(rest) > after:
                sizes.append(rest.pop(0))
        elif isinstance(part, slice):
            size = rest.pop(0)
            whole = part == slice(None, None, 1)
            sizes.append((size if whole else None) if size is None else len(range(*part.indices(size))))
        else:
            size = rest.pop(0)
            if size is not None and not -size <= part < size:
                raise ValueError(f"slice index {part} of dimension {place} out of bounds")
    return [(*sizes, *rest)]


def _strided(run: Any, node: Any, x: Any, begin: Any, end: Any, strides: Any) -> Any:
    try:
        return x[_index(node, begin.tolist(), end.tolist(), strides.tolist())]
    except IndexError as error:
        raise InvalidArgumentError(f"slice index out of bounds: {error}") from error


def _strided_gradient(node: Any, g: Any) -> list[Any]:
    x, begin, end, strides = node.inputs
    masks = {name: node.attrs[name] for name in node.attrs if name.endswith("_mask")}
    sizes = apply("Shape", x, out_type=begin.dtype)
    return [apply("StridedSliceGrad", sizes, begin, end, strides, g, **masks), None, None, None]


def _strided_back(run: Any, node: Any, shape: Any, begin: Any, end: Any, strides: Any, dy: Any) -> Any:
    result = run.xp.zeros(tuple(shape.tolist()), dy.dtype)
    result[_index(node, begin.tolist(), end.tolist(), strides.tolist())] = dy
    return result


op(
    "StridedSlice",
    "input:T begin:Index! end:Index! strides:Index! -> T",
    f"T:type Index:type {_MASKS}",
    shape=_strided_shape,
    kernel=_strided,
    gradient=_strided_gradient,
)
op(
    "StridedSliceGrad",
    "shape:Index! begin:Index! end:Index! strides:Index! dy:T -> T",
    f"T:type Index:type {_MASKS}",
    shape=lambda node: [shape_of_value(node.inputs[0])],
    kernel=_strided_back,
)


def _slice_shape(node: Any) -> list[Shape]:
    shape = node.inputs[0].static_shape
    begin, sizes = constant_ints(node.inputs[1]), constant_ints(node.inputs[2])
    if sizes is None or shape is None:
        return [shape_of_value(node.inputs[2]) if shape is None else (None,) * len(shape)]
    found: list[int | None] = []
    for axis, size in enumerate(sizes):
        whole, first = shape[axis], None if begin is None else begin[axis]
        if size >= 0:
            if whole is not None and first is not None and first + size > whole:
                raise ValueError(f"Expected size[{axis}] in [0, {whole - first}], but got {size}")
            found.append(size)
        else:
            found.append(None if whole is None or first is None else whole - first)
    return [tuple(found)]


def _slice(run: Any, node: Any, x: Any, begin: Any, size: Any) -> Any:
    index = []
    for axis, (first, count) in enumerate(zip(begin.tolist(), size.tolist(), strict=True)):
        last = x.shape[axis] if count == -1 else first + count
        if not 0 <= first <= last <= x.shape[axis]:
            raise InvalidArgumentError(f"Expected size[{axis}] in [0, {x.shape[axis] - first}], but got {count}")
        index.append(slice(first, last))
    return x[tuple(index)]


def _slice_gradient(node: Any, g: Any) -> list[Any]:
    """Padded with zeros up to the input's shape."""
    x, begin, _ = node.inputs
    begin = apply("Cast", begin, DstT="int32") if begin.dtype != "int32" else begin
    after = apply("Sub", apply("Sub", apply("Shape", x), apply("Shape", g)), begin)
    return [apply("Pad", g, apply("Pack", [begin, after], axis=1)), None, None]


op(
    "Slice",
    "input:T begin:Index! size:Index! -> T",
    "T:type Index:type",
    shape=_slice_shape,
    kernel=_slice,
    gradient=_slice_gradient,
)


def _pad_shape(node: Any) -> list[Shape]:
    shape, paddings = node.inputs[0].static_shape, constant_ints(node.inputs[1])
    if shape is None or paddings is None:
        return [None if shape is None else (None,) * len(shape)]
    pairs = zip(paddings[::2], paddings[1::2], strict=True)
    return [tuple(None if n is None else n + a + b for n, (a, b) in zip(shape, pairs, strict=True))]


def _pad_gradient(node: Any, g: Any) -> list[Any]:
    x, paddings = node.inputs
    rank = len(x.static_shape)
    first = apply("Reshape", apply("Slice", paddings, [0, 0], [rank, 1]), [-1])
    return [apply("Slice", g, first, apply("Shape", x, out_type=paddings.dtype)), None]


op(
    "Pad",
    "input:T paddings:Tpaddings! -> T",
    "T:type Tpaddings:type=int32",
    shape=_pad_shape,
    kernel=lambda run, node, x, paddings: run.xp.pad(x, [tuple(pair) for pair in paddings.tolist()]),
    gradient=_pad_gradient,
)


# -- by number


def _gather_shape(node: Any) -> list[Shape]:
    params, indices = node.inputs[0].static_shape, node.inputs[1].static_shape
    axis = constant_ints(node.inputs[2])
    if params is None or indices is None or axis is None:
        return [None]
    place = axis[0] % len(params)
    return [(*params[:place], *indices, *params[place + 1 :])]


def _gather(run: Any, node: Any, params: Any, indices: Any, axis: Any) -> Any:
    if node.attrs["batch_dims"]:
        raise InvalidArgumentError("batch_dims other than 0 are not there")
    size = params.shape[int(axis)]
    if run.xp is np and indices.size and not (indices.min() >= 0 and indices.max() < size):
        wrong = indices[(indices < 0) | (indices >= size)].reshape(-1)[0]
        raise InvalidArgumentError(f"indices = {wrong} is not in [0, {size})")
    return run.xp.take(params, indices, axis=int(axis))


def _gather_gradient(node: Any, g: Any) -> list[Any]:
    """Rows are summed up by number; another axis goes to the front for that."""
    params, indices, axis_tensor = node.inputs
    axis = constant_ints(axis_tensor)
    if axis is None or params.static_shape is None:
        raise LookupError("the gradient of a GatherV2 of unknown axis is not there")
    rank, place = len(params.static_shape), axis[0] % len(params.static_shape)
    moved = list(range(rank))
    if place:
        count = len(indices.static_shape)
        order = [*range(place, place + count), *range(place), *range(place + count, rank - 1 + count)]
        g = apply("Transpose", g, order)
        moved = [place, *range(place), *range(place + 1, rank)]
    sizes = apply("GatherV2", apply("Shape", params), moved, 0)
    rows = apply("Slice", sizes, [0], [1])
    flat = apply("Reshape", indices, [-1])
    values = apply("Reshape", g, apply("ConcatV2", [apply("Shape", flat), apply("Slice", sizes, [1], [-1])], 0))
    summed = apply("UnsortedSegmentSum", values, flat, apply("Reshape", rows, []))
    if place:
        summed = apply("Transpose", summed, [moved.index(number) for number in range(rank)])
    return [summed, None, None]


op(
    "GatherV2",
    "params:Tparams indices:Tindices axis:Taxis! -> Tparams",
    "batch_dims:int=0 Tparams:type Tindices:type Taxis:type=int32",
    shape=_gather_shape,
    kernel=_gather,
    gradient=_gather_gradient,
)


def _segment_sum(run: Any, node: Any, data: Any, numbers: Any, count: Any) -> Any:
    result = run.xp.zeros((int(count), *data.shape[numbers.ndim :]), data.dtype)
    run.xp.add.at(result, numbers, data)
    return result


op(
    "UnsortedSegmentSum",
    "data:T segment_ids:Tindices num_segments:Tnumsegments! -> T",
    "T:type Tindices:type Tnumsegments:type=int32",
    shape=lambda node: [None],
    kernel=_segment_sum,
)


def _one_hot_shape(node: Any) -> list[Shape]:
    shape, depth = node.inputs[0].static_shape, constant_ints(node.inputs[1])
    if shape is None:
        return [None]
    place = node.attrs["axis"] % (len(shape) + 1)
    return [(*shape[:place], depth[0] if depth else None, *shape[place:])]


def _one_hot(run: Any, node: Any, indices: Any, depth: Any, on: Any, off: Any) -> Any:
    hits = run.xp.expand_dims(indices, -1) == run.xp.arange(int(depth), dtype=indices.dtype)
    values = run.xp.where(hits, on, off).astype(node.attrs["T"].numpy_dtype)
    axis = node.attrs["axis"]
    return values if axis in (-1, indices.ndim) else run.xp.moveaxis(values, -1, axis)


op(
    "OneHot",
    "indices:TI depth:int32! on_value:T off_value:T -> T",
    "axis:int=-1 T:type TI:type=int64",
    shape=_one_hot_shape,
    kernel=_one_hot,
    gradient=no_gradient,
)


def _where_shape(node: Any) -> list[Shape]:
    shape = node.inputs[0].static_shape
    return [(None, None if shape is None else len(shape))]


op(
    "Where",
    "input:T -> int64",
    "T:type=bool",
    shape=_where_shape,
    kernel=lambda run, node, x: run.xp.argwhere(x).astype(np.int64),
    gradient=no_gradient,
)


def _list_difference(run: Any, node: Any, x: Any, y: Any) -> tuple[Any, Any]:
    places = np.flatnonzero(~np.isin(x, y))
    return x[places], places.astype(node.attrs["out_idx"].numpy_dtype)


op(
    "ListDiff",
    "x:T! y:T! -> T out_idx",
    "T:type out_idx:type=int32",
    shape=lambda node: [(None,), (None,)],
    kernel=_list_difference,
)
