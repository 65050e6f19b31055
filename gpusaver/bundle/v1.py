"""Reads V1 checkpoints, TensorFlow's format before 2016 (specification, section 11).

A file is a table (:mod:`gpusaver.bundle.table_writer`) that holds the values as well::

    key ""       SavedTensorSlices.meta: per tensor its name, full shape, dtype and the slices stored in this file
    slice key    SavedTensorSlices.data: the elements of one slice, row-major, as a list in a TensorProto

There is no checksum but those of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from gpusaver.bundle.coding import printable
from gpusaver.bundle.entry import decode_shape, decode_slice, storable_dtype
from gpusaver.bundle.slices import check_tiling, slice_key
from gpusaver.bundle.table_reader import Table
from gpusaver.bundle.version import check_version
from gpusaver.errors import DataLossError, InvalidArgumentError, NotFoundError, UnimplementedError
from gpusaver.protos import saved_tensor_slice_pb2, types_pb2
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

_META_KEY = b""


_Decoder = Callable[[types_pb2.TensorProto, np.dtype[Any]], npt.NDArray[Any]]


def _numbers(field: str, wide: str) -> _Decoder:
    """For types whose values are converted one by one; ``wide`` holds any value that the field can have."""
    return lambda proto, dtype: np.fromiter(getattr(proto, field), dtype=wide).astype(dtype)


def _pairs(field: str, half: str) -> _Decoder:
    return lambda proto, dtype: np.fromiter(getattr(proto, field), dtype=half).view(dtype)


def _bits(proto: types_pb2.TensorProto, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.fromiter(proto.half_val, dtype=np.int64).astype(np.uint16).view(dtype)


def _strings(proto: types_pb2.TensorProto, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    array = np.empty(len(proto.string_val), dtype=dtype)
    array[:] = list(proto.string_val)
    return array


#: How the elements of each type are taken from a TensorProto.  TensorFlow never wrote the other types.
_DECODERS: Mapping[DataType, _Decoder] = {
    DataType.float32: _numbers("float_val", "f4"),
    DataType.float64: _numbers("double_val", "f8"),
    DataType.int8: _numbers("int_val", "i8"),
    DataType.int16: _numbers("int_val", "i8"),
    DataType.int32: _numbers("int_val", "i8"),
    DataType.int64: _numbers("int64_val", "i8"),
    DataType.uint8: _numbers("int_val", "i8"),
    DataType.uint16: _numbers("int_val", "i8"),
    DataType.qint8: _numbers("int_val", "i8"),
    DataType.qint16: _numbers("int_val", "i8"),
    DataType.qint32: _numbers("int_val", "i8"),
    DataType.quint8: _numbers("int_val", "i8"),
    DataType.quint16: _numbers("int_val", "i8"),
    DataType.bool: _numbers("bool_val", "?"),
    DataType.complex64: _pairs("scomplex_val", "f4"),
    DataType.complex128: _pairs("dcomplex_val", "f8"),
    DataType.float16: _bits,
    DataType.bfloat16: _bits,
    DataType.string: _strings,
}


class V1Bundle:
    """A V1 checkpoint from the contents of its files, in shard order: ``[(path, bytes), ...]``.

    Raises DataLossError if a file is damaged, and InvalidArgumentError if it is a table of another kind.  May be used
    from several threads.
    """

    def __init__(self, files: Sequence[tuple[str, bytes]]) -> None:
        self._tables = [(name, Table(data, name)) for name, data in files]
        self._tensors: dict[bytes, tuple[TensorSpec, list[TensorSlice]]] = {}
        for name, table in self._tables:
            self._read_meta(name, table)

    def tensors(self) -> dict[bytes, tuple[TensorSpec, tuple[TensorSlice, ...]]]:
        """Full spec and stored slices (of all files) of every tensor, in the order of their names."""
        return {name: (spec, tuple(slices)) for name, (spec, slices) in sorted(self._tensors.items())}

    def get_array(self, name: bytes) -> npt.NDArray[Any]:
        """The whole tensor, assembled from its slices; strings as an array of ``bytes`` objects.

        Raises NotFoundError for an unknown name, and what :func:`~gpusaver.bundle.slices.check_tiling` raises if the
        slices do not make up the tensor.
        """
        if name not in self._tensors:
            raise NotFoundError(f"Tensor name {printable(name)!r} not found in checkpoint files {self._files()}")
        spec, slices = self._tensors[name]
        check_tiling(name, spec.shape, slices)
        # Values before memory for the whole: a shape can promise anything, values are bounded by the file.
        parts = [(part, self._read_slice(name, spec, part)) for part in slices]
        try:
            array = np.zeros(spec.shape, spec.dtype.numpy_dtype)
        except ValueError as error:
            raise UnimplementedError(f"tensor {printable(name)}: NumPy cannot hold {spec}: {error}") from error
        for part, values in parts:
            array[part.index(spec.shape)] = values
        return array

    def _read_meta(self, name: str, table: Table) -> None:
        message = _parse(table.get(_META_KEY) or b"", name, "its metadata")
        if not message.HasField("meta"):
            raise InvalidArgumentError(f"{name}: a table, but without the metadata of a V1 checkpoint")
        check_version(message.meta.versions, name)
        for tensor in message.meta.tensor:
            key = tensor.name.encode()
            try:
                spec = TensorSpec(storable_dtype(tensor.type), decode_shape(tensor.shape))
                slices = [decode_slice(part, spec.shape) for part in tensor.slice]
            except (DataLossError, UnimplementedError) as error:
                raise type(error)(f"{name}: tensor {tensor.name}: {error}") from error
            known = self._tensors.setdefault(key, (spec, []))
            if known[0] != spec:
                raise DataLossError(f"{name}: tensor {tensor.name} is {spec}, but {known[0]} in another file")
            known[1].extend(slices)

    def _read_slice(self, name: bytes, spec: TensorSpec, part: TensorSlice) -> npt.NDArray[Any]:
        key = slice_key(name, part)
        where = f"slice {part} of tensor {printable(name)}"
        found = ((file, value) for file, table in self._tables if (value := table.get(key)) is not None)
        file, value = next(found, ("", None))
        if value is None:
            raise DataLossError(f"{where} is listed but not stored in {self._files()}")
        decoder = _DECODERS.get(spec.dtype)
        if decoder is None:
            raise UnimplementedError(f"{file}: {where}: V1 checkpoints do not hold {spec.dtype.name}")
        message = _parse(value, file, where)
        shape = part.shape(spec.shape)
        try:
            return decoder(message.data.data, spec.dtype.numpy_dtype).reshape(shape)
        except ValueError as error:
            raise DataLossError(f"{file}: {where}: stored values do not fit shape {list(shape)}: {error}") from error

    def _files(self) -> str:
        return ", ".join(name for name, _ in self._tables)


def _parse(value: bytes, name: str, what: str) -> saved_tensor_slice_pb2.SavedTensorSlices:
    try:
        return saved_tensor_slice_pb2.SavedTensorSlices.FromString(value)
    except DecodeError as error:
        raise DataLossError(f"{name}: {what} cannot be decoded: {error}") from error
