"""NumPy's .npz, a zip of .npy members, read and written member by member, without pickle."""

from __future__ import annotations

import contextlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from gpusaver.conversion.tensors import (
    BLOCK_NBYTES,
    Octets,
    OnWritten,
    Source,
    SourceTensor,
    in_blocks,
    is_utf8,
    octets,
    refuse,
    replacing,
    write_blocks,
)
from gpusaver.errors import DataLossError, Error, InvalidArgumentError, from_os_error
from gpusaver.tensor import DataType, TensorSpec

#: NumPy's own dtypes: others (bfloat16, float8) come back from a file as bytes without a type.
_DTYPES = frozenset(
    DataType[name]
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64 complex64 complex128".split()
)
_MAX_NAME_NBYTES = 65_000
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@contextlib.contextmanager
def read(path: str) -> Iterator[Source]:
    """Raises DataLossError for a file that is damaged, InvalidArgumentError for arrays that no checkpoint can hold."""
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise from_os_error(error, "open", path) from error
    except (*_DAMAGE, ValueError) as error:
        raise DataLossError(f"{path} is not an .npz file, or damaged: {error}") from error
    with archive:
        tensors, foreign, left_out = [], [], []
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                left_out.append(f"the member {member.filename}")
                continue
            name = member.filename.removesuffix(".npy")
            shape, fortran, dtype = _member_header(archive, member, path)
            try:
                spec = TensorSpec(DataType.from_numpy(dtype), shape)
            except TypeError:
                foreign.append(f"{name} ({dtype})")
                continue
            if spec.dtype is DataType.string:
                foreign.append(f"{name} ({dtype})")
                continue
            tensors.append(SourceTensor(name, spec, _reader(archive, member, path, spec, fortran, dtype)))
        if foreign:
            raise InvalidArgumentError(
                f"{path}: gpusaver takes no arrays of these dtypes from .npz: {', '.join(foreign[:20])}"
            )
        yield Source(tensors, left_out)


def _member_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: str
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    with _damage(path, member), archive.open(member) as file:
        return _header(file)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = read_header(file)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape, fortran, dtype


@contextlib.contextmanager
def _damage(path: str, member: zipfile.ZipInfo) -> Iterator[None]:
    try:
        yield
    except Error:
        raise
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    except (*_DAMAGE, ValueError, RuntimeError) as error:  # RuntimeError: a password is wanted
        raise DataLossError(f"{path}: member {member.filename} cannot be read: {error}") from error


def _reader(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    path: str,
    spec: TensorSpec,
    fortran: bool,
    dtype: np.dtype[Any],
) -> Any:
    def blocks() -> Iterator[Octets]:
        with _damage(path, member), archive.open(member) as file:
            _header(file)
            if fortran and len(spec.shape) > 1:  # its rows are spread over all of it
                flat = np.frombuffer(_exactly(file, spec.nbytes), dtype)
                yield from in_blocks(octets(flat.reshape(spec.shape[::-1]).T))
            else:
                for start in range(0, spec.nbytes, BLOCK_NBYTES):
                    block = _exactly(file, min(BLOCK_NBYTES, spec.nbytes - start))
                    yield octets(np.frombuffer(block, dtype))
            if file.read(1):  # also has the archive compare its checksum
                raise ValueError("it is longer than its array")

    return blocks


def _exactly(file: Any, nbytes: int) -> bytes:
    data: bytes = file.read(nbytes)
    if len(data) != nbytes:
        raise EOFError(f"ends after {len(data)} of {nbytes} bytes")
    return data


def write(path: str, tensors: Sequence[SourceTensor], on_written: OnWritten) -> None:
    """Atomically, uncompressed like ``np.savez``.  InvalidArgumentError naming every tensor whose dtype NumPy lacks."""
    refuse(path, [t for t in tensors if t.spec.dtype not in _DTYPES], ".npz has no such dtype")
    for tensor in tensors:
        if "\0" in tensor.name or not is_utf8(tensor.name) or len(tensor.name.encode()) > _MAX_NAME_NBYTES:
            raise InvalidArgumentError(f"{path}: a member of a zip file cannot have the name {tensor.name!r:.200}")
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for tensor in tensors:
            # A date of its own choosing: equal checkpoints give equal files.
            member = zipfile.ZipInfo(f"{tensor.name}.npy")
            with archive.open(member, "w", force_zip64=True) as stream:
                write_npy(stream, tensor, on_written)


def write_npy(file: Any, tensor: SourceTensor, on_written: OnWritten) -> None:
    """One .npy, streamed.  Requires: a dtype that NumPy has."""
    write_header(file, tensor.spec)
    write_blocks(file, tensor, on_written)


def write_header(file: BinaryIO | io.RawIOBase, spec: TensorSpec) -> None:
    descr = npy.dtype_to_descr(spec.dtype.numpy_dtype.newbyteorder("<"))
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": spec.shape})


def has_dtype(dtype: DataType) -> bool:
    return dtype in _DTYPES
