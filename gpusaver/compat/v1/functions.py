"""The functions that make tensors, under TensorFlow's names and with its arguments."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpusaver.compat.v1.convert import add_operation, apply, constant, constant_value, convert_to_tensor, emit
from gpusaver.compat.v1.dtypes import as_dtype
from gpusaver.compat.v1.graph import Operation, Tensor, get_default_graph
from gpusaver.compat.v1.shapes import as_shape, is_known

newaxis = None


def _unary(op: str, default: str | None = None) -> Callable[..., Tensor]:
    def function(x: Any, name: str | None = None) -> Tensor:
        return emit(op, x, name=name or default)

    function.__doc__ = f"The op {op}, element by element."
    return function


def binary(op: str, x: Any, y: Any, name: str | None = None) -> Tensor:
    """An op of two tensors of one type; Python values take the type of the other one."""
    return emit(op, x, y, name=name)


def _binary(op: str, default: str | None = None) -> Callable[..., Tensor]:
    def function(x: Any, y: Any, name: str | None = None) -> Tensor:
        return binary(op, x, y, name or default)

    function.__doc__ = f"The op {op}, element by element, with broadcasting."
    return function


abs, negative, sign, square, sqrt, rsqrt, reciprocal = map(
    _unary, ("Abs", "Neg", "Sign", "Square", "Sqrt", "Rsqrt", "Reciprocal")
)
exp, log, log1p, sin, cos, floor, ceil, round, tanh, sigmoid, logical_not, stop_gradient = map(
    _unary,
    "Exp Log Log1p Sin Cos Floor Ceil Round Tanh Sigmoid LogicalNot StopGradient".split(),
)
add = _binary("AddV2", "Add")
subtract, multiply, maximum, minimum, squared_difference, pow = map(
    _binary, ("Sub", "Mul", "Maximum", "Minimum", "SquaredDifference", "Pow")
)
floordiv, floormod, equal, not_equal, less, less_equal, greater, greater_equal, logical_and, logical_or = map(
    _binary,
    "FloorDiv FloorMod Equal NotEqual Less LessEqual Greater GreaterEqual LogicalAnd LogicalOr".split(),
)
mod = floormod


def truediv(x: Any, y: Any, name: str | None = None) -> Tensor:
    """Integers are divided as float64 (8 and 16 bits: float32)."""
    x = (
        convert_to_tensor(x, None if not isinstance(y, Tensor) else y.dtype)
        if not _is_tensor(x)
        else convert_to_tensor(x)
    )
    y = convert_to_tensor(y, x.dtype)
    if x.dtype.is_integer:
        wanted = "float32" if x.dtype.size <= 2 else "float64"
        x, y = cast(x, wanted), cast(y, wanted)
    return binary("RealDiv", x, y, name or "truediv")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "as_value_tensor")


def divide(x: Any, y: Any, name: str | None = None) -> Tensor:
    return truediv(x, y, name)


def div(x: Any, y: Any, name: str | None = None) -> Tensor:
    """As Python 2: integers are divided to integers, rounded down."""
    x = convert_to_tensor(x)
    return floordiv(x, y, name) if x.dtype.is_integer else truediv(x, y, name or "div")


def logical_xor(x: Any, y: Any, name: str = "LogicalXor") -> Tensor:
    return logical_and(logical_or(x, y), logical_not(logical_and(x, y)), name)


def add_n(inputs: Any, name: str | None = None) -> Tensor:
    """The sum of several tensors of one shape.  ValueError for none."""
    if not inputs:
        raise ValueError("inputs must be an iterable of at least one Tensor with the same dtype and shape.")
    if len(inputs) == 1:
        return identity(inputs[0], name)
    return emit("AddN", list(inputs), name=name)


def cast(x: Any, dtype: Any, name: str | None = None) -> Tensor:
    """The tensor itself if it has the type already."""
    x = convert_to_tensor(x)
    wanted = as_dtype(dtype)
    return x if x.dtype == wanted else emit("Cast", x, DstT=wanted, name=name)


def to_float(x: Any, name: str = "ToFloat") -> Tensor:
    return cast(x, "float32", name)


def to_int32(x: Any, name: str = "ToInt32") -> Tensor:
    return cast(x, "int32", name)


def identity(input: Any, name: str | None = None) -> Tensor:
    return emit("Identity", input, name=name)


def clip_by_value(t: Any, clip_value_min: Any, clip_value_max: Any, name: str = "clip_by_value") -> Tensor:
    return maximum(minimum(t, clip_value_max), clip_value_min, name)


def where(condition: Any, x: Any = None, y: Any = None, name: str | None = None) -> Tensor:
    """Elements of ``x`` or ``y``; without both, the places where the condition holds, one a row."""
    if x is None and y is None:
        return emit("Where", condition, name=name)
    if x is None or y is None:
        raise ValueError("x and y must both be non-None or both be None.")
    return emit("Select", condition, x, y, name=name)


def where_v2(condition: Any, x: Any = None, y: Any = None, name: str | None = None) -> Tensor:
    """The same with broadcasting."""
    if x is None and y is None:
        return where(condition, name=name)
    return emit("SelectV2", condition, x, y, name=name)


def matmul(
    a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, name: str | None = None, **_: Any
) -> Tensor:
    """The product of two matrices, or of two batches of them."""
    a = convert_to_tensor(a, None if not _is_tensor(b) else convert_to_tensor(b).dtype)
    b = convert_to_tensor(b, a.dtype)
    if any(tensor.static_shape is not None and len(tensor.static_shape) > 2 for tensor in (a, b)):
        return emit("BatchMatMulV2", a, b, adj_x=transpose_a, adj_y=transpose_b, name=name)
    return emit("MatMul", a, b, transpose_a=transpose_a, transpose_b=transpose_b, name=name)


def _reduction(op: str) -> Callable[..., Tensor]:
    def function(
        input_tensor: Any,
        axis: Any = None,
        keepdims: bool | None = None,
        name: str | None = None,
        reduction_indices: Any = None,
        keep_dims: bool | None = None,
    ) -> Tensor:
        x = convert_to_tensor(input_tensor)
        axes = reduction_indices if axis is None else axis
        if axes is None:
            shape = x.static_shape
            axes = list(range_of(len(shape))) if shape is not None else range(0, rank(x), 1)
            axes = constant(np.array(axes, np.int32)) if isinstance(axes, list) else axes
        keep = builtins.bool(keep_dims if keepdims is None else keepdims)
        return emit(op, x, axes, keep_dims=keep, name=name)

    function.__doc__ = f"The op {op} along ``axis``, an int or a list; None: along all."
    return function


range_of = builtins.range
reduce_sum, reduce_mean, reduce_max, reduce_min, reduce_prod, reduce_all, reduce_any = map(
    _reduction, ("Sum", "Mean", "Max", "Min", "Prod", "All", "Any")
)


def argmax(
    input: Any, axis: Any = None, name: str | None = None, dimension: Any = None, output_type: Any = "int64"
) -> Tensor:
    chosen = 0 if axis is None and dimension is None else (dimension if axis is None else axis)
    return emit("ArgMax", input, chosen, output_type=output_type, name=name)


def argmin(
    input: Any, axis: Any = None, name: str | None = None, dimension: Any = None, output_type: Any = "int64"
) -> Tensor:
    chosen = 0 if axis is None and dimension is None else (dimension if axis is None else axis)
    return emit("ArgMin", input, chosen, output_type=output_type, name=name)


arg_max, arg_min = argmax, argmin


# -- shapes


def shape(input: Any, name: str | None = None, out_type: Any = "int32") -> Tensor:
    """A constant where the shape is known."""
    x = convert_to_tensor(input)
    if is_known(x.static_shape):
        return constant(np.array(x.static_shape, as_dtype(out_type).as_numpy_dtype), name=name or "Shape")
    return emit("Shape", x, out_type=out_type, name=name)


def size(input: Any, name: str | None = None, out_type: Any = "int32") -> Tensor:
    return emit("Size", input, out_type=out_type, name=name)


def rank(input: Any, name: str | None = None) -> Tensor:
    return emit("Rank", input, name=name)


def reshape(tensor: Any, shape: Any, name: str | None = None) -> Tensor:
    return emit("Reshape", tensor, _sizes(shape), name=name)


def _sizes(shape: Any) -> Any:
    """A shape as an argument of an op: also one that is empty, or a TensorShape."""
    if _is_tensor(shape) or (isinstance(shape, list | tuple) and any(_is_tensor(size) for size in shape)):
        return shape
    if isinstance(shape, np.ndarray) and shape.dtype.kind in "iu":
        return shape
    sizes = as_shape(shape)
    return np.array([-1 if size is None else size for size in sizes or ()], np.int32)


def transpose(a: Any, perm: Any = None, name: str = "transpose", **_: Any) -> Tensor:
    x = convert_to_tensor(a)
    if perm is None:
        if x.static_shape is not None:
            perm = list(builtins.range(len(x.static_shape)))[::-1]
        else:
            perm = subtract(subtract(rank(x), 1), range(0, rank(x), 1))
    return emit("Transpose", x, perm, name=name)


def expand_dims(input: Any, axis: Any = None, name: str | None = None, dim: Any = None) -> Tensor:
    return emit("ExpandDims", input, dim if axis is None else axis, name=name)


def squeeze(input: Any, axis: Any = None, name: str | None = None, squeeze_dims: Any = None) -> Tensor:
    axes = squeeze_dims if axis is None else axis
    chosen = [] if axes is None else [axes] if isinstance(axes, int) else list(axes)
    return emit("Squeeze", input, squeeze_dims=chosen, name=name)


def stack(values: Any, axis: int = 0, name: str = "stack") -> Tensor:
    return emit("Pack", list(values), axis=axis, name=name)


def unstack(value: Any, num: int | None = None, axis: int = 0, name: str = "unstack") -> list[Tensor]:
    x = convert_to_tensor(value)
    if num is None:
        num = None if x.static_shape is None else x.static_shape[axis]
        if num is None:
            raise ValueError(f"Cannot infer argument `num` from shape {x.shape}")
    parts: list[Tensor] = apply("Unpack", x, num=num, axis=axis, name=name)
    return parts


def concat(values: Any, axis: Any, name: str = "concat") -> Tensor:
    items = list(values) if isinstance(values, list | tuple) else [values]
    if len(items) == 1:
        return identity(items[0], name)
    return emit("ConcatV2", items, axis, name=name)


def split(
    value: Any, num_or_size_splits: Any, axis: Any = 0, num: int | None = None, name: str = "split"
) -> list[Tensor]:
    """Into equal parts (an int), or parts of the given sizes."""
    if isinstance(num_or_size_splits, int):
        parts: list[Tensor] = apply("Split", axis, value, num_split=num_or_size_splits, name=name)
        return parts
    sizes = convert_to_tensor(num_or_size_splits)
    count = num if num is not None else (sizes.static_shape or (None,))[0]
    parts = apply("SplitV", value, sizes, axis, num_split=count, name=name)
    return parts


def slice(input_: Any, begin: Any, size: Any, name: str | None = None) -> Tensor:
    return emit("Slice", input_, begin, size, name=name)


def getitem(tensor: Any, key: Any) -> Tensor:
    """``tensor[key]``: ints, slices, ``...``, ``tf.newaxis``, and tensors of rank 0 among them."""
    keys = key if isinstance(key, tuple) else (key,)
    begin: list[Any] = []
    end: list[Any] = []
    strides: list[Any] = []
    masks = dict.fromkeys(("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask"), 0)
    for number, part in enumerate(keys):
        bit = 1 << number
        if isinstance(part, builtins.slice):
            masks["begin_mask"] |= bit * (part.start is None)
            masks["end_mask"] |= bit * (part.stop is None)
            bounds = (0 if part.start is None else part.start, 0 if part.stop is None else part.stop)
            step = 1 if part.step is None else part.step
        elif part is Ellipsis or part is newaxis:
            masks["ellipsis_mask" if part is Ellipsis else "new_axis_mask"] |= bit
            bounds, step = (0, 0), 1
        elif isinstance(part, list | np.ndarray) or (_is_tensor(part) and part.get_shape().ndims not in (0, None)):
            raise TypeError(
                f"a tensor can be indexed by ints, slices, ..., and tf.newaxis, found {part!r}: see tf.gather"
            )
        else:
            masks["shrink_axis_mask"] |= bit
            last = part + 1 if _is_tensor(part) or part != -1 else 0
            bounds, step = (part, last), 1
        begin.append(bounds[0])
        end.append(bounds[1])
        strides.append(step)
    with get_default_graph().name_scope("strided_slice") as scope:
        return emit("StridedSlice", tensor, begin, end, strides, name=scope, **masks)


def gather(
    params: Any, indices: Any, validate_indices: Any = None, name: str | None = None, axis: Any = None
) -> Tensor:
    return emit("GatherV2", params, indices, 0 if axis is None else axis, name=name)


def one_hot(
    indices: Any,
    depth: Any,
    on_value: Any = None,
    off_value: Any = None,
    axis: int | None = None,
    dtype: Any = None,
    name: str = "one_hot",
) -> Tensor:
    wanted = dtype or next((value.dtype for value in (on_value, off_value) if _is_tensor(value)), None)
    on = convert_to_tensor(1 if on_value is None else on_value, wanted or (None if on_value is not None else "float32"))
    off = convert_to_tensor(0 if off_value is None else off_value, on.dtype)
    return emit("OneHot", indices, depth, on, off, axis=-1 if axis is None else axis, name=name)


def tile(input: Any, multiples: Any, name: str | None = None) -> Tensor:
    return emit("Tile", input, multiples, name=name)


def pad(
    tensor: Any, paddings: Any, mode: str = "CONSTANT", name: str | None = None, constant_values: Any = 0
) -> Tensor:
    """With zeros.  ValueError for another mode or value."""
    if mode.upper() != "CONSTANT" or not isinstance(constant_values, int | float) or constant_values != 0:
        raise ValueError(f"pad: only zeros are there, found mode {mode!r} and constant_values {constant_values!r}")
    return emit("Pad", tensor, paddings, name=name)


def broadcast_to(input: Any, shape: Any, name: str | None = None) -> Tensor:
    return emit("BroadcastTo", input, _sizes(shape), name=name)


# -- made from nothing


def fill(dims: Any, value: Any, name: str | None = None) -> Tensor:
    return emit("Fill", _sizes(dims), value, name=name)


def _filled(shape: Any, dtype: Any, number: int, name: str) -> Tensor:
    wanted = as_dtype(dtype)
    value: Any = "" if wanted == "string" else builtins.bool(number) if wanted.is_bool else number
    sizes = _sizes(shape)
    if isinstance(sizes, np.ndarray) and -1 not in sizes and np.prod(sizes) < 1000:
        return constant(value, wanted, shape=sizes.tolist(), name=name)
    return fill(sizes, constant(value, wanted), name)


def zeros(shape: Any, dtype: Any = "float32", name: str | None = None) -> Tensor:
    return _filled(shape, dtype, 0, name or "zeros")


def ones(shape: Any, dtype: Any = "float32", name: str | None = None) -> Tensor:
    return _filled(shape, dtype, 1, name or "ones")


def zeros_like(tensor: Any, dtype: Any = None, name: str = "zeros_like", optimize: bool = True) -> Tensor:
    x = convert_to_tensor(tensor)
    if (dtype is not None and as_dtype(dtype) != x.dtype) or is_known(x.static_shape):
        return zeros(shape(x), dtype or x.dtype, name)
    return emit("ZerosLike", x, name=name)


def ones_like(tensor: Any, dtype: Any = None, name: str = "ones_like", optimize: bool = True) -> Tensor:
    x = convert_to_tensor(tensor)
    return ones(shape(x), dtype or x.dtype, name)


def range(start: Any, limit: Any = None, delta: Any = 1, dtype: Any = None, name: str = "range") -> Tensor:
    """Numbers from ``start`` (0 if only one is given) up to ``limit``."""
    first, last = (0, start) if limit is None else (start, limit)
    values = [convert_to_tensor(value, dtype) for value in (first, last, delta)]
    order = ["int32", "int64", "float32", "float64"]
    wanted = as_dtype(dtype) if dtype else as_dtype(max((value.dtype.name for value in values), key=order.index))
    return emit("Range", *(cast(value, wanted) for value in values), name=name)


# -- placeholders, groups, names


def placeholder(dtype: Any, shape: Any = None, name: str | None = None) -> Tensor:
    return emit("Placeholder", dtype=dtype, shape=as_shape(shape), name=name)


def placeholder_with_default(input: Any, shape: Any, name: str | None = None) -> Tensor:
    x = convert_to_tensor(input)
    return emit("PlaceholderWithDefault", x, shape=as_shape(shape), name=name)


def no_op(name: str | None = None) -> Operation:
    return add_operation("NoOp", name=name)


def group(*inputs: Any, name: str | None = None) -> Operation:
    """An operation that runs all of ``inputs``: operations, tensors, lists of them."""
    graph = get_default_graph()
    flat: list[Any] = []

    def gather_all(item: Any) -> None:
        if isinstance(item, list | tuple):
            for part in item:
                gather_all(part)
        elif item is not None:
            if not isinstance(item, Operation) and not _is_tensor(item):
                raise TypeError(f"'inputs' should be zero or more Tensors or Operations, found {item!r:.60}")
            flat.append(item)

    gather_all(list(inputs))
    with graph.control_dependencies(flat):
        return no_op(name or "group_deps")


def tuple_(tensors: Sequence[Any], name: str = "tuple", control_inputs: Any = None) -> list[Any]:
    """The tensors, each available only when all of them are."""
    graph = get_default_graph()
    given = [tensor for tensor in tensors if tensor is not None]
    with graph.name_scope(name):
        gate = group(*given, *(control_inputs or ()))
        with graph.control_dependencies([gate]):
            return [None if tensor is None else identity(tensor) for tensor in tensors]


def control_dependencies(control_inputs: Any) -> Any:
    return get_default_graph().control_dependencies(control_inputs)


def device(device_name_or_function: Any) -> Any:
    return get_default_graph().device(device_name_or_function)


def add_to_collection(name: Any, value: Any) -> None:
    get_default_graph().add_to_collection(name, value)


def add_to_collections(names: Any, value: Any) -> None:
    get_default_graph().add_to_collections(names, value)


def get_collection(key: Any, scope: str | None = None) -> list[Any]:
    return get_default_graph().get_collection(key, scope)


def get_collection_ref(key: Any) -> list[Any]:
    return get_default_graph().get_collection_ref(key)


def set_random_seed(seed: int | None) -> None:
    get_default_graph().seed = seed


def get_static_value(tensor: Any, partial: bool = False) -> Any:
    return constant_value(convert_to_tensor(tensor))


def is_tensor(x: Any) -> bool:
    return _is_tensor(x)
