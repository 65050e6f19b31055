"""Element types as TensorFlow names them: ``tf.float32`` and its kin."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np

from gpusaver.tensor import DataType

_FLOATS = frozenset(d for d in DataType if d.name.startswith(("float", "bfloat")))
_COMPLEX = frozenset({DataType.complex64, DataType.complex128})
_QUANTIZED = frozenset(d for d in DataType if d.name.startswith(("qint", "quint")))
_INTEGERS = frozenset(d for d in DataType if d.name.startswith(("int", "uint")))


class DType:
    """One element type.  Equal to its name, its NumPy dtype, and TensorFlow's object of the same number."""

    __slots__ = ("datatype",)

    def __init__(self, datatype: DataType) -> None:
        self.datatype = datatype

    @property
    def name(self) -> str:
        return self.datatype.name

    @property
    def as_datatype_enum(self) -> int:
        return int(self.datatype)

    @property
    def as_numpy_dtype(self) -> Any:
        """The NumPy type, such as ``np.float32``.  TypeError for types without one."""
        return self.datatype.numpy_dtype.type

    @property
    def base_dtype(self) -> DType:
        """The type itself: references to variables have no type of their own here."""
        return self

    @property
    def real_dtype(self) -> DType:
        return {DataType.complex64: float32, DataType.complex128: float64}.get(self.datatype, self)

    @property
    def is_floating(self) -> builtins.bool:
        return self.datatype in _FLOATS

    @property
    def is_integer(self) -> builtins.bool:
        return self.datatype in _INTEGERS

    @property
    def is_bool(self) -> builtins.bool:
        return self.datatype is DataType.bool

    @property
    def is_complex(self) -> builtins.bool:
        return self.datatype in _COMPLEX

    @property
    def is_quantized(self) -> builtins.bool:
        return self.datatype in _QUANTIZED

    @property
    def is_unsigned(self) -> builtins.bool:
        return self.name.startswith("uint")

    @property
    def is_numpy_compatible(self) -> builtins.bool:
        return self.datatype not in (DataType.resource, DataType.variant, DataType.invalid)

    @property
    def size(self) -> int:
        """Bytes of one element; 1 for types without a fixed size, as in TensorFlow."""
        return self.datatype.itemsize or 1

    @property
    def min(self) -> Any:
        return np.iinfo(self.as_numpy_dtype).min if self.is_integer else np.finfo(self.as_numpy_dtype).min

    @property
    def max(self) -> Any:
        return np.iinfo(self.as_numpy_dtype).max if self.is_integer else np.finfo(self.as_numpy_dtype).max

    def is_compatible_with(self, other: Any) -> builtins.bool:
        return self == as_dtype(other)

    def __eq__(self, other: object) -> builtins.bool:
        if isinstance(other, DType):
            return self.datatype is other.datatype
        try:
            return other is not None and self.datatype is as_dtype(other).datatype
        except TypeError:
            return False

    def __hash__(self) -> int:
        return int(self.datatype)

    def __int__(self) -> int:
        return int(self.datatype)

    def __repr__(self) -> str:
        return f"tf.{self.name}"

    def __str__(self) -> str:
        return f"<dtype: {self.name!r}>"


_BY_DATATYPE = {datatype: DType(datatype) for datatype in DataType}
_NUMBERS = frozenset(map(int, DataType))
_PYTHON = {float: DataType.float32, int: DataType.int64, builtins.bool: DataType.bool, str: DataType.string}
_PYTHON |= {bytes: DataType.string, object: DataType.string, complex: DataType.complex128}


def as_dtype(value: Any) -> DType:
    """The DType for a DType, DataType, name, number, NumPy dtype or TensorFlow dtype.

    Numbers above 100 are TensorFlow's references to that type.  Raises TypeError for anything else.
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, DataType):
        return _BY_DATATYPE[value]
    if isinstance(value, int) and not isinstance(value, builtins.bool) and value % 100 in _NUMBERS:
        return _BY_DATATYPE[DataType(value % 100)]
    if isinstance(value, str) and value.removesuffix("_ref") in DataType.__members__:
        return _BY_DATATYPE[DataType[value.removesuffix("_ref")]]
    if isinstance(value, type) and value in _PYTHON:
        return _BY_DATATYPE[_PYTHON[value]]
    number = getattr(value, "as_datatype_enum", None)
    if isinstance(number, int):
        return as_dtype(number)
    try:
        dtype = np.dtype(value)
        return _BY_DATATYPE[DataType.string if dtype.kind == "O" else DataType.from_numpy(dtype)]
    except TypeError:
        raise TypeError(f"Cannot convert {value!r} to a TensorFlow DType.") from None


float16 = half = _BY_DATATYPE[DataType.float16]
float32 = _BY_DATATYPE[DataType.float32]
float64 = double = _BY_DATATYPE[DataType.float64]
bfloat16 = _BY_DATATYPE[DataType.bfloat16]
int8 = _BY_DATATYPE[DataType.int8]
int16 = _BY_DATATYPE[DataType.int16]
int32 = _BY_DATATYPE[DataType.int32]
int64 = _BY_DATATYPE[DataType.int64]
uint8 = _BY_DATATYPE[DataType.uint8]
uint16 = _BY_DATATYPE[DataType.uint16]
uint32 = _BY_DATATYPE[DataType.uint32]
uint64 = _BY_DATATYPE[DataType.uint64]
bool = _BY_DATATYPE[DataType.bool]  # TensorFlow's name
string = _BY_DATATYPE[DataType.string]
complex64 = _BY_DATATYPE[DataType.complex64]
complex128 = _BY_DATATYPE[DataType.complex128]
qint8 = _BY_DATATYPE[DataType.qint8]
quint8 = _BY_DATATYPE[DataType.quint8]
qint16 = _BY_DATATYPE[DataType.qint16]
quint16 = _BY_DATATYPE[DataType.quint16]
qint32 = _BY_DATATYPE[DataType.qint32]
resource = _BY_DATATYPE[DataType.resource]
variant = _BY_DATATYPE[DataType.variant]
