"""From Python values to tensors, and adding operations by the names of their inputs' types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpusaver.compat.v1.dtypes import as_dtype
from gpusaver.compat.v1.graph import Graph, Operation, Tensor, get_default_graph
from gpusaver.compat.v1.shapes import as_shape, is_known
from gpusaver.compat.v1.table import TABLE, Arg
from gpusaver.tensor import DataType

_INT32 = np.iinfo(np.int32)


def as_array(value: Any, datatype: DataType | None = None) -> np.ndarray[Any, Any]:
    """``value`` as TensorFlow takes it: Python floats as float32, ints as int32 (int64 if they need it), text as bytes.

    Raises TypeError for what is no tensor or does not fit ``datatype``.
    """
    if value is None:
        raise ValueError("None values not supported.")
    array = np.asarray(value)
    if array.dtype.kind in "SUO":
        return _strings(value, array, datatype)
    is_python = not isinstance(value, np.ndarray | np.generic) and not _holds_numpy(value)
    if datatype is None:
        if is_python and array.dtype == np.float64:
            return array.astype(np.float32)
        if is_python and array.dtype == np.int64 and (not array.size or _fits_int32(array)):
            return array.astype(np.int32)
        DataType.from_numpy(array.dtype)
        return array
    wanted = datatype.numpy_dtype
    if array.dtype != wanted:
        _check_kinds(value, array, datatype, is_python)
        with np.errstate(all="ignore"):
            array = array.astype(wanted)
    return array


def _fits_int32(array: np.ndarray[Any, Any]) -> bool:
    return bool(array.min() >= _INT32.min and array.max() <= _INT32.max)


def _holds_numpy(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, np.ndarray | np.generic)


def _strings(value: Any, array: np.ndarray[Any, Any], datatype: DataType | None) -> np.ndarray[Any, Any]:
    items = array.reshape(-1).tolist()
    if not all(isinstance(item, str | bytes) for item in items) or datatype not in (None, DataType.string):
        wanted = "a tensor" if datatype is None else f"a tensor of {datatype.name}"
        raise TypeError(f"{value!r:.80} cannot be converted to {wanted}")
    result = np.empty(array.shape, object)
    result.reshape(-1)[:] = [
        item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item for item in items
    ]
    return result


def _check_kinds(value: Any, array: np.ndarray[Any, Any], datatype: DataType, is_python: bool) -> None:
    wanted = as_dtype(datatype)
    kind = array.dtype.kind
    is_loss = (kind == "f" and not (wanted.is_floating or wanted.is_complex)) or (kind == "b") != wanted.is_bool
    if datatype is DataType.string or (is_loss and array.size) or (kind == "c" and not wanted.is_complex):
        raise TypeError(f"Expected {datatype.name}, but got {value!r:.80} of type '{array.dtype}'.")
    if wanted.is_integer and kind in "iu" and array.size:
        limits = np.iinfo(datatype.numpy_dtype)
        if array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"{value!r:.80} does not fit {datatype.name}")


def constant(value: Any, dtype: Any = None, shape: Any = None, name: str | None = "Const", **_: Any) -> Tensor:
    """A Const; ``shape`` larger than the value: its last element is repeated."""
    array = as_array(value, None if dtype is None else as_dtype(dtype).datatype)
    sizes = as_shape(shape)
    if sizes is not None and is_known(sizes) and array.shape != sizes:
        wanted = tuple(size for size in sizes if size is not None)
        count = int(np.prod(wanted, dtype=np.int64))
        if array.size == 0 or array.size > count:
            raise ValueError(f"{array.size} values cannot fill a constant of shape {list(wanted)}")
        flat = np.concatenate([array.reshape(-1), np.repeat(array.reshape(-1)[-1:], count - array.size)])
        array = flat.reshape(wanted)
    datatype = DataType.string if array.dtype == object else DataType.from_numpy(array.dtype)
    if dtype is not None:
        datatype = as_dtype(dtype).datatype
    return get_default_graph().add("Const", [], {"dtype": datatype, "value": array}, name or "Const").outputs[0]


def convert_to_tensor(
    value: Any, dtype: Any = None, name: str | None = None, preferred_dtype: Any = None, graph: Graph | None = None
) -> Tensor:
    """The tensor itself, what a variable holds, or a constant; lists with tensors in them are stacked.

    Raises TypeError or ValueError for values and types that do not fit.
    """
    datatype = None if dtype is None else as_dtype(dtype).datatype
    if hasattr(value, "as_value_tensor"):
        value = value.as_value_tensor()
    if isinstance(value, Tensor):
        if datatype is not None and value.datatype not in (datatype, DataType.invalid):
            raise ValueError(
                f"Tensor conversion requested dtype {datatype.name} for Tensor with dtype {value.dtype.name}: {value!r}"
            )
        return value
    if isinstance(value, list | tuple) and _holds_tensor(value):
        if datatype is None:
            datatype = next(tensor.datatype for tensor in _tensors_in(value))
        return _pack([convert_to_tensor(item, datatype) for item in value])
    if hasattr(value, "as_list") and hasattr(value, "is_fully_defined"):
        if not value.is_fully_defined():
            raise ValueError(f"Cannot convert a partially known TensorShape {value} to a Tensor.")
        value = np.array(value.as_list(), np.int32)
    if isinstance(value, Operation):
        raise TypeError(f"Can't convert Operation '{value.name}' to Tensor")
    if datatype is None and preferred_dtype is not None:
        try:
            return constant(value, preferred_dtype, name=name)
        except (TypeError, ValueError):
            pass
    return constant(value, datatype, name=name)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor) or hasattr(value, "as_value_tensor")


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return [convert_to_tensor(value)] if _holds_tensor(value) else []


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    return emit("Pack", list(tensors), axis=0)


def apply(type: str, *args: Any, name: str | None = None, **attrs: Any) -> Any:
    """Adds an operation; arguments are converted to the types that its row wants.

    Returns its output, a list of several, or the Operation if it has none.  An argument that stands for several tensors
    is a list.
    """
    op = add_operation(type, *args, name=name, **attrs)
    assert op.row is not None
    if not op.row.outputs:
        return op
    return op.outputs if len(op.row.outputs) > 1 or op.row.outputs[0].is_list else op.outputs[0]


def emit(type: str, *args: Any, name: str | None = None, **attrs: Any) -> Tensor:
    """The same for an op with one output."""
    found: Tensor = apply(type, *args, name=name, **attrs)
    return found


def add_operation(type: str, *args: Any, name: str | None = None, **attrs: Any) -> Operation:
    row = TABLE[type]
    graph = get_default_graph()
    types: dict[str, DataType] = {}
    for key, value in attrs.items():
        if row.attrs.get(key, ("",))[0] == "type" and value is not None:
            types[key] = attrs[key] = as_dtype(value).datatype
    flat: list[list[Tensor]] = []
    for arg, value in zip(row.inputs, args, strict=True):  # tensors say which type the other arguments get
        for item in value if arg.is_list else [value]:
            if arg.type_attr is not None and _holds_tensor(item):
                types.setdefault(arg.type_attr, _tensors_in(item)[0].datatype)
    for arg, value in zip(row.inputs, args, strict=True):
        tensors = [_converted(row.name, arg, item, types) for item in (value if arg.is_list else [value])]
        if arg.number_attr is not None:
            attrs.setdefault(arg.number_attr, len(tensors))
        flat.append(tensors)
    return graph.add(type, [tensor for tensors in flat for tensor in tensors], attrs, name)


def _converted(op: str, arg: Arg, value: Any, types: dict[str, DataType]) -> Tensor:
    if arg.is_ref:
        if hasattr(value, "as_ref_tensor"):
            value = value.as_ref_tensor()
        if not (isinstance(value, Tensor) and value.is_ref):
            raise TypeError(f"Input '{arg.name}' of '{op}' Op requires a reference to a variable, found {value!r:.60}")
        tensor = value
    elif arg.list_attr is not None:
        return convert_to_tensor(value)
    else:
        wanted = arg.dtype if arg.type_attr is None else types.get(arg.type_attr)
        if wanted is None and isinstance(value, list) and not value and arg.type_attr is not None:
            default = TABLE[op].attrs[arg.type_attr][1]  # an empty list of axes or sizes is one of ints
            wanted = default if isinstance(default, DataType) else None
        if wanted is DataType.resource and hasattr(value, "handle"):
            value = value.handle
        try:
            tensor = convert_to_tensor(value, wanted)
        except ValueError as error:
            if isinstance(value, Tensor) or hasattr(value, "as_value_tensor"):
                raise TypeError(f"Input '{arg.name}' of '{op}' Op: {error}") from None
            raise
    if arg.type_attr is not None:
        types.setdefault(arg.type_attr, tensor.datatype)
    return tensor


def constant_value(tensor: Any) -> np.ndarray[Any, Any] | None:
    """The value of a tensor that does not depend on what runs; None if it is not known before."""
    op = tensor.op
    if op.type == "Const":
        value = op.attrs["value"]
        return value if isinstance(value, np.ndarray) else None
    sizes = op.inputs[0].static_shape if op.inputs else None
    if op.type in ("Shape", "Size") and sizes is not None and is_known(sizes):
        dtype = op.attrs["out_type"].numpy_dtype
        return np.array(sizes if op.type == "Shape" else int(np.prod(sizes, dtype=np.int64)), dtype)
    if op.type == "Rank" and sizes is not None:
        return np.array(len(sizes), np.int32)
    if op.type in ("Pack", "Identity", "Cast", "StridedSlice", "ConcatV2", "Range", "Fill"):
        values = [constant_value(given) for given in op.inputs]
        if all(value is not None for value in values) and sum(value.size for value in values if value is not None) < 64:
            return np.asarray(op.row.kernel(HOST_RUN, op, *values))
    return None


class HostRun:
    """What kernels compute with where no session is: shapes and other small constants."""

    xp = np


HOST_RUN = HostRun()


def constant_ints(tensor: Any) -> list[int] | None:
    """The same as a flat list of ints."""
    value = constant_value(tensor)
    return None if value is None else [int(number) for number in value.reshape(-1)]
