"""TensorProto: an array inside a graph, as raw bytes or as a list of values that may be shorter than the array.

::

    tensor_content                   the whole array, row-major, little-endian
    float_val, int_val, ...          one list per group of types; the last value fills the rest, no value means zeros
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.errors import InvalidArgumentError, UnimplementedError
from gpusaver.protos.types_pb2 import TensorProto, TensorShapeProto
from gpusaver.tensor import MAX_ELEMENTS, DataType

#: What one list of values may be filled up to.  A single value takes no memory, whatever the shape.
FILL_LIMIT_BYTES = 1 << 30

#: Element type -> list of values, and the type of the numbers in it.
_LISTS: dict[DataType, tuple[str, str]] = {
    DataType.float32: ("float_val", "f4"),
    DataType.float64: ("double_val", "f8"),
    **dict.fromkeys(
        (DataType.int32, DataType.int16, DataType.int8, DataType.uint8, DataType.uint16), ("int_val", "i4")
    ),
    **dict.fromkeys((DataType.qint8, DataType.quint8, DataType.qint32), ("int_val", "i4")),
    **dict.fromkeys((DataType.qint16, DataType.quint16, DataType.int4, DataType.uint4), ("int_val", "i4")),
    DataType.string: ("string_val", "O"),
    DataType.complex64: ("scomplex_val", "f4"),
    DataType.int64: ("int64_val", "i8"),
    DataType.bool: ("bool_val", "?"),
    DataType.complex128: ("dcomplex_val", "f8"),
    DataType.float16: ("half_val", "i4"),
    DataType.bfloat16: ("half_val", "i4"),
    DataType.uint32: ("uint32_val", "u4"),
    DataType.uint64: ("uint64_val", "u8"),
}


def shape_proto(shape: Sequence[int] | None) -> TensorShapeProto:
    """None: not even the rank is known; a size of -1: unknown."""
    if shape is None:
        return TensorShapeProto(unknown_rank=True)
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])


def shape_tuple(proto: TensorShapeProto) -> tuple[int, ...] | None:
    """The shape, -1 for an unknown size; None if not even the rank is known."""
    return None if proto.unknown_rank else tuple(dim.size for dim in proto.dim)


def tensor_proto(value: Any, dtype: DataType | None = None) -> TensorProto:
    """``value``: an array, number, string or list.  ``dtype``: needed for types that share a NumPy dtype.

    Raises TypeError for what is no tensor.
    """
    array = np.asarray(value)
    if dtype is None:
        dtype = DataType.string if array.dtype.kind in "OSU" else DataType.from_numpy(array.dtype)
    if dtype is DataType.string:
        strings = [_as_bytes(item) for item in array.reshape(-1).tolist()]
        return TensorProto(dtype=int(dtype), tensor_shape=shape_proto(array.shape), string_val=strings)  # type: ignore[arg-type]
    array = np.ascontiguousarray(array.astype(dtype.numpy_dtype.newbyteorder("<"), copy=False)).reshape(array.shape)
    proto = TensorProto(dtype=int(dtype), tensor_shape=shape_proto(array.shape))  # type: ignore[arg-type]
    if array.size == 1 and dtype in _LISTS:
        _set_value(proto, dtype, array)
    else:
        proto.tensor_content = array.tobytes()
    return proto


def zeros_proto(dtype: DataType, shape: Sequence[int]) -> TensorProto:
    """Zeros (empty strings) of any shape in a few bytes."""
    proto = TensorProto(dtype=int(dtype), tensor_shape=shape_proto(shape))  # type: ignore[arg-type]
    if 0 not in shape and dtype in _LISTS:  # one value, because TensorFlow 1's Python cannot read none
        _set_value(proto, dtype, np.zeros((), dtype.numpy_dtype) if dtype is not DataType.string else None)
    return proto


def _set_value(proto: TensorProto, dtype: DataType, array: Any) -> None:
    name, kind = _LISTS[dtype]
    if dtype is DataType.string:
        proto.string_val.append(b"")
    elif dtype in (DataType.float16, DataType.bfloat16):
        proto.half_val.extend(array.view(np.uint16).reshape(-1).tolist())
    elif dtype in (DataType.complex64, DataType.complex128):
        getattr(proto, name).extend((array.real.item(), array.imag.item()))
    else:
        getattr(proto, name).extend(array.astype(kind).reshape(-1).tolist())


def tensor_array(proto: TensorProto) -> npt.NDArray[Any]:
    """The array, read-only; strings are an object array of bytes.

    Memory is bounded by the size of the message, and where two or more values are to be filled up by
    ``FILL_LIMIT_BYTES``.  Raises InvalidArgumentError for a message that contradicts itself, UnimplementedError for a
    type without values (resource, variant) or of a later TensorFlow.
    """
    try:
        dtype = DataType(proto.dtype)
        numpy_dtype = dtype.numpy_dtype
    except (ValueError, TypeError) as error:
        raise UnimplementedError(f"a constant of type number {proto.dtype}: no values of it can be read") from error
    shape = shape_tuple(proto.tensor_shape)
    if shape is None or min(shape, default=0) < 0 or math.prod(shape) > MAX_ELEMENTS:
        raise InvalidArgumentError(f"a constant of shape {'unknown' if shape is None else list(shape)}")
    if proto.tensor_content and dtype is not DataType.string:
        values = _from_content(proto.tensor_content, dtype, math.prod(shape))
    else:
        values = _from_list(proto, dtype)
    array = _filled(values, shape, dtype, numpy_dtype)
    array.flags.writeable = False
    return array


def _from_content(content: bytes, dtype: DataType, count: int) -> npt.NDArray[Any]:
    if len(content) != count * dtype.itemsize:
        raise InvalidArgumentError(
            f"a constant of {count} x {dtype.name} with {len(content)} bytes, expected {count * dtype.itemsize}"
        )
    stored = np.frombuffer(content, dtype.numpy_dtype.newbyteorder("<"))
    return stored.astype(dtype.numpy_dtype, copy=False)


def _from_list(proto: TensorProto, dtype: DataType) -> npt.NDArray[Any]:
    if dtype is DataType.string:
        values: npt.NDArray[Any] = np.empty(len(proto.string_val), object)
        values[:] = list(proto.string_val)
        return values
    if dtype not in _LISTS:
        return np.frombuffer(proto.float8_val, np.uint8).view(dtype.numpy_dtype)
    name, kind = _LISTS[dtype]
    numbers = np.array(getattr(proto, name), kind)
    if dtype in (DataType.float16, DataType.bfloat16):
        return numbers.astype(np.uint16).view(dtype.numpy_dtype)
    if dtype in (DataType.complex64, DataType.complex128):
        return numbers[: len(numbers) // 2 * 2].view(dtype.numpy_dtype)
    with np.errstate(all="ignore"):
        return numbers.astype(dtype.numpy_dtype)


def _filled(
    values: npt.NDArray[Any], shape: tuple[int, ...], dtype: DataType, numpy_dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    count = math.prod(shape)
    if len(values) > count:
        raise InvalidArgumentError(f"a constant of {count} elements with {len(values)} values")
    if not len(values):
        values = np.zeros(1, numpy_dtype)
        values[:] = b"" if dtype is DataType.string else values
    if 1 < len(values) < count:
        if count * numpy_dtype.itemsize > FILL_LIMIT_BYTES:
            raise InvalidArgumentError(f"a constant of {len(values)} values, to be filled up to {count}: too large")
        values = np.concatenate([values, np.broadcast_to(values[-1:], count - len(values))])
    try:
        return values.reshape(shape) if len(values) == count else np.broadcast_to(values[0], shape)
    except ValueError as error:  # more than NumPy can index
        raise InvalidArgumentError(f"a constant of shape {list(shape)}: {error}") from error


def _as_bytes(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return item.encode("utf-8", "surrogateescape")
    raise TypeError(f"a string tensor cannot hold {item!r:.60} ({type(item).__name__})")
