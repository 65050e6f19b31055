"""The bytes of one chunk as buffers, for one vectored write or read.

::

    chunk        | plain array      |gap| strided       |gap| plain array      |
    buffers      | the array itself | z | slot          | z | the array itself |     vectored
    buffers      | slot                                                        |     staged
"""

from __future__ import annotations

from collections.abc import Sequence

from gpusaver.bundle.crc import combine, crc32c
from gpusaver.bundle.layout import Chunk, Piece
from gpusaver.tensor import Buffer

CHUNK_NBYTES = 8 * 1024 * 1024


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
    for piece, view in zip(chunk.pieces, views, strict=True):
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
    if slot is not None and slot_end > slot_start:
        buffers.append(slot[slot_start:slot_end])
    return buffers


def zero_gaps(chunk: Chunk, slot: memoryview, nbytes: int) -> None:
    """Clears what no piece covers in the first ``nbytes`` of a reused slot: old bytes must not reach the file."""
    position = 0 if chunk.has_gaps else chunk.nbytes
    for piece in chunk.pieces if chunk.has_gaps else ():
        if piece.offset > position:
            slot[position : piece.offset] = bytes(piece.offset - position)
        position = piece.offset + piece.nbytes
    if position < nbytes:
        slot[position:nbytes] = bytes(nbytes - position)


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

    def add_computed(self, pieces: Sequence[Piece], checksums: Sequence[int]) -> None:
        """The same for pieces whose checksums somebody else has computed."""
        for (tensor, start, _, nbytes), crc in zip(pieces, checksums, strict=True):
            if nbytes == self._nbytes[tensor]:
                self._whole[tensor] = crc
            else:
                self._parts.setdefault(tensor, {})[start + nbytes] = start, crc

    def finished(self) -> dict[int, int]:
        """By tensor, once every piece of it has been added; tensors without bytes are not in it."""
        for tensor, parts in self._parts.items():
            crc = 0
            for end, (start, part) in sorted(parts.items()):
                crc = combine(crc, part, end - start) if start else part
            self._whole[tensor] = crc
        self._parts.clear()
        return self._whole
