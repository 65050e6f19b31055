"""The bytes of one chunk as buffers, for one vectored write or read.

::

    chunk        | plain array      |gap| strided       |gap| plain array      |
    buffers      | the array itself | z | slot          | z | the array itself |     vectored
    buffers      | slot                                                        |     staged
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gpusaver.bundle.crc import combine, crc32c
from gpusaver.bundle.layout import Chunk, Piece
from gpusaver.device import Transfers
from gpusaver.tensor import Buffer

CHUNK_NBYTES = 8 * 1024 * 1024


def transfers(chunk: Chunk, arrays: Sequence[Any]) -> Transfers:
    """Of every piece of the chunk; ``arrays``: in the same order."""
    starts, ends = np.array(chunk.starts), np.array(chunk.ends)
    begin = np.maximum(starts, chunk.offset)
    return Transfers(
        arrays, begin - starts, begin - chunk.offset, np.minimum(ends, chunk.offset + chunk.nbytes) - begin
    )


def vectored_buffers(
    chunk: Chunk, views: Sequence[Buffer | None], slot: memoryview | None, filler: memoryview
) -> list[Buffer]:
    """Buffers that make up the chunk: a piece's view, or its place in the slot where it has none.

    ``filler`` stands for gaps.  Requires: ``slot`` unless every piece has a view.
    """
    if slot is None and not chunk.has_gaps:
        return [view for view in views if view is not None]
    buffers: list[Buffer] = []
    slot_start = slot_end = position = 0
    ends = Piece(-1, 0, chunk.nbytes, 0)  # what is behind the last piece is a gap like others
    for piece, view in zip([*chunk.pieces, ends], [*views, filler[:0]], strict=True):
        offset = piece.offset
        if offset != position or view is not None:
            if slot is not None and slot_end > slot_start:
                buffers.append(slot[slot_start:slot_end])
            while position < offset:
                gap = filler[: offset - position]
                buffers.append(gap)
                position += gap.nbytes
            slot_start = slot_end = offset
        position = offset + piece.nbytes
        if view is not None:
            buffers.append(view)
            slot_start = slot_end = position
        else:
            slot_end = position
    return buffers[:-1]


def zero_gaps(chunk: Chunk, slot: memoryview) -> None:
    """Clears what no piece covers of a reused slot: old bytes must not reach the file."""
    position = chunk.nbytes
    if chunk.has_gaps:
        position = 0
        for start, end in zip(chunk.starts, chunk.ends, strict=True):
            gap = start - chunk.offset - position
            if gap > 0:
                slot[position : position + gap] = bytes(gap)
            position = min(end - chunk.offset, chunk.nbytes)
    if position < slot.nbytes:
        slot[position:] = bytes(slot.nbytes - position)


class Checksums:
    """Checksums of tensors whose pieces arrive in any order from any thread (unmasked).

    A piece that follows one that was there before continues its checksum; only where that is not so are checksums
    combined, which takes ten microseconds each.
    """

    def __init__(self, nbytes: Sequence[int]) -> None:
        self._nbytes = nbytes
        self._whole: dict[int, int] = {}
        #: By tensor: the parts so far, by their ends, as (start, checksum).
        self._parts: dict[int, dict[int, tuple[int, int]]] = {}

    def add(self, piece: Piece, octets: Buffer) -> None:
        """``octets``: the bytes of the piece."""
        tensor, start, _, nbytes = piece
        if nbytes == self._nbytes[tensor]:
            self._whole[tensor] = crc32c(octets)
            return
        parts = self._parts.setdefault(tensor, {})
        begin, crc = parts.pop(start, (start, 0))
        parts[start + nbytes] = begin, crc32c(octets, crc)

    def add_whole(self, tensors: Sequence[int], octets: memoryview, ends: Sequence[int]) -> None:
        """The same for whole tensors side by side, each of which ends there in ``octets``."""
        self.add_known(tensors, _checksums(octets, itertools.chain((0,), ends), ends))

    def add_chunk(self, chunk: Chunk, slot: memoryview) -> None:
        """Every piece of a chunk that lies in ``slot``."""
        whole, begin = chunk.whole, chunk.offset
        for number in chunk.cut:
            piece = chunk.piece(number)
            self.add(piece, slot[piece.offset : piece.offset + piece.nbytes])
        starts, ends = ([place - begin for place in column[whole]] for column in (chunk.starts, chunk.ends))
        self.add_known(chunk.tensors[whole], _checksums(slot, starts, ends))

    def add_known(self, tensors: Sequence[int], checksums: Iterable[int]) -> None:
        """The same for whole tensors whose checksums somebody else has computed."""
        self._whole.update(zip(tensors, checksums, strict=True))

    def finished(self) -> dict[int, int]:
        """By tensor, once every piece of it has been added; tensors without bytes are not in it."""
        for tensor, parts in self._parts.items():
            crc = 0
            for end, (start, part) in sorted(parts.items()):
                crc = combine(crc, part, end - start) if start else part
            self._whole[tensor] = crc
        self._parts.clear()
        return self._whole


def _checksums(octets: memoryview, starts: Iterable[int], ends: Iterable[int]) -> Iterable[int]:
    """Of each ``octets[start:end]``: of small tensors the loop takes as long as the checksums."""
    return map(crc32c, map(octets.__getitem__, map(slice, starts, ends)))
