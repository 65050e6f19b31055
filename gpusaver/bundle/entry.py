"""One line of a bundle's index: where the bytes of a tensor, or of a part of one, lie (specification, section 3).

A BundleEntryProto is read with the generated messages but written by hand, field after field in the order that
TensorFlow uses, because that is twice as fast and there is one per tensor in every save::

    08 dtype   12 n shape: { 12 n { 08 size } } per dimension   18 shard   20 offset   28 size   35 crc (fixed32)
    3a n slice: { 0a n { 08 start, 10 length } } per dimension, for each part of a partitioned tensor

A field whose value is 0 is left out, except ``shape`` and a slice's ``length``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from gpusaver.bundle.coding import CACHED_SLICES, field, rows_at, texts_at, varint
from gpusaver.errors import DataLossError, InvalidArgumentError, UnimplementedError
from gpusaver.protos import tensor_bundle_pb2, types_pb2
from gpusaver.tensor import MAX_ELEMENTS, DataType, TensorSlice, TensorSpec

#: TensorFlow's own limit.
_MAX_RANK = 254

_STORABLE = {int(dtype): dtype for dtype in DataType if dtype not in (DataType.invalid, DataType.resource)}
_DTYPE_FIELD = {int(dtype): bytes((0x08, dtype)) for dtype in DataType}


#: Stands for an entry that is not decoded by columns; no tensor has -2 bytes.
_NO_HEAD = (TensorSpec(DataType.invalid, ()), -2)

Column = npt.NDArray[np.int64]


class Entry(NamedTuple):
    """What the index says about one key.

    ``crc`` is the checksum in its masked form, as stored.  An entry with ``slices`` describes a partitioned tensor:
    it has the full shape and no bytes; each part has an entry of its own under its slice key.
    """

    spec: TensorSpec
    shard: int
    offset: int
    nbytes: int
    crc: int
    slices: tuple[TensorSlice, ...] = ()


def encode_entry(entry: Entry) -> bytes:
    """The BundleEntryProto, byte for byte as TensorFlow writes it."""
    encoded = _DTYPE_FIELD[entry.spec.dtype] + _shape_field(entry.spec.shape)
    if entry.shard:
        encoded += b"\x18" + varint(entry.shard)
    if entry.offset:
        encoded += b"\x20" + varint(entry.offset)
    if entry.nbytes:
        encoded += b"\x28" + varint(entry.nbytes)
    if entry.crc:
        encoded += b"\x35" + entry.crc.to_bytes(4, "little")
    return encoded + b"".join(map(_slice_field, entry.slices)) if entry.slices else encoded


@functools.lru_cache(maxsize=4096)
def _shape_field(shape: tuple[int, ...]) -> bytes:
    return field(b"\x12", b"".join(field(b"\x12", b"\x08" + varint(size) if size else b"") for size in shape))


@functools.lru_cache(maxsize=CACHED_SLICES)
def _slice_field(part: TensorSlice) -> bytes:
    return field(b"\x3a", b"".join(field(b"\x0a", _extent(extent)) for extent in part.extents))


def _extent(extent: tuple[int, int] | None) -> bytes:
    if extent is None:
        return b""
    start, length = extent
    return (b"\x08" + varint(start) if start else b"") + b"\x10" + varint(length)


def decode_entry(value: bytes, num_shards: int) -> Entry:
    """The entry that a BundleEntryProto describes.

    Raises DataLossError if it contradicts itself: an unknown or unstorable dtype, a shape that is not fully known or
    has more than 2^63 - 1 elements, a size that does not fit the shape, slices outside it, a shard that is not below
    ``num_shards``; UnimplementedError for a dtype of a later TensorFlow.
    """
    head = rest = value
    if len(value) > 4 and value[0] == 0x08 and value[2] == 0x12 and value[1] | value[3] < 128:
        # As every writer orders it: dtype and shape come first, and tensors of one kind share these bytes.
        head_nbytes = 4 + value[3]
        head, rest = value[:head_nbytes], value[head_nbytes:]
    try:
        # The cache must not keep what a hostile file was made of.
        decode_head = _decode_head if len(head) <= _MAX_CACHED_NBYTES else _decode_head.__wrapped__
        spec, expected_nbytes = decode_head(head)
        message = tensor_bundle_pb2.BundleEntryProto.FromString(rest)
    except DecodeError as error:
        raise DataLossError(f"not a BundleEntryProto: {error}") from error
    shard, offset, nbytes = message.shard_id, message.offset, message.size
    if not (0 <= shard < num_shards and offset >= 0 and nbytes >= 0):
        raise DataLossError(f"shard {shard} of {num_shards}, offset {offset}, size {nbytes}")
    slices = tuple([decode_slice(part, spec.shape) for part in message.slices]) if message.slices else ()
    if nbytes != expected_nbytes and not slices:
        # Every string takes at least the byte of its length, every variant that and a checksum.
        if expected_nbytes >= 0:
            raise DataLossError(f"{nbytes} bytes are stored, but {spec} needs {expected_nbytes}")
        if spec.num_elements > nbytes:
            raise DataLossError(f"{nbytes} bytes cannot hold {spec}")
    return Entry(spec, shard, offset, nbytes, message.crc32c, slices)


_MAX_CACHED_NBYTES = 256
_MAX_CACHED_HEADS = 4096

#: The longest dtype and shape that are decoded by columns.
_MAX_HEAD_NBYTES = 32
#: Reading an entry that is none may run over its end by a head, three numbers of eight octets, and a checksum.
_MARGIN = 96


class Ranges(NamedTuple):
    """Where the bytes of tensors lie, one row each, and their checksums in the masked form."""

    shard: Column
    offset: Column
    nbytes: Column
    crc: Column

    def take(self, rows: Sequence[int]) -> Ranges:
        index = np.asarray(rows, np.int64)
        return Ranges(*(column[index] for column in self))


class Entries(Sequence[Entry]):
    """All entries of an index, by columns: an object each costs a second decoding.

    ``others``: the rows that are not as every writer writes a whole tensor of fixed size, and so not in the columns.
    """

    def __init__(self, specs: list[TensorSpec], ranges: Ranges, others: dict[int, Entry]) -> None:
        self.specs = specs
        self.ranges = ranges
        self.others = others

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """The rows of all parts, behind one another."""
        if len(parts) == 1:
            return parts[0]
        others: dict[int, Entry] = {}
        specs: list[TensorSpec] = []
        for part in parts:
            others |= {len(specs) + row: entry for row, entry in part.others.items()}
            specs += part.specs
        columns = zip(*[part.ranges for part in parts], strict=True)
        return cls(specs, Ranges(*map(np.concatenate, columns)), others)

    def __len__(self) -> int:
        return len(self.specs)

    @overload
    def __getitem__(self, row: int) -> Entry: ...

    @overload
    def __getitem__(self, row: slice) -> list[Entry]: ...

    def __getitem__(self, row: int | slice) -> Entry | list[Entry]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        other = self.others.get(row)
        if other is not None:
            return other
        shard, offset, nbytes, crc = self.ranges
        return Entry(self.specs[row], int(shard[row]), int(offset[row]), int(nbytes[row]), int(crc[row]))


def decode_entries(data: bytes, starts: Column, ends: Column, num_shards: int) -> Entries:
    """:func:`decode_entry` of each ``data[start:end]``, by columns: ten times as fast where there are thousands.

    Entries that are not as every writer writes them, or not sound, are left to that function.
    """
    base, end = (int(starts[0]), int(ends[-1])) if len(starts) else (0, 0)  # of a block among others in the file
    first, nbytes = starts - base, ends - starts
    octets = np.frombuffer(data, np.uint8)[base : end + _MARGIN]
    if len(data) < end + _MARGIN:
        octets = np.frombuffer(data[base:end] + bytes(_MARGIN), np.uint8)
    # As every writer orders it: dtype and shape come first, and tensors of one kind share these bytes.
    head_nbytes = 4 + octets[first + 3].astype(np.int64)
    is_usual = (octets[first] == 0x08) & (octets[first + 2] == 0x12) & (octets[first + 1] | octets[first + 3] < 128)
    is_usual &= (head_nbytes <= _MAX_HEAD_NBYTES) & (head_nbytes < nbytes)
    head_nbytes[~is_usual] = 0
    *columns, is_sound = _decode_tails(octets, first + head_nbytes, first + nbytes)
    ranges = Ranges(*columns)
    kinds: Sequence[tuple[TensorSpec, int]] = [_NO_HEAD] * len(first)
    # Each entry alone says what is wrong, and with which.
    with contextlib.suppress(DecodeError, DataLossError, UnimplementedError):
        kinds = _decode_heads(octets, first, head_nbytes)
    expected = np.fromiter(map(operator.itemgetter(1), kinds), np.int64, len(kinds))
    is_sound &= is_usual & (ranges.shard < num_shards) & (ranges.nbytes == expected)
    specs = list(map(operator.itemgetter(0), kinds))
    others = {}
    for row in np.flatnonzero(~is_sound).tolist():
        others[row] = decode_entry(data[int(starts[row]) : int(ends[row])], num_shards)
        specs[row] = others[row].spec
    return Entries(specs, ranges, others)


def _decode_heads(octets: npt.NDArray[np.uint8], first: Column, nbytes: Column) -> list[tuple[TensorSpec, int]]:
    """What the ``nbytes`` octets from ``first`` on say, each; nothing where there are none."""
    heads: list[bytes] = texts_at(octets, first, nbytes).tolist()
    return list(map(_FILLED_HEADS.__getitem__, heads))


class _FilledHeads(dict[bytes, tuple[TensorSpec, int]]):
    """As :func:`_decode_head`, of heads whose zeros at the end were taken for filling; the size fits 64 bits.

    ``lru_cache`` notes when each was last asked for: lists of 100,000 take 0.87 of the time without.
    """

    def __missing__(self, head: bytes) -> tuple[TensorSpec, int]:
        if not head:
            return _NO_HEAD
        filled = head.ljust(4, b"\0")
        spec, nbytes = _decode_head.__wrapped__(filled.ljust(4 + filled[3], b"\0"))
        if len(self) >= _MAX_CACHED_HEADS:
            self.clear()
        found = self[head] = spec, nbytes if nbytes <= MAX_ELEMENTS else -2  # which no entry has
        return found


_FILLED_HEADS = _FilledHeads()


def _decode_tails(
    octets: npt.NDArray[np.uint8], position: Column, ends: Column
) -> tuple[Column, Column, Column, Column, npt.NDArray[np.bool_]]:
    """Shard, offset, size and checksum from each position on; and whether up to the end there is nothing else."""
    is_sound = np.ones(len(position), np.bool_)
    numbers = []
    for tag in (0x18, 0x20, 0x28):
        number = np.zeros(len(position), np.int64)
        is_open = octets[position] == tag
        position = position + is_open
        for shift in range(0, 56, 7):  # longer ones are left to the caller
            if not is_open.any():
                break
            octet = octets[position].astype(np.int64)
            number |= ((octet & 127) << shift) * is_open
            position += is_open
            is_open &= octet > 127
        is_sound &= ~is_open
        numbers.append(number)
    is_sound &= (octets[position] == 0x35) & (position + 5 == ends)
    crc = rows_at(octets, position + 1, 4).view("<u4").ravel().astype(np.int64)
    return numbers[0], numbers[1], numbers[2], crc, is_sound


@functools.lru_cache(maxsize=4096)
def _decode_head(value: bytes) -> tuple[TensorSpec, int]:
    """The spec, and the bytes that it needs or -1 if they depend on the elements."""
    message = tensor_bundle_pb2.BundleEntryProto.FromString(value)
    spec = TensorSpec(storable_dtype(message.dtype), decode_shape(message.shape))
    return spec, spec.nbytes if spec.dtype.is_fixed_size else -1


def storable_dtype(number: int) -> DataType:
    """The type with this number, if values of it can be in a checkpoint.

    Raises UnimplementedError for a number that TensorFlow may have assigned since, DataLossError for any other.
    """
    dtype = _STORABLE.get(number)
    if dtype is None:
        newest = max(_STORABLE)
        if newest < number < 100:
            raise UnimplementedError(f"dtype number {number} is newer than this gpusaver, which knows {newest}")
        raise DataLossError(f"dtype number {number} is never stored in a checkpoint")
    return dtype


def decode_shape(message: types_pb2.TensorShapeProto) -> tuple[int, ...]:
    """The shape; DataLossError unless it is fully known and within TensorFlow's limits."""
    shape = tuple([dim.size for dim in message.dim])
    if len(shape) > _MAX_RANK:
        raise DataLossError(f"{len(shape)} dimensions, expected at most {_MAX_RANK}")
    if message.unknown_rank or min(shape, default=0) < 0:
        raise DataLossError(f"shape {list(shape)} is not fully known")
    if math.prod(shape) > MAX_ELEMENTS:
        raise DataLossError(f"shape {list(shape)} has more than {MAX_ELEMENTS} elements")
    return shape


def decode_slice(message: types_pb2.TensorSliceProto, shape: tuple[int, ...]) -> TensorSlice:
    """The part of a tensor of this shape; DataLossError if it does not lie within."""
    data = message.SerializeToString()
    decode = _decode_slice if len(data) <= _MAX_CACHED_NBYTES else _decode_slice.__wrapped__
    return decode(data, shape)


@functools.lru_cache(maxsize=CACHED_SLICES)
def _decode_slice(data: bytes, shape: tuple[int, ...]) -> TensorSlice:
    """Tensors that are cut alike have the same slices: one for each rank, in each of them."""
    message = types_pb2.TensorSliceProto.FromString(data)
    if len(message.extent) != len(shape):
        raise DataLossError(f"a slice has {len(message.extent)} dimensions, the tensor has {len(shape)}")
    part = TensorSlice(
        tuple([(extent.start, extent.length) if extent.HasField("length") else None for extent in message.extent])
    )
    try:
        part.resolve(shape)
    except InvalidArgumentError as error:
        raise DataLossError(str(error)) from error
    return part
