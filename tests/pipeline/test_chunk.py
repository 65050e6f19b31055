"""The bytes of a chunk as buffers, and checksums that arrive in pieces."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.layout import Chunk, Piece
from gpusaver.pipeline.chunk import Checksums, vectored_buffers, zero_gaps

#: (bytes before the piece, bytes of the piece, whether it is written from its own memory)
parts = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30), st.booleans()), min_size=1, max_size=15)


def chunk_of(given_parts: list[tuple[int, int, bool]], behind: int = 0) -> Chunk:
    starts, ends = [], [0]
    for gap, nbytes, _ in given_parts:
        starts.append(ends[-1] + gap)
        ends.append(starts[-1] + nbytes)
    return Chunk(0, 0, 0, ends[-1] + behind, list(range(len(starts))), starts, ends[1:])


@given(parts, st.integers(1, 8), st.integers(0, 20))
def test_buffers_hold_pieces_and_filler(
    given_parts: list[tuple[int, int, bool]], filler_nbytes: int, behind: int
) -> None:
    chunk = chunk_of(given_parts, behind)
    slot = bytearray(b"?" * chunk.nbytes)  # what an earlier chunk left there
    expected = bytearray(b"." * chunk.nbytes)
    views: list[memoryview | None] = []
    for piece, (_, _, is_own) in zip(chunk.pieces, given_parts, strict=True):
        content = bytes([65 + piece.tensor]) * piece.nbytes
        place = slice(piece.offset, piece.offset + piece.nbytes)
        expected[place] = content
        views.append(memoryview(content) if is_own else None)
        if not is_own:
            slot[place] = content
    lent = memoryview(slot) if None in views else None
    buffers = vectored_buffers(chunk, views, lent, memoryview(b"." * filler_nbytes))
    assert b"".join(buffers) == expected
    assert all(buffer.nbytes for buffer in buffers)


@given(parts)
def test_buffers_take_what_is_read(given_parts: list[tuple[int, int, bool]]) -> None:
    chunk = chunk_of(given_parts)
    stored = random.Random(0).randbytes(chunk.nbytes)
    slot = bytearray(chunk.nbytes)
    own = [bytearray(piece.nbytes) if part[2] else None for piece, part in zip(chunk.pieces, given_parts, strict=True)]
    views = [None if memory is None else memoryview(memory) for memory in own]
    position = 0
    for buffer in vectored_buffers(chunk, views, memoryview(slot), memoryview(bytearray(4))):
        buffer[:] = stored[position : position + buffer.nbytes]
        position += buffer.nbytes
    assert position == chunk.nbytes
    for piece, memory in zip(chunk.pieces, own, strict=True):
        place = slice(piece.offset, piece.offset + piece.nbytes)
        assert (slot[place] if memory is None else memory) == stored[place]


@given(parts, st.integers(0, 10))
def test_gaps_are_cleared_and_nothing_else(given_parts: list[tuple[int, int, bool]], padding: int) -> None:
    chunk = chunk_of(given_parts)
    slot = bytearray(b"?" * (chunk.nbytes + padding + 5))
    zero_gaps(chunk, memoryview(slot)[: chunk.nbytes + padding])
    expected = bytearray(chunk.nbytes + padding) + b"?" * 5
    for piece in chunk.pieces:
        expected[piece.offset : piece.offset + piece.nbytes] = b"?" * piece.nbytes
    assert slot == expected


@given(st.binary(min_size=1, max_size=200), st.data())
def test_checksums_of_pieces_in_any_order(content: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(content) - 1), max_size=6)) if len(content) > 1 else set())
    borders = [0, *cuts, len(content)]
    pieces = [Piece(1, start, 0, end - start) for start, end in itertools.pairwise(borders)]
    checksums = Checksums([0, len(content), 3])
    for piece in data.draw(st.permutations(pieces)):
        checksums.add(piece, memoryview(content)[piece.start : piece.start + piece.nbytes])
    assert checksums.finished() == {1: crc32c(content)}
    assert checksums.finished() == {1: crc32c(content)}


def test_a_slot_is_not_needed_if_every_piece_has_its_own_memory() -> None:
    chunk = Chunk(0, 0, 0, 6, [0, 1], [0, 3], [3, 6])
    views: list[memoryview | None] = [memoryview(b"abc"), memoryview(b"def")]
    assert [bytes(b) for b in vectored_buffers(chunk, views, None, memoryview(b"."))] == [b"abc", b"def"]


@pytest.mark.parametrize("gap", [0, 1])
def test_neighbours_in_the_slot_are_one_buffer(gap: int) -> None:
    chunk = Chunk(0, 0, 0, 6 + gap, [0, 1], [0, 3 + gap], [3, 6 + gap])
    slot = memoryview(b"abc?def" if gap else b"abcdef")
    found = [bytes(buffer) for buffer in vectored_buffers(chunk, [None, None], slot, memoryview(b"..."))]
    assert found == ([b"abc", b".", b"def"] if gap else [b"abcdef"])
