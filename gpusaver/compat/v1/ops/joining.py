"""Tensors put together, and taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import apply, constant_ints
from gpusaver.compat.v1.ops.rules import is_text, merged, unknown
from gpusaver.compat.v1.shapes import Shape, merge
from gpusaver.compat.v1.table import op


def _pack_shape(node: Any) -> list[Shape]:
    shape = merged(node)[0]
    if shape is None:
        return [None]
    place = node.attrs["axis"] % (len(shape) + 1)
    return [(*shape[:place], node.attrs["N"], *shape[place:])]


def _pack(run: Any, node: Any, *values: Any) -> Any:
    if any(map(is_text, values)):
        return np.stack([np.asarray(value, object) for value in values], axis=node.attrs["axis"])
    return run.xp.stack(values, axis=node.attrs["axis"])


def _unpack_shape(node: Any) -> list[Shape]:
    shape, axis, num = node.inputs[0].static_shape, node.attrs["axis"], node.attrs["num"]
    if shape is None:
        return [None] * num
    place = axis % len(shape)
    return [(*shape[:place], *shape[place + 1 :])] * num


def _unpack(run: Any, node: Any, x: Any) -> tuple[Any, ...]:
    parts = run.xp.moveaxis(x, node.attrs["axis"], 0)
    return tuple(parts[number] for number in range(node.attrs["num"]))


op(
    "Pack",
    "values:N*T -> T",
    "N:int T:type axis:int=0",
    shape=_pack_shape,
    kernel=_pack,
    gradient=lambda node, g: apply("Unpack", g, num=node.attrs["N"], axis=node.attrs["axis"]),
)
op(
    "Unpack",
    "value:T -> num*T",
    "num:int T:type axis:int=0",
    shape=_unpack_shape,
    kernel=_unpack,
    gradient=lambda node, *gs: [apply("Pack", _filled(node, gs), axis=node.attrs["axis"])],
)


def _filled(node: Any, gradients: Any) -> list[Any]:
    """Zeros for outputs that nothing depends on."""
    return [apply("ZerosLike", y) if g is None else g for g, y in zip(gradients, node.outputs, strict=True)]


def _concat_shape(node: Any) -> list[Shape]:
    *parts, axis_tensor = node.inputs
    axis = constant_ints(axis_tensor)
    if axis is None or any(part.static_shape is None for part in parts):
        return [None]
    rank = len(parts[0].static_shape)
    place = axis[0] % rank if rank else 0
    shape: Shape = None
    for part in parts:
        sizes = part.static_shape
        shape = merge(shape, (*sizes[:place], None, *sizes[place + 1 :]))
    lengths = [part.static_shape[place] for part in parts]
    assert shape is not None
    return [(*shape[:place], None if None in lengths else sum(lengths), *shape[place + 1 :])]


def _concat_gradient(node: Any, g: Any) -> list[Any]:
    *parts, axis = node.inputs
    sizes = apply("ShapeN", parts)
    offsets = apply("ConcatOffset", axis, sizes)
    return [*(apply("Slice", g, offset, size) for offset, size in zip(offsets, sizes, strict=True)), None]


def _offsets(run: Any, node: Any, axis: Any, *shapes: Any) -> tuple[Any, ...]:
    place, at, found = int(axis) % shapes[0].size, 0, []
    for shape in shapes:
        offset = np.zeros_like(shape)
        offset[place] = at
        at += int(shape[place])
        found.append(offset)
    return tuple(found)


op(
    "ConcatV2",
    "values:N*T axis:Tidx! -> T",
    "N:int T:type Tidx:type=int32",
    shape=_concat_shape,
    kernel=lambda run, node, *xs: run.xp.concatenate(xs[:-1], axis=int(xs[-1])),
    gradient=_concat_gradient,
)
op(
    "ConcatOffset",
    "concat_dim:int32! shape:N*int32! -> N*int32",
    "N:int",
    shape=lambda node: [tensor.static_shape for tensor in node.inputs[1:]],
    kernel=_offsets,
)


def _split_shape(node: Any) -> list[Shape]:
    axis, value = constant_ints(node.inputs[0]), node.inputs[1].static_shape
    count = node.attrs["num_split"]
    if axis is None or value is None:
        return [None] * count
    place = axis[0] % len(value)
    size = value[place]
    if size is not None and size % count:
        raise ValueError(f"Dimension size, {size}, must be evenly divisible by {count}")
    return [(*value[:place], None if size is None else size // count, *value[place + 1 :])] * count


def _split_v_shape(node: Any) -> list[Shape]:
    value, sizes, axis = node.inputs[0].static_shape, constant_ints(node.inputs[1]), constant_ints(node.inputs[2])
    count = node.attrs["num_split"]
    if value is None or axis is None:
        return [None] * count
    place = axis[0] % len(value)
    lengths = [None if sizes is None or size < 0 else size for size in sizes or [-1] * count]
    return [(*value[:place], length, *value[place + 1 :]) for length in lengths]


def _split_v(run: Any, node: Any, x: Any, sizes: Any, axis: Any) -> tuple[Any, ...]:
    lengths = sizes.tolist()
    if -1 in lengths:
        lengths[lengths.index(-1)] = x.shape[int(axis)] - sum(lengths) - 1
    return tuple(run.xp.split(x, np.cumsum(lengths)[:-1].tolist(), axis=int(axis)))


op(
    "Split",
    "split_dim:int32! value:T -> num_split*T",
    "num_split:int T:type",
    shape=_split_shape,
    kernel=lambda run, node, axis, x: tuple(run.xp.split(x, node.attrs["num_split"], axis=int(axis))),
    gradient=lambda node, *gs: [None, apply("ConcatV2", _filled(node, gs), node.inputs[0])],
)
op(
    "SplitV",
    "value:T size_splits:Tlen! split_dim:int32! -> num_split*T",
    "num_split:int T:type Tlen:type=int64",
    shape=_split_v_shape,
    kernel=_split_v,
    gradient=lambda node, *gs: [apply("ConcatV2", _filled(node, gs), node.inputs[2]), None, None],
)
op(
    "Tile",
    "input:T multiples:Tmultiples! -> T",
    "T:type Tmultiples:type=int32",
    shape=lambda node: [_tiled(node)],
    kernel=lambda run, node, x, multiples: run.xp.tile(x, tuple(multiples.tolist())),
    gradient=lambda node, g: [_tile_gradient(node, g), None],
)


def _tiled(node: Any) -> Shape:
    shape, times = node.inputs[0].static_shape, constant_ints(node.inputs[1])
    if shape is None or times is None:
        return None if shape is None else (None,) * len(shape)
    if len(shape) != len(times):
        raise ValueError(f"Shape must be rank {len(times)} but is rank {len(shape)}")
    return tuple(None if size is None else size * n for size, n in zip(shape, times, strict=True))


def _tile_gradient(node: Any, g: Any) -> Any:
    """Reshaped to (times, size) for each axis, summed over the times."""
    x, multiples = node.inputs
    sizes = apply("Shape", x)
    pairs = apply("Reshape", apply("Transpose", apply("Pack", [multiples, sizes]), [1, 0]), [-1])
    split = apply("Reshape", g, pairs)
    axes = apply("Range", 0, apply("Size", pairs), 2)
    return apply("Reshape", apply("Sum", split, axes), sizes)


def _dynamic_stitch(run: Any, node: Any, *values: Any) -> Any:
    count = node.attrs["N"]
    indices, data = values[:count], values[count:]
    size = max((int(index.max()) + 1 for index in indices if index.size), default=0)
    result = np.zeros((size, *data[0].shape[indices[0].ndim :]), data[0].dtype)
    for index, item in zip(indices, data, strict=True):
        result[index] = item
    return result


op(
    "DynamicStitch",
    "indices:N*int32! data:N*T! -> T",
    "N:int T:type",
    shape=unknown,
    kernel=_dynamic_stitch,
)
