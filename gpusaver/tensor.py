"""What a tensor is, apart from its bytes: element type, shape, and which part of a larger tensor it is."""

from __future__ import annotations

import builtins
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpusaver.errors import InvalidArgumentError

#: The largest element count and byte size that is believed: TensorFlow's own limit (int64).
MAX_ELEMENTS = 2**63 - 1


class DataType(enum.IntEnum):
    """TensorFlow's element types under TensorFlow's Python names; the values are those of the wire format.

    The four quantized integers and the sub-byte types are stored one element per byte or word (specification,
    section 4.2).  ``resource`` and ``variant`` can be listed, never stored or read.
    """

    invalid = 0
    float32 = 1
    float64 = 2
    int32 = 3
    uint8 = 4
    int16 = 5
    int8 = 6
    string = 7
    complex64 = 8
    int64 = 9
    bool = 10
    qint8 = 11
    quint8 = 12
    qint32 = 13
    bfloat16 = 14
    qint16 = 15
    quint16 = 16
    uint16 = 17
    complex128 = 18
    float16 = 19
    resource = 20
    variant = 21
    uint32 = 22
    uint64 = 23
    float8_e5m2 = 24
    float8_e4m3fn = 25
    float8_e4m3fnuz = 26
    float8_e4m3b11fnuz = 27
    float8_e5m2fnuz = 28
    int4 = 29
    uint4 = 30
    int2 = 31
    uint2 = 32
    float4_e2m1fn = 33

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of an array of this type (strings: ``object``, elements are ``bytes``).

        Raises TypeError for types without one (invalid, resource, variant).
        """
        dtype = _NUMPY.get(self)
        if dtype is None:
            raise TypeError(f"{self.name} has no NumPy dtype")
        return dtype

    @property
    def itemsize(self) -> int:
        """Stored bytes per element; 0 for types of variable size."""
        return _ITEMSIZE.get(self, 0)

    @property
    def is_fixed_size(self) -> builtins.bool:  # the member ``bool`` hides the class here
        return self in _ITEMSIZE

    @property
    def enum_name(self) -> str:
        """The name in TensorFlow's protocol buffers, such as ``DT_FLOAT``."""
        return _ENUM_NAMES.get(self, "DT_" + self.name.upper())

    @property
    def sub_byte_bits(self) -> int:
        """Number of meaningful low bits of each stored byte for int4 and its kin, else 0."""
        return _SUB_BYTE_BITS.get(self, 0)

    @property
    def swap_width(self) -> int:
        """Bytes that change places together when byte order changes (complex: each half)."""
        return self.itemsize // 2 if self in (DataType.complex64, DataType.complex128) else self.itemsize

    @classmethod
    def from_numpy(cls, dtype: np.dtype[Any] | type | str) -> DataType:
        """The type of an array with this NumPy dtype, whatever its byte order.

        ``S`` and ``U`` dtypes are strings.  Raises TypeError for dtypes TensorFlow does not have (datetime64,
        structured, longdouble) and for ``object``, whose elements must be looked at.
        """
        dtype = np.dtype(dtype)
        found = _FROM_NUMPY.get(dtype)
        if found is None:
            found = _FROM_NUMPY.get(dtype.newbyteorder("=")) if dtype.kind not in "SU" else DataType.string
        if found is None:
            raise TypeError(f"dtype {dtype} cannot be stored in a checkpoint")
        return found


_NUMPY: dict[DataType, np.dtype[Any]] = {
    DataType[name]: np.dtype(name)
    for name in (
        "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128".split()
    )
}
_FROM_NUMPY: dict[np.dtype[Any], DataType] = {dtype: datatype for datatype, dtype in _NUMPY.items()}
for _name in (
    "bfloat16 float8_e5m2 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz float8_e5m2fnuz "
    "int4 uint4 int2 uint2 float4_e2m1fn"
).split():
    _NUMPY[DataType[_name]] = np.dtype(getattr(ml_dtypes, _name))
    _FROM_NUMPY[_NUMPY[DataType[_name]]] = DataType[_name]
_NUMPY |= {
    DataType.qint8: np.dtype(np.int8),
    DataType.quint8: np.dtype(np.uint8),
    DataType.qint16: np.dtype(np.int16),
    DataType.quint16: np.dtype(np.uint16),
    DataType.qint32: np.dtype(np.int32),
}
_ITEMSIZE: dict[DataType, int] = {datatype: dtype.itemsize for datatype, dtype in _NUMPY.items()}
_NUMPY[DataType.string] = np.dtype(object)
_ENUM_NAMES = {DataType.float32: "DT_FLOAT", DataType.float64: "DT_DOUBLE", DataType.float16: "DT_HALF"}
_SUB_BYTE_BITS = {
    DataType.int4: 4,
    DataType.uint4: 4,
    DataType.int2: 2,
    DataType.uint2: 2,
    DataType.float4_e2m1fn: 4,
}


#: Contiguous memory as bytes, or an array that is that memory (then ``nbytes`` counts and nothing else).
Buffer = memoryview | npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Element type and shape of a tensor.  Shapes are fully known; a scalar's is ``()``."""

    dtype: DataType
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of a fixed-size tensor (0 for strings, whose size depends on the values)."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A rectangular part of a tensor: per dimension ``(start, length)``, or None for the whole dimension.

    An explicit extent that covers a whole dimension and None mean the same part but are different slices in a
    bundle: they give different keys (specification, sections 3 and 6.3).
    """

    extents: tuple[tuple[int, int] | None, ...]

    @classmethod
    def full(cls, rank: int) -> TensorSlice:
        return cls((None,) * rank)

    @classmethod
    def from_slices(cls, slices: Sequence[slice], shape: Sequence[int]) -> TensorSlice:
        """From Python slices of step 1, one per dimension: ``TensorSlice.from_slices(np.s_[0:4, :], (10, 3))``."""
        if len(slices) != len(shape):
            raise InvalidArgumentError(f"slice has {len(slices)} dimensions, the tensor has {len(shape)}")
        extents: list[tuple[int, int] | None] = []
        for part, size in zip(slices, shape, strict=True):
            start, stop, step = part.indices(size)
            if step != 1:
                raise InvalidArgumentError(f"slice {part} has step {step}; only step 1 can be stored")
            extents.append(None if part == slice(None) else (start, max(0, stop - start)))
        return cls(tuple(extents))

    @classmethod
    def parse(cls, text: str) -> TensorSlice:
        """From the text form ``0,4:-`` (section 6.2, without the leading shape)."""
        extents: list[tuple[int, int] | None] = []
        for part in text.split(":") if text else []:
            if part == "-":
                extents.append(None)
                continue
            try:
                start, length = (int(number) for number in part.split(","))
            except ValueError as error:
                raise InvalidArgumentError(
                    f"cannot parse slice {text!r}: expected start,length or '-' per dimension, found {part!r}"
                ) from error
            extents.append((start, length))
        return cls(tuple(extents))

    def __str__(self) -> str:
        return ":".join("-" if e is None else f"{e[0]},{e[1]}" for e in self.extents)

    def resolve(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """``(start, length)`` of every dimension of a tensor of this shape.

        Raises InvalidArgumentError if the ranks differ or an extent runs past its dimension.
        """
        if len(self.extents) != len(shape):
            raise InvalidArgumentError(f"slice {self} has {len(self.extents)} dimensions, the tensor has {len(shape)}")
        resolved = tuple([(0, size) if extent is None else extent for extent, size in zip(self.extents, shape)])  # noqa: B905
        for axis, ((start, length), size) in enumerate(zip(resolved, shape)):  # noqa: B905  # of one length, and often
            if start < 0 or length < 0 or start + length > size:
                raise InvalidArgumentError(
                    f"Extent in dimension {axis} out of bounds: shape = {list(shape)}, slice = {self}"
                )
        return resolved

    def shape(self, full_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of this part of a tensor of ``full_shape``."""
        return tuple(length for _, length in self.resolve(full_shape))

    def is_whole(self, full_shape: Sequence[int]) -> bool:
        return self.shape(full_shape) == tuple(full_shape)

    def index(self, full_shape: Sequence[int]) -> tuple[slice, ...]:
        """For indexing an array of ``full_shape``: ``array[tensor_slice.index(array.shape)]`` is the part."""
        return tuple(slice(start, start + length) for start, length in self.resolve(full_shape))
