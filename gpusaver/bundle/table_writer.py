"""Writes the table file of a bundle: LevelDB's immutable sorted table (specification, section 2).

The one picture of its bytes, shared with :mod:`gpusaver.bundle.table_reader`::

    file      data block | trailer | ... | metaindex block | trailer | index block | trailer | footer
    block     entry ...                       in ascending order of keys
              fixed32 offset of a restart ... entries stored with shared = 0, the first one at offset 0
              fixed32 number of restarts
    entry     varint32 shared                 bytes in common with the key before
              varint32 unshared               bytes of the key that follow
              varint32 value length
              key bytes, value bytes
    trailer   u8 type (0 plain, 1 Snappy) | fixed32 masked CRC of the block and the type
    footer    metaindex handle | index handle | zeros up to 40 bytes | 57 fb 80 8b 24 75 47 db
    handle    varint64 offset | varint64 size without trailer

The index block has one entry per data block: a key K, last key of the block <= K < first key of the next one, and
the block's handle.  The metaindex block is empty.  Numbers are little-endian.
"""

from __future__ import annotations

import struct

from gpusaver.bundle.coding import printable, varint
from gpusaver.bundle.crc import crc32c, mask
from gpusaver.errors import InternalError, InvalidArgumentError

MAGIC = bytes.fromhex("57fb808b247547db")
TRAILER_NBYTES = 5
FOOTER_NBYTES = 48
PLAIN, SNAPPY = 0, 1


class TableWriter:
    """Collects entries and returns the file, byte for byte what TensorFlow writes for the default settings.

    Not safe for use by several threads.
    """

    def __init__(
        self, *, block_nbytes: int = 262144, restart_interval: int = 16, index_restart_interval: int = 1
    ) -> None:
        self._block_nbytes = block_nbytes
        self._block = _BlockBuilder(restart_interval)
        self._index = _BlockBuilder(index_restart_interval)
        self._chunks: list[bytes] = []
        #: Offset and size of every data block written so far.
        self.data_blocks: list[tuple[int, int]] = []
        self._nbytes = 0
        self._last_key: bytes | None = None
        self._pending: tuple[bytes, bytes] | None = None

    def add(self, key: bytes, value: bytes) -> int:
        """Appends an entry; returns the offset in the file at which its value ends.

        Requires: keys ascend as unsigned bytes.  Raises InvalidArgumentError for a key given twice.
        """
        last = self._last_key
        if last is not None:
            if key <= last:
                if key == last:
                    raise InvalidArgumentError(f"Adding duplicate key: {printable(key)}")
                raise InternalError(f"key {printable(key)!r} was added after {printable(last)!r}: keys must ascend")
            if len(key) + len(value) >= 2 * self._block_nbytes:
                self._finish_block()
            if self._pending is not None:
                self._add_to_index(_separator(self._pending[0], key))
        self._last_key = key
        block_nbytes = self._block.add(key, value)
        value_end = self._nbytes + self._block.content_nbytes
        if block_nbytes >= self._block_nbytes:
            self._finish_block()
        return value_end

    def finish(self) -> bytes:
        """The whole file.  The writer cannot be used afterwards."""
        self._finish_block()
        metaindex = self._append(_BlockBuilder(1).finish())
        if self._pending is not None:
            self._add_to_index(_successor(self._pending[0]))
        index = self._append(self._index.finish())
        return b"".join([*self._chunks, (metaindex + index).ljust(FOOTER_NBYTES - len(MAGIC), b"\x00"), MAGIC])

    def _finish_block(self) -> None:
        if self._block.is_empty:
            return
        assert self._last_key is not None
        block = self._block.finish()
        self.data_blocks.append((self._nbytes, len(block)))
        self._pending = (self._last_key, self._append(block))

    def _add_to_index(self, separator: bytes) -> None:
        assert self._pending is not None
        self._index.add(separator, self._pending[1])
        self._pending = None

    def _append(self, block: bytes) -> bytes:
        handle = varint(self._nbytes) + varint(len(block))
        self._chunks += block, block_trailer(block)
        self._nbytes += len(block) + TRAILER_NBYTES
        return handle


def block_trailer(block: bytes | memoryview) -> bytes:
    """What follows an uncompressed block."""
    kind = bytes((PLAIN,))
    return kind + mask(crc32c(kind, crc32c(block))).to_bytes(4, "little")


class _BlockBuilder:
    def __init__(self, restart_interval: int) -> None:
        self._interval = restart_interval
        self._clear()

    def _clear(self) -> None:
        self._content = bytearray()
        self._restarts: list[int] = []
        self._since_restart = self._interval
        self._last_key = b""
        self._shared = 0

    @property
    def is_empty(self) -> bool:
        return not self._content

    @property
    def content_nbytes(self) -> int:
        return len(self._content)

    def add(self, key: bytes, value: bytes) -> int:
        """Appends an entry; returns the size of the block so far."""
        content = self._content
        unshared, value_nbytes = len(key), len(value)
        if self._since_restart == self._interval:
            self._restarts.append(len(content))
            self._since_restart = 1
            shared = 0
        else:
            self._since_restart += 1
            # Neighbours mostly share as much as the two before them: cheaper to check than to find out.
            shared, last = self._shared, self._last_key
            if last[:shared] != key[:shared] or last[shared : shared + 1] == key[shared : shared + 1]:
                shared = self._shared = _shared_nbytes(last, key)
            unshared -= shared
        if shared | unshared | value_nbytes < 128:
            content += bytes((shared, unshared, value_nbytes))
        else:
            content += varint(shared) + varint(unshared) + varint(value_nbytes)
        content += key[shared:]
        content += value
        self._last_key = key
        return len(content) + 4 * len(self._restarts) + 4

    def finish(self) -> bytes:
        """The block; the builder is empty afterwards."""
        restarts = self._restarts or [0]
        block = bytes(self._content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
        self._clear()
        return block


def _shared_nbytes(a: bytes, b: bytes) -> int:
    """The length of the common prefix, found as the highest bit in which the two differ."""
    nbytes = min(len(a), len(b))
    difference = int.from_bytes(a[:nbytes], "big") ^ int.from_bytes(b[:nbytes], "big")
    return nbytes - (difference.bit_length() + 7 >> 3)


def _separator(last: bytes, following: bytes) -> bytes:
    """A short key K with last <= K < following, as LevelDB chooses it."""
    at = _shared_nbytes(last, following)
    if at < min(len(last), len(following)) and last[at] < 0xFF and last[at] + 1 < following[at]:
        return last[:at] + bytes((last[at] + 1,))
    return last


def _successor(last: bytes) -> bytes:
    """A short key that is not below ``last``, as LevelDB chooses it."""
    at = len(last) - len(last.lstrip(b"\xff"))
    return last[:at] + bytes((last[at] + 1,)) if at < len(last) else last
