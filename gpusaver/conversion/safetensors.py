"""The format of Hugging Face's safetensors, read and written block by block.

::

    8 bytes       length of the header, little-endian
    header        JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}, padded by spaces
    data          the tensors without gaps, offsets counted from here; little-endian, row-major

The `safetensors` package does not serve: it writes only what is in memory as a whole, maps the file that it reads
(whose pages then count as the process's), and its NumPy side does not read float8.  The tests hold this against it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from gpusaver.conversion.tensors import (
    BLOCK_NBYTES,
    Octets,
    OnWritten,
    Source,
    SourceTensor,
    is_utf8,
    refuse,
    replacing,
    write_blocks,
)
from gpusaver.errors import DataLossError, InvalidArgumentError, from_os_error
from gpusaver.tensor import MAX_ELEMENTS, DataType, TensorSpec

#: What the `safetensors` package takes at most.
_MAX_HEADER_NBYTES = 100_000_000
_METADATA = "__metadata__"

_DTYPES = {
    "BOOL": DataType.bool,
    "U8": DataType.uint8,
    "I8": DataType.int8,
    "F8_E4M3": DataType.float8_e4m3fn,
    "F8_E5M2": DataType.float8_e5m2,
    "F8_E4M3FNUZ": DataType.float8_e4m3fnuz,
    "F8_E5M2FNUZ": DataType.float8_e5m2fnuz,
    "U16": DataType.uint16,
    "I16": DataType.int16,
    "F16": DataType.float16,
    "BF16": DataType.bfloat16,
    "U32": DataType.uint32,
    "I32": DataType.int32,
    "F32": DataType.float32,
    "C64": DataType.complex64,
    "U64": DataType.uint64,
    "I64": DataType.int64,
    "F64": DataType.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@contextlib.contextmanager
def read(path: str) -> Iterator[Source]:
    """Raises DataLossError for a file that is damaged, InvalidArgumentError for dtypes TensorFlow lacks."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise from_os_error(error, "open", path) from error
    with file:
        size = file.seek(0, 2)
        header_nbytes = _header_nbytes(file, size, path)
        header = _header(_read(file, 8, header_nbytes, path), path)
        data = 8 + header_nbytes
        found: list[SourceTensor] = []
        foreign: list[str] = []
        for name, row in header.items():
            if name == _METADATA:
                continue
            dtype, shape, begin, end = _row(name, row, size - data, path)
            if dtype not in _DTYPES:
                foreign.append(f"{name} ({dtype})")
                continue
            spec = TensorSpec(_DTYPES[dtype], shape)
            if spec.nbytes != end - begin:
                raise DataLossError(f"{path}: tensor {name}: {spec} has not the {end - begin} bytes that are stored")
            found.append(SourceTensor(name, spec, functools.partial(_blocks, file, data + begin, data + end, path)))
        if foreign:
            raise InvalidArgumentError(f"{path}: gpusaver has no dtype for these tensors: {', '.join(foreign[:20])}")
        yield Source(found, [f"the metadata {_METADATA}"] if header.get(_METADATA) else [])


def _header_nbytes(file: BinaryIO, size: int, path: str) -> int:
    nbytes = int.from_bytes(_read(file, 0, 8, path), "little") if size >= 8 else 0
    if not 2 <= nbytes <= min(_MAX_HEADER_NBYTES, size - 8):
        raise DataLossError(f"{path} is not a safetensors file, or damaged: it claims a header of {nbytes} bytes")
    return nbytes


def _header(text: bytes, path: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise DataLossError(f"{path}: its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise DataLossError(f"{path}: its header is no JSON object")
    return header


def _row(name: str, row: Any, limit: int, path: str) -> tuple[str, tuple[int, ...], int, int]:
    try:
        shape, (begin, end) = tuple(row["shape"]), row["data_offsets"]
        if not all(type(number) is int and 0 <= number <= MAX_ELEMENTS for number in (*shape, begin, end)):
            raise ValueError("shape and data_offsets: expected whole numbers from 0 on")
        if math.prod(shape) > MAX_ELEMENTS or not begin <= end <= limit:
            raise ValueError(f"shape {list(shape)}, bytes {begin} to {end} of {limit}")
        return str(row["dtype"]), shape, begin, end
    except (ValueError, TypeError, KeyError) as error:
        raise DataLossError(f"{path}: the entry of tensor {name} in its header is wrong: {error}") from error


def _read(file: BinaryIO, offset: int, nbytes: int, path: str) -> bytes:
    return b"".join(block.tobytes() for block in _blocks(file, offset, offset + nbytes, path))


def _blocks(file: BinaryIO, begin: int, end: int, path: str) -> Iterator[Octets]:
    buffer = np.empty(min(BLOCK_NBYTES, end - begin), np.uint8)
    while begin < end:
        file.seek(begin)
        try:
            count = file.readinto(buffer[: end - begin].data)  # type: ignore[attr-defined]
        except OSError as error:
            raise from_os_error(error, "read", path) from error
        if not count:
            raise DataLossError(f"{path} ends at byte {begin}, expected {end}: the file was cut short")
        yield buffer[:count]
        begin += count


def write(path: str, tensors: Sequence[SourceTensor], on_written: OnWritten) -> None:
    """Atomically.  InvalidArgumentError naming every tensor whose dtype the format lacks."""
    refuse(path, [t for t in tensors if t.spec.dtype not in _NAMES], "safetensors has no such dtype")
    for tensor in tensors:
        if tensor.name == _METADATA or not is_utf8(tensor.name):
            raise InvalidArgumentError(f"{path}: safetensors cannot hold a tensor of the name {tensor.name!r}")
    # As the package orders them: wide elements first, so that all lie at multiples of their size.
    tensors = sorted(tensors, key=lambda t: (-t.spec.dtype.itemsize, t.name))
    header, end = {}, 0
    for name, spec, *_ in tensors:
        offsets = [end, end + spec.nbytes]
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_NBYTES:
        raise InvalidArgumentError(f"{path}: the header would have {len(text)} bytes, at most are {_MAX_HEADER_NBYTES}")
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            write_blocks(file, tensor, on_written)
