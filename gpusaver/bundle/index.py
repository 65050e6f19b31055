"""The index of a bundle: which tensors it holds and where their bytes lie (specification, sections 2.8 and 3).

::

    key ""          BundleHeaderProto: number of shards, byte order, version
    slice keys      one entry per stored part of a partitioned tensor
    tensor names    one entry per tensor, in byte order

A slice key is told from a name by the ``slices`` of a full entry that lead to it, never by its first byte.
Keys are bytes here; ``str`` is a matter of the layers above.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from gpusaver.bundle.coding import printable
from gpusaver.bundle.entry import Entries, Entry, decode_entries, decode_entry, encode_entry
from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.table_reader import KEY_EXPANSION, Columns, Table
from gpusaver.bundle.table_writer import TRAILER_NBYTES, TableWriter, block_trailer
from gpusaver.bundle.version import VERSION, check_version
from gpusaver.errors import DataLossError, UnimplementedError
from gpusaver.protos import tensor_bundle_pb2
from gpusaver.tensor import TensorSpec

__all__ = ["BundleIndex", "Entry", "IndexTemplate", "encode_index"]

_HEADER_KEY = b""

#: Decoding an entry among all costs a quarter of looking it up alone; an entry takes 40 bytes or so.
_MIN_BULK_LOOKUPS = 64
_BULK_ENTRY_NBYTES = 160


class BundleIndex:
    """The content of an ``.index`` file; ``name`` says in messages which file it is.

    Entries are decoded and checked when asked for.  Any method raises DataLossError if what it meets is damaged.
    May be used from several threads.
    """

    def __init__(self, data: bytes | bytearray | memoryview, name: str) -> None:
        self.name = name
        self._table = Table(data, name)
        self._slice_keys: set[bytes] | None = None
        #: Of all entries, once they are decoded.
        self._keys: list[bytes] = []
        self._entries: Entries | None = None
        value = self._table.get(_HEADER_KEY)
        if value is None:
            raise DataLossError(f"{name}: a table, but not the index of a checkpoint: it has no header")
        try:
            header = tensor_bundle_pb2.BundleHeaderProto.FromString(value)
        except DecodeError as error:
            raise DataLossError(f"{name}: its header is not a BundleHeaderProto: {error}") from error
        self.num_shards = header.num_shards
        self.big_endian = header.endianness == tensor_bundle_pb2.BundleHeaderProto.BIG
        #: Serialized; bundles can only be merged if these are equal.
        self.version = header.version.SerializeToString(deterministic=True)
        self._check_header(header)

    def _check_header(self, header: tensor_bundle_pb2.BundleHeaderProto) -> None:
        little, big = tensor_bundle_pb2.BundleHeaderProto.LITTLE, tensor_bundle_pb2.BundleHeaderProto.BIG
        if header.num_shards < 1 or header.endianness not in (little, big):
            raise DataLossError(
                f"{self.name}: header with {header.num_shards} shards and byte order {header.endianness}"
            )
        check_version(header.version, self.name)

    def get(self, key: bytes) -> Entry | None:
        """The entry under a tensor name or a slice key, or None."""
        if self._entries is not None:
            row = self._rows.get(key)
            return None if row is None else self._entries[row]
        value = self._table.get(key) if key != _HEADER_KEY else None
        return None if value is None else self._decode(key, value)

    def rows(self, keys: Sequence[bytes]) -> tuple[Entries, Sequence[int | None]] | None:
        """Entries, and the rows of these keys among them; None if to get each alone costs less.

        What has no row may still be there, or be damaged: it is to be asked for alone.
        """
        if self._entries is None:
            if len(keys) < _MIN_BULK_LOOKUPS:
                return None
            try:
                if len(keys) * _BULK_ENTRY_NBYTES < self._table.nbytes:
                    return self._some_rows(keys)
                self._decode_all()
            except (DataLossError, UnimplementedError):
                return None  # what is wrong is said when the entry is asked for
        assert self._entries is not None
        if keys == self._keys:  # nearly always, where all of a checkpoint is restored
            return self._entries, range(len(keys))
        return self._entries, list(map(self._rows.get, keys))

    def _some_rows(self, keys: Sequence[bytes]) -> tuple[Entries, Sequence[int | None]]:
        found, data, starts, ends = self._table.find(filter(None, keys))
        entries = decode_entries(data, starts, ends, self.num_shards)
        if found == keys:  # nearly always
            return entries, range(len(keys))
        rows = dict(zip(found, range(len(found)), strict=True))
        return entries, list(map(rows.get, keys))

    @functools.cached_property
    def _rows(self) -> dict[bytes, int]:
        return dict(zip(self._keys, range(len(self._keys)), strict=True))

    def _decode_all(self) -> None:
        keys: list[bytes] = []
        entries: list[Entries] = []
        for found, data, starts, ends in self._columns():
            keys += found
            entries.append(decode_entries(data, starts, ends, self.num_shards))
        self._keys, self._entries = keys, Entries.joined(entries)

    def _columns(self) -> Iterator[Columns]:
        """Of the table, without the header."""
        for keys, data, starts, ends in self._table.columns():
            first = 1 if keys[:1] == [_HEADER_KEY] else 0
            yield keys[first:], data, starts[first:], ends[first:]

    def items(self) -> Iterator[tuple[bytes, Entry]]:
        """All entries as stored, slice keys included, in key order."""
        for block in self._columns():
            yield from self._items(block, self._entries_of(block))

    def _items(self, block: Columns, entries: Entries | None) -> Iterator[tuple[bytes, Entry]]:
        keys, data, starts, ends = block
        if entries is None:  # one after the other, up to the one that is wrong
            for key, start, end in zip(keys, starts.tolist(), ends.tolist(), strict=True):
                yield key, self._decode(key, data[start:end])
            return
        columns = [column.tolist() for column in entries.ranges]
        for row, (key, *fields) in enumerate(zip(keys, entries.specs, *columns, strict=True)):
            entry = entries.others.get(row) or Entry(*fields)
            if entry.slices:
                self._check_slices(key, len(entry.slices) * len(key))
            yield key, entry

    def _entries_of(self, block: Columns) -> Entries | None:
        """None if one of them is damaged."""
        _, data, starts, ends = block
        try:
            return decode_entries(data, starts, ends, self.num_shards)
        except (DataLossError, UnimplementedError):
            return None

    def slice_keys(self) -> set[bytes]:
        """The keys of all stored parts of partitioned tensors."""
        if self._slice_keys is None:
            keys: set[bytes] = set()
            nbytes = 0
            for name, entry in self.items():
                nbytes += len(entry.slices) * len(name)
                self._check_slices(name, nbytes)
                keys.update(slice_key(name, part) for part in entry.slices)
            self._slice_keys = keys
        return self._slice_keys

    def _check_slices(self, name: bytes, nbytes: int) -> None:
        """Every slice has a key of its own that repeats the name, and the file must hold them."""
        if nbytes > KEY_EXPANSION * self._table.nbytes:
            raise DataLossError(f"{self.name}: {printable(name)} has more slices than the file could name")

    def tensors(self) -> Iterator[tuple[bytes, TensorSpec]]:
        """The tensors a user sees: whole and partitioned ones, in key order; parts have no line of their own."""
        for block in self._columns():
            keys, entries = block[0], self._entries_of(block)
            # Slice keys begin with a zero byte; without such keys, one pass over the index is enough.
            if entries is not None and not entries.others and (not keys or keys[0][0]):
                yield from zip(keys, entries.specs, strict=True)
                continue
            for key, entry in self._items(block, entries):
                if key[0] or key not in self.slice_keys():
                    yield key, entry.spec

    def _decode(self, key: bytes, value: bytes) -> Entry:
        try:
            entry = decode_entry(value, self.num_shards)
            self._check_slices(key, len(entry.slices) * len(key))
            return entry
        except (DataLossError, UnimplementedError) as error:
            raise type(error)(f"{self.name}: index entry of {printable(key)}: {error}") from error


def encode_index(num_shards: int, entries: Iterable[tuple[bytes, Entry]]) -> bytes:
    """The index file with these entries, byte for byte what TensorFlow would write (little-endian, version 1).

    Requires: keys ascend.  Raises InvalidArgumentError for a key that is empty or given twice.
    """
    writer = _writer(num_shards)
    for key, entry in entries:
        writer.add(key, encode_entry(entry))
    return writer.finish()


def _writer(num_shards: int) -> TableWriter:
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=num_shards)
    header.version.producer = VERSION
    writer = TableWriter()
    writer.add(_HEADER_KEY, header.SerializeToString(deterministic=True))
    return writer


class IndexTemplate:
    """The index of a layout that is saved again and again: only the checksums of the tensors change.

    A checksum is the last field of an entry, four bytes at a place that is known, unless it is 0 and left out.
    """

    def __init__(self, num_shards: int, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """As :func:`encode_index`; the checksums given do not matter.  Entries with slices have none."""
        self._num_shards = num_shards
        writer = _writer(num_shards)
        ends, have_crcs = [], []
        for key, entry in entries:
            ends.append(writer.add(key, encode_entry(entry if entry.slices else entry._replace(crc=1))))
            have_crcs.append(not entry.slices)
        self._data = np.frombuffer(writer.finish(), np.uint8)
        self._blocks = writer.data_blocks
        has_crc = np.array(have_crcs, np.bool_)
        self._places = np.array(ends, np.int64)[has_crc] - 4
        self._has_crc = has_crc

    def fill(self, masked: npt.NDArray[np.uint32], make_entries: Callable[[], Iterable[tuple[bytes, Entry]]]) -> bytes:
        """The index with these checksums, masked, one for each entry.

        ``make_entries``: the same once more, where the template does not do; kept, they would take more than it does.
        """
        if not masked[self._has_crc].all():
            pairs = zip(make_entries(), masked.tolist(), strict=True)
            return encode_index(
                self._num_shards,
                [(key, entry if entry.slices else entry._replace(crc=crc)) for (key, entry), crc in pairs],
            )
        data = self._data.copy()
        for number, octets in enumerate(masked[self._has_crc].astype("<u4").view(np.uint8).reshape(-1, 4).T):
            data[self._places + number] = octets
        for offset, nbytes in self._blocks:
            end = offset + nbytes
            data[end : end + TRAILER_NBYTES] = np.frombuffer(block_trailer(data[offset:end].data), np.uint8)
        return data.tobytes()
