"""Writing the chunks of a layout into the data files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.layout import Chunk, Layout
from gpusaver.device import Runtime, Transfer
from gpusaver.pipeline.chunk import CHUNK_NBYTES, Checksums, vectored_buffers, zero_gaps
from gpusaver.pipeline.workers import LazySlot, Slots, work_off
from gpusaver.storage.base import WritableFile

_ZEROS = memoryview(bytes(64 * 1024))


class Source(NamedTuple):
    """A tensor to be written: an array, and the runtime that reads it."""

    runtime: Runtime
    array: Any


def write_chunks(
    layout: Layout,
    sources: Sequence[Source],
    files: Sequence[WritableFile],
    slots: Slots,
    threads: int,
    *,
    on_staged: Callable[[], None],
    cancelled: threading.Event,
) -> dict[int, int]:
    """Writes every tensor into ``files`` (one a shard) and returns the checksum of each that has bytes.

    ``on_staged`` is called once when no source will be read any more, unless the save fails before.  Returns when all
    is written, not synced; raises the first error, when all threads have ended.
    """
    chunks = list(layout.chunks(CHUNK_NBYTES))
    checksums = Checksums(layout.nbytes.tolist())
    unread = _Countdown(len(chunks), on_staged)

    def write(chunk: Chunk, slot: LazySlot) -> None:
        file = files[chunk.shard]
        runtime = sources[chunk.pieces[0].tensor].runtime
        views = _views(chunk, sources, runtime) if file.alignment == 1 else None
        if views is None:
            buffers = [_stage(chunk, sources, runtime, slot.get(), file.alignment, checksums)]
            unread.one_less()
            file.write_at(chunk.offset, buffers)
        else:
            file.write_at(chunk.offset, _stage_rest(chunk, sources, views, slot, checksums))
            unread.one_less()

    work_off(chunks, write, slots, threads, cancelled)
    return checksums.finished()


class _Countdown:
    def __init__(self, count: int, at_zero: Callable[[], None]) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._at_zero = at_zero
        if count == 0:
            at_zero()

    def one_less(self) -> None:
        with self._lock:
            self._count -= 1
            is_zero = self._count == 0
        if is_zero:
            self._at_zero()


def _transfers(chunk: Chunk, sources: Sequence[Source]) -> list[Transfer]:
    return [Transfer(sources[tensor].array, start, offset, nbytes) for tensor, start, offset, nbytes in chunk.pieces]


def _stage(
    chunk: Chunk, sources: Sequence[Source], runtime: Runtime, slot: memoryview, alignment: int, checksums: Checksums
) -> memoryview:
    """The whole chunk in the slot, padded to the file's alignment."""
    padded = -(-chunk.nbytes // alignment) * alignment
    event = runtime.to_slot(_transfers(chunk, sources), slot)
    zero_gaps(chunk, slot, padded)
    if event is not None:
        event.synchronize()
    for piece in chunk.pieces:
        checksums.add(piece, crc32c(slot[piece.offset : piece.offset + piece.nbytes]))
    return slot[:padded]


def _views(chunk: Chunk, sources: Sequence[Source], runtime: Runtime) -> list[memoryview | None] | None:
    """The bytes of each piece in its array, None for those that must be copied; None if the host reaches none."""
    views: list[memoryview | None] = []
    for tensor, start, _, nbytes in chunk.pieces:
        views.append(runtime.view(sources[tensor].array, start, nbytes))
    return views if any(view is not None for view in views) else None


def _stage_rest(
    chunk: Chunk, sources: Sequence[Source], views: list[memoryview | None], slot: LazySlot, checksums: Checksums
) -> list[memoryview]:
    """Buffers for a vectored write: pieces from their arrays, where they have no view copied into the slot."""
    staged: memoryview | None = None
    for piece, view in zip(chunk.pieces, views, strict=True):
        if view is None:
            staged = staged if staged is not None else slot.get()
            source = sources[piece.tensor]
            transfer = Transfer(source.array, piece.start, piece.offset, piece.nbytes)
            event = source.runtime.to_slot([transfer], staged)
            if event is not None:
                event.synchronize()
            view = staged[piece.offset : piece.offset + piece.nbytes]
        checksums.add(piece, crc32c(view))
    return vectored_buffers(chunk, views, staged, _ZEROS)
