"""Reads the table file of a bundle; the picture of its bytes is in :mod:`gpusaver.bundle.table_writer`.

Blocks are looked at when a key in them is asked for, so opening an index of a million names and looking up a few
touches a few blocks.  Nothing in the file is believed: every offset, length and count is compared with what is there
before it is used, so that hostile bytes cost time and memory in proportion to their number and raise DataLossError.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator

import numpy as np

from gpusaver.bundle.coding import printable, read_varint32, read_varint64
from gpusaver.bundle.crc import crc32c, mask, unmask
from gpusaver.bundle.table_runs import Column, find_in_runs, first_keys, read_runs
from gpusaver.bundle.table_writer import FOOTER_NBYTES, MAGIC, PLAIN, SNAPPY, TRAILER_NBYTES
from gpusaver.errors import DataLossError, UnimplementedError

#: Bytes that all keys may take when written out in full, per byte of the file and on top.  Prefix compression could
#: otherwise make a small file describe keys without end.  (TensorFlow writes every 16th key in full: 15 at most.)
KEY_EXPANSION = 16
_KEY_ALLOWANCE = 1 << 20

_MAX_UNCOMPRESSED_BLOCK = 64 << 20

#: A block is decoded whole once its lookups have cost as much: each finds its run, of hundreds, and decodes that one.
_RUNS_PER_LOOKUP = 4
_LOOKUPS_BEFORE_DICT = 64


#: A block with fewer runs is read entry by entry.
_MIN_RUNS = 16

#: Reading the first keys of so many runs costs less than finding one among them.
_RUNS_PER_FIRST = 32
#: Keys that are looked up side by side take two kilobytes each meanwhile.
_MAX_FOUND_AT_ONCE = 2048

#: Keys, and the bytes in which the value of each lies from its start to its end.
Columns = tuple[list[bytes], bytes, Column, Column]
_NONE = np.zeros(0, np.int64)


def check_end(end: bytes, size: int, name: str) -> None:
    """Before a file of ``size`` bytes is read as a whole: raises DataLossError if its last bytes are not a table's."""
    if size < FOOTER_NBYTES:
        raise DataLossError(
            f"{name}: {size} bytes are too short for a table, whose footer alone has {FOOTER_NBYTES} bytes"
        )
    if end[-len(MAGIC) :] != MAGIC:
        raise DataLossError(
            f"{name}: not a table (bad magic number): the last 8 bytes are {end[-8:].hex()}, expected {MAGIC.hex()}; "
            "the file is cut off or of another kind"
        )


class Table:
    """The sorted entries of a table file held in ``data``; ``name`` says in messages which file it is.

    Accepts any block size, any restart intervals, and Snappy blocks.  Every block's checksum is verified when it is
    first read.  Raises DataLossError from any method if the bytes are not a table.  May be used from several threads.
    """

    def __init__(self, data: bytes | bytearray | memoryview, name: str) -> None:
        self._data = bytes(data)
        self._name = name
        self._blocks: dict[int, _Block] = {}
        metaindex, index = self._read_footer()
        self._check_block(*metaindex)
        self._separators: list[bytes] = []
        self._handles: list[tuple[int, int]] = []
        self._read_index_block(*index)

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self._data)

    @property
    def block_count(self) -> int:
        return len(self._handles)

    def get(self, key: bytes) -> bytes | None:
        """The value stored under ``key``, or None."""
        number = bisect.bisect_left(self._separators, key)
        return self._block(number).get(key) if number < len(self._handles) else None

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries in ascending order of their keys."""
        for keys, data, starts, ends in self.columns():
            for key, start, end in zip(keys, starts.tolist(), ends.tolist(), strict=True):
                yield key, data[start:end]

    def columns(self) -> Iterator[Columns]:
        """All entries in ascending order of their keys, a block at a time."""
        last = None
        for number, upper in enumerate(self._separators):
            block = self._block(number)
            yield block.columns(last=last, upper=upper)
            last = upper

    def find(self, keys: Iterable[bytes]) -> Columns:
        """The entries of those of these keys that are there, ascending: :meth:`get` takes ten times as long for each.

        Some are left out where what is read is not as every writer writes it.
        """
        parts = self._by_block(sorted(dict.fromkeys(keys)))  # in their order, which is nearly always the right one
        wanted = [key for _, part in parts for key in part]
        starts, stops = map(np.concatenate, zip((_NONE, _NONE), *[block.runs for block, _ in parts], strict=True))
        firsts = first_keys(self._data, starts, stops) if len(starts) < len(wanted) * _RUNS_PER_FIRST else None
        if firsts is not None:
            runs = (np.searchsorted(firsts, np.array(wanted), "right") - 1).clip(0)
        else:
            before = itertools.accumulate((len(block.runs[0]) for block, _ in parts), initial=0)
            numbers = [n + block.run(key) for n, (block, part) in zip(before, parts, strict=False) for key in part]
            runs = np.array(numbers, np.int64)
        found: list[bytes] = []
        values = [(_NONE, _NONE)]
        allowance = KEY_EXPANSION * len(self._data) + _KEY_ALLOWANCE
        for first in range(0, len(wanted), _MAX_FOUND_AT_ONCE):
            some = slice(first, first + _MAX_FOUND_AT_ONCE)
            at = runs[some]
            rows, begins, ends = find_in_runs(self._data, wanted[some], starts[at], stops[at], allowance)
            found += [wanted[first + row] for row in rows]
            values.append((begins, ends))
        begins, ends = map(np.concatenate, zip(*values, strict=True))
        return found, self._data, begins, ends

    def _by_block(self, keys: list[bytes]) -> list[tuple[_Block, list[bytes]]]:
        """The blocks of ``data``, not those that are compressed, that could have some of these ascending keys."""
        parts = []
        first = 0
        while first < len(keys) and (number := bisect.bisect_left(self._separators, keys[first])) < len(self._handles):
            stop = max(first + 1, bisect.bisect_right(keys, self._separators[number], first))
            block = self._block(number)
            if block.data is self._data:
                parts.append((block, keys[first:stop]))
            first = stop
        return parts

    def _read_footer(self) -> tuple[tuple[int, int], tuple[int, int]]:
        size = len(self._data)
        check_end(self._data[-FOOTER_NBYTES:], size, self._name)
        end = size - len(MAGIC)
        try:
            *metaindex, position = self._read_handle(self._data, size - FOOTER_NBYTES, end)
            *index, position = self._read_handle(self._data, position, end)
        except DataLossError as error:
            raise self._damage(f"footer: {error}") from error
        if any(self._data[position:end]):
            raise self._damage(f"footer: bytes {position} to {end} are not zero")
        return (metaindex[0], metaindex[1]), (index[0], index[1])

    def _read_handle(self, data: bytes, position: int, limit: int) -> tuple[int, int, int]:
        """Offset and size of a block, and where the handle ends."""
        offset, position = read_varint64(data, position, limit)
        size, position = read_varint64(data, position, limit)
        if offset + size + TRAILER_NBYTES + FOOTER_NBYTES > len(self._data):
            raise DataLossError(f"a block of {size} bytes at {offset} reaches beyond the end of the file")
        return offset, size, position

    def _read_index_block(self, offset: int, size: int) -> None:
        end = 0
        for key, value in self._read_block(offset, size).entries():
            try:
                block_offset, block_size, _ = self._read_handle(value, 0, len(value))
            except DataLossError as error:
                raise self._damage(f"index block at {offset}: {error}") from error
            if block_offset < end:  # each is kept once it has been read, and a compressed one is larger than here
                raise self._damage(f"index block at {offset}: the block at {block_offset} begins before {end}")
            end = block_offset + block_size
            self._separators.append(key)
            self._handles.append((block_offset, block_size))

    def _block(self, number: int) -> _Block:
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = self._read_block(*self._handles[number])
        return block

    def _read_block(self, offset: int, size: int) -> _Block:
        kind = self._check_block(offset, size)
        if kind == PLAIN:
            return _Block(self._data, offset, offset + size, self._share(size), f"{self._name}: block at {offset}")
        if kind != SNAPPY:
            raise self._damage(f"block at {offset} has unknown type {kind}")
        content = self._uncompress(offset, size)
        return _Block(content, 0, len(content), self._share(size), f"{self._name}: Snappy block at {offset}")

    def _share(self, size: int) -> int:
        """Of a block of so many bytes in what is allowed on top for the whole file."""
        return _KEY_ALLOWANCE * size // len(self._data)

    def _check_block(self, offset: int, size: int) -> int:
        """Verifies the checksum of a block and its type, and returns the type."""
        end = offset + size + 1
        stored = int.from_bytes(self._data[end : end + 4], "little")
        actual = crc32c(memoryview(self._data)[offset:end])
        if stored != mask(actual):
            raise self._damage(f"block at {offset}: checksum {actual:08x}, expected {unmask(stored):08x}")
        return self._data[end - 1]

    def _uncompress(self, offset: int, size: int) -> bytes:
        try:
            import cramjam
        except ImportError as error:
            raise UnimplementedError(
                f"{self._name}: block at {offset} is Snappy; to read it, pip install 'gpusaver[snappy]'"
            ) from error
        stored = self._data[offset : offset + size]
        nbytes, start = read_varint32(stored, 0, size)
        # Three bytes of Snappy stand for at most 64.
        if nbytes > _MAX_UNCOMPRESSED_BLOCK or nbytes * 3 > (size - start) * 64:
            raise self._damage(f"Snappy block at {offset}: {size} bytes cannot stand for {nbytes}")
        try:
            content = bytes(cramjam.snappy.decompress_raw(stored))
        except cramjam.DecompressionError as error:
            raise self._damage(f"Snappy block at {offset}: {error}") from error
        if len(content) != nbytes:
            raise self._damage(f"Snappy block at {offset}: {len(content)} bytes, expected {nbytes}")
        return content

    def _damage(self, what: str) -> DataLossError:
        return DataLossError(f"{self._name}: {what}")


class _Block:
    """Entries between ``start`` and the restart array that ends at ``stop`` in ``data``."""

    def __init__(self, data: bytes, start: int, stop: int, key_allowance: int, name: str) -> None:
        self.data = data
        self._name = name
        count = int.from_bytes(data[stop - 4 : stop], "little") if stop - start >= 8 else 0
        if not 0 < count <= (stop - start) // 4 - 1:
            raise DataLossError(f"{name}: {stop - start} bytes do not hold {count} restarts")
        end = stop - 4 * (count + 1)
        bounds = np.zeros(count + 1, np.int64)
        bounds[:-1] = np.frombuffer(data, "<u4", count, end)
        bounds[-1] = end - start
        if bounds[0] != 0 or (count > 1 and bounds[-2] >= bounds[-1]):
            raise DataLossError(f"{name}: its restarts lie outside its entries")
        if not (bounds[1:-1] > bounds[:-2]).all():
            raise DataLossError(f"{name}: its restarts do not ascend")
        bounds += start
        #: Where the runs begin and end; the first key of each is stored whole.
        self.runs = bounds[:-1], bounds[1:]
        self._key_allowance = KEY_EXPANSION * (stop - start) + key_allowance
        self._lookups = 0
        self._all: dict[bytes, bytes] | None = None

    def get(self, key: bytes) -> bytes | None:
        self._lookups += 1
        if self._all is None and self._lookups > max(_LOOKUPS_BEFORE_DICT, len(self.runs[0]) // _RUNS_PER_LOOKUP):
            self._all = dict(self.entries())
        if self._all is not None:
            return self._all.get(key)
        found, starts, ends = self._read(self.run(key), until=key)
        return self.data[starts[-1] : ends[-1]] if found and found[-1] == key else None

    def run(self, key: bytes) -> int:
        """The last run that does not begin after the key; the first, if all do."""
        return max(0, bisect.bisect_right(range(len(self._bounds) - 1), key, key=self._first_key) - 1)

    @functools.cached_property
    def _bounds(self) -> list[int]:
        """Run ``i`` goes from ``_bounds[i]`` to ``_bounds[i + 1]``."""
        starts, stops = self.runs
        return [*starts.tolist(), int(stops[-1])]

    def _first_key(self, run: int) -> bytes:
        start, end = self._bounds[run], self._bounds[run + 1]
        shared, unshared, value_nbytes = self.data[start : start + 3].ljust(3, b"\xff")
        is_usual = not shared and (unshared | value_nbytes) < 128 and start + 3 + unshared + value_nbytes <= end
        if is_usual:  # a third of the time
            return self.data[start + 3 : start + 3 + unshared]
        keys, *_ = self._read(run, until=b"")
        return keys[0] if keys else b""

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        keys, starts, ends = self._read()
        for key, start, end in zip(keys, starts, ends, strict=True):
            yield key, self.data[start:end]

    def columns(self, *, last: bytes | None, upper: bytes) -> Columns:
        """All entries.  Checks that all keys are above ``last`` and none is above ``upper``."""
        found = self._read_side_by_side()
        if found is not None:
            keys = found[0]
            if (last is None or keys[0] > last) and keys[-1] <= upper:
                return keys, self.data, *found[1:]
        keys, starts, ends = self._read(last=last, upper=upper)
        return keys, self.data, np.array(starts, np.int64), np.array(ends, np.int64)

    def _read_side_by_side(self) -> tuple[list[bytes], Column, Column] | None:
        """The entries; None for what another may have written, or nobody."""
        if len(self.runs[0]) < _MIN_RUNS:
            return None
        entries = read_runs(self.data, *self.runs, self._key_allowance)
        if entries is None or not entries.is_usual.all():
            return None
        is_there = entries.is_there.T
        keys: list[bytes] = entries.keys.T[is_there].tolist()
        is_whole = np.fromiter(map(len, keys), np.int64, len(keys)) == entries.key_nbytes.T[is_there]
        if not is_whole.all() or not all(map(operator.lt, keys, itertools.islice(keys, 1, None))):
            return None
        return keys, entries.starts.T[is_there], entries.ends.T[is_there]

    def _read(
        self, run: int = 0, *, until: bytes | None = None, last: bytes | None = None, upper: bytes | None = None
    ) -> tuple[list[bytes], list[int], list[int]]:
        """The entries from a run on, up to the first whose key is not below ``until``, one after the other.

        Checks that all keys are above ``last`` and none is above ``upper``.
        """
        keys: list[bytes] = []
        starts: list[int] = []
        ends: list[int] = []
        data, position = self.data, self._bounds[run]
        allowance = self._key_allowance
        for run_end in self._bounds[run + 1 :]:
            key = b""
            while position < run_end:
                at = position
                if position + 3 <= run_end:
                    shared, unshared, value_nbytes = data[position : position + 3]
                    position += 3
                if position == at or shared | unshared | value_nbytes > 127:
                    shared, unshared, value_nbytes, position = self._lengths(at, run_end)
                value_at = position + unshared
                if shared > len(key) or value_at + value_nbytes > run_end:
                    raise DataLossError(f"{self._name}: the entry at {at} reaches beyond its key or its block")
                key = key[:shared] + data[position:value_at]
                if last is not None and key <= last:
                    raise DataLossError(f"{self._name}: key {printable(key)!r} follows {printable(last)!r}")
                allowance -= shared
                if allowance < 0:
                    raise DataLossError(f"{self._name}: its keys are too long to be true")
                last = key
                position = value_at + value_nbytes
                keys.append(key)
                starts.append(value_at)
                ends.append(position)
                if until is not None and key >= until:
                    return keys, starts, ends
        if upper is not None and last is not None and last > upper:
            raise DataLossError(
                f"{self._name}: key {printable(last)!r} is above {printable(upper)!r}, its block's bound"
            )
        return keys, starts, ends

    def _lengths(self, position: int, end: int) -> tuple[int, int, int, int]:
        try:
            shared, position = read_varint32(self.data, position, end)
            unshared, position = read_varint32(self.data, position, end)
            value_nbytes, position = read_varint32(self.data, position, end)
        except DataLossError as error:
            raise DataLossError(f"{self._name}: {error}") from error
        return shared, unshared, value_nbytes, position
