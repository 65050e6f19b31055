"""What a disk is given of host arrays around the page cache, from where they are and by way of a slot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusaver.bundle import layout as bundle_layout
from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.layout import PAGE, PHASE, Chunk, Layout, plan_layout
from gpusaver.device import HOST
from gpusaver.device.host import address, allocate_pages
from gpusaver.pipeline import direct, save
from gpusaver.pipeline.chunk import Checksums
from gpusaver.pipeline.timeline import Timeline
from gpusaver.tensor import Buffer

#: (bytes, how far into a page it lies; None: every other byte of an array)
tensors = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 300), st.integers(0, 5 * PAGE)),
        st.sampled_from([PHASE, PHASE, PHASE, 0, 64, None]),
    ),
    min_size=1,
    max_size=12,
)


def made(given_tensors: list[tuple[int, int | None]]) -> tuple[Layout, list[Any]]:
    """Arrays of octets that lie so in memory, and where each goes in a file."""
    arrays: list[Any] = []
    for number, (nbytes, phase) in enumerate(given_tensors):
        memory = allocate_pages(2 * nbytes + PAGE)
        memory[:] = np.random.default_rng(number).integers(0, 256, memory.size, np.uint8)
        arrays.append(memory[: 2 * nbytes : 2] if phase is None else memory[phase : phase + nbytes])
    none = [0] * len(arrays)
    with mock.patch.object(bundle_layout, "LARGE_NBYTES", PAGE):
        return plan_layout([array.nbytes for array in arrays], none, none, 1), arrays


def image(layout: Layout, arrays: list[Any]) -> bytes:
    """The file, to the end of its last page."""
    octets = bytearray(-(-layout.shard_nbytes[0] // PAGE) * PAGE)
    for offset, array in zip(layout.offset.tolist(), arrays, strict=True):
        octets[offset : offset + array.nbytes] = array.tobytes()
    return bytes(octets)


def some_pages(random: Any) -> Callable[[int, int], tuple[int, int]]:
    """As if any pages were huge ones."""

    def found(begin: int, end: int) -> tuple[int, int]:
        first, last = sorted(random.randrange(begin // PAGE, end // PAGE + 2) * PAGE for _ in range(2))
        return max(begin, first), max(begin, first, min(end, last))

    return found


@given(tensors, st.sampled_from([2 * PAGE, 4 * PAGE, 16 * PAGE]), st.randoms(use_true_random=False))
def test_slot_and_arrays_are_the_chunk(
    given_tensors: list[tuple[int, int | None]], chunk_nbytes: int, random: Any
) -> None:
    layout, arrays = made(given_tensors)
    checksums, written = Checksums(layout.nbytes.tolist()), b""
    with (
        mock.patch.object(direct, "IN_PLACE_NBYTES", PAGE),
        mock.patch.object(direct, "huge_region", some_pages(random)),
    ):
        for chunk in layout.chunks(chunk_nbytes):
            plan = direct.plan_slot(chunk, arrays, PAGE)
            slot = allocate_pages(plan.slot_nbytes)[: plan.slot_nbytes]
            slot[:] = ord("?")  # what an earlier chunk left there
            plan.copy(arrays, slot.data)
            plan.check(slot.data, checksums)
            buffers = plan.buffers(slot.data)
            written += b"".join(map(bytes, buffers))
            assert all(is_taken(buffer) for buffer in buffers)
            assert plan.copied_nbytes + plan.in_place_nbytes == sum(piece.nbytes for piece in chunk.pieces)
            assert plan.in_place_nbytes == sum(buffer.nbytes for buffer in buffers) - plan.slot_nbytes
    assert written == image(layout, arrays)
    assert checksums.finished() == {
        number: crc32c(array.tobytes()) for number, array in enumerate(arrays) if array.nbytes
    }


def is_taken(buffer: Buffer) -> bool:
    """By a disk, around the page cache."""
    return buffer.nbytes > 0 and buffer.nbytes % PAGE == 0 and address(np.frombuffer(buffer, np.uint8)) % PAGE == 0


@given(tensors, st.sampled_from([2 * PAGE, 3 * PAGE, 4 * PAGE, 16 * PAGE]))
def test_halves_are_the_chunk(given_tensors: list[tuple[int, int | None]], chunk_nbytes: int) -> None:
    layout, _ = made(given_tensors)
    for chunk in layout.chunks(chunk_nbytes):
        if chunk.nbytes < 2 * PAGE:
            continue
        first, second = chunk.halves()
        assert (first.offset, second.offset) == (chunk.offset, chunk.offset + first.nbytes)
        assert first.nbytes + second.nbytes == chunk.nbytes
        assert first.nbytes % PAGE == 0
        assert 0 <= first.nbytes - second.nbytes < 2 * PAGE
        found: dict[int, list[tuple[int, int]]] = {}
        for half in (first, second):
            assert half.tensors
            for tensor, start, offset, nbytes in half.pieces:
                assert 0 <= offset < offset + nbytes <= half.nbytes
                found.setdefault(tensor, []).append((start, nbytes))
        for tensor, start, _, nbytes in chunk.pieces:
            assert found[tensor][0][0] == start
            assert sum(part for _, part in found[tensor]) == nbytes


def writer_of(arrays: list[Any]) -> save._Writer:
    files: list[Any] = [SimpleNamespace(alignment=PAGE)]
    return save._Writer(
        save.Sources([HOST] * len(arrays), arrays),
        files,
        Checksums([array.nbytes for array in arrays]),
        save._Countdown(1, lambda: None),
        threading.Event(),
        Timeline(0.0),
    )


def test_a_long_chunk_is_halved_where_a_slot_has_no_room_for_what_is_copied() -> None:
    layout, arrays = made([(4 * PAGE, PHASE)] * 4)

    def planned() -> list[tuple[int, int]]:
        writer = writer_of(arrays)
        return [(chunk.offset // PAGE, chunk.nbytes) for chunk, _ in writer.plan_ahead(layout.chunks(4 * PAGE))]

    with mock.patch.object(save, "CHUNK_NBYTES", 2 * PAGE), mock.patch.object(direct, "IN_PLACE_NBYTES", PAGE):
        with mock.patch.object(direct, "huge_region", lambda begin, end: (begin, end)):
            first = [(page, 2 * PAGE) for page in range(0, 8, 2)]  # the disk waits for them
            assert planned() == [*first, (8, 4 * PAGE), (12, 4 * PAGE), (16, PHASE)]
            with mock.patch.object(save, "_PLANNED_TENSORS", 0):  # as where there are many in one
                assert planned() == [*((page, 2 * PAGE) for page in range(0, 16, 2)), (16, PHASE)]
        with mock.patch.object(direct, "huge_region", lambda begin, end: (begin, begin)):
            assert planned() == [*((page, 2 * PAGE) for page in range(0, 16, 2)), (16, PHASE)]


@pytest.mark.parametrize(("count", "most_ahead"), [(1, 16), (300, 1)])
def test_chunks_are_planned_some_at_a_time(count: int, most_ahead: int) -> None:
    """Each once, in order, and never more ahead than pays: plans take memory, and the disk waits for the first."""
    chunks = [
        Chunk(
            0,
            0,
            8192 * n,
            8192,
            [*range(count)],
            [8192 * n + 20 * m for m in range(count)],
            [8192 * n + 20 * m + 20 for m in range(count)],
        )
        for n in range(40)
    ]
    asked: list[Chunk] = []

    def noted() -> Iterator[Chunk]:
        for one in chunks:
            asked.append(one)
            yield one

    writer = writer_of([np.zeros(5, np.float32)] * count)
    for number, (planned, fill) in enumerate(writer.plan_ahead(noted())):
        assert planned is chunks[number]
        assert fill is not None
        assert len(asked) - number <= min(most_ahead, number + 1)
        slot = memoryview(bytearray(b"x" * 8192))
        assert b"".join(fill(slot).buffers) == bytes(8192)
    assert asked == chunks
