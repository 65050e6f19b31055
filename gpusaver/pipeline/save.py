"""Writing the chunks of a layout into the data files."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusaver.bundle.layout import Chunk, Layout
from gpusaver.device import HOST, Event, Runtime, Transfer
from gpusaver.errors import CancelledError
from gpusaver.pipeline.chunk import CHUNK_NBYTES, Checksums, vectored_buffers, zero_gaps
from gpusaver.pipeline.staging import Filled, Staging
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.workers import LazySlot, Slots, work_off
from gpusaver.storage.base import WritableFile
from gpusaver.tensor import Buffer

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
    on_recorded: Callable[[Event], None],
    on_staged: Callable[[], None],
    cancelled: threading.Event,
    timeline: Timeline,
) -> dict[int, int]:
    """Writes every tensor into ``files`` (one a shard) and returns the checksum of each that has bytes.

    ``on_recorded`` is called for each device with the event that ends its last copy; ``on_staged`` once when no source
    will be read any more, unless the save fails before.  Returns when all is written, not synced; raises the first
    error, when all threads have ended and no copy is in flight.
    """

    on_host: list[Chunk] = []
    staged: list[tuple[Runtime, Iterator[Chunk]]] = []
    for owner, first in zip(*(column.tolist() for column in np.unique(layout.owner, return_index=True)), strict=True):
        runtime = sources[first].runtime
        chunks = layout.chunks(CHUNK_NBYTES, owner)
        if runtime is HOST and all(file.alignment == 1 for file in files):
            on_host = list(chunks)
        else:
            staged.append((runtime, chunks))
    checksums = Checksums(layout.nbytes.tolist())

    def seal(chunk: Chunk, slot: memoryview, computed: Sequence[int] | None = None) -> None:
        """Makes a filled slot what is written; ``computed``: the checksums of its pieces, if the device did that."""
        zero_gaps(chunk, slot, _padded(chunk, files[chunk.shard]))
        if computed is not None:
            checksums.add_computed(chunk.pieces, computed)
            return
        with timeline.span("checksum", chunk.nbytes):
            for piece in chunk.pieces:
                checksums.add(piece, slot[piece.offset : piece.offset + piece.nbytes])

    staging = None
    if staged:
        devices = [runtime for runtime, _ in staged if runtime is not HOST]
        ring = slots.ring(devices[0] if devices else HOST)
        staging = Staging(staged, lambda chunk: _transfers(chunk, sources), seal, ring, timeline)
    unread = _Countdown(len(on_host) + (staging.copier_count if staging else 0), on_staged)

    def write(job: Chunk | Filled, slot: LazySlot) -> None:
        if isinstance(job, Filled):
            assert staging is not None
            try:
                if cancelled.is_set():
                    raise CancelledError("the save was cancelled before it was committed")
                if job.event is not None:
                    seal(job.chunk, job.slot.view, job.event.checksums)
                with timeline.span("write", job.chunk.nbytes):
                    _write_slot(job.chunk, job.slot.view, files[job.chunk.shard])
            finally:
                staging.release(job)
        else:
            _write_from_host(job, sources, files[job.shard], slot, checksums, unread.one_less, timeline)

    if staging is None:
        work_off(on_host, write, slots, threads, cancelled, timeline=timeline)
        return checksums.finished()
    staging.start(on_recorded, unread.one_less)
    try:
        jobs: Iterator[Chunk | Filled] = itertools.chain(staging.filled(), on_host)
        work_off(jobs, write, slots, threads, on_error=staging.stop, timeline=timeline)
    finally:
        staging.stop()
        staging.join()
    return checksums.finished()


def checksums_now(layout: Layout, sources: Sequence[Source], slots: Slots) -> dict[int, int]:
    """Of every tensor that has bytes, as it is once the work that the caller has queued is done.  Slow: one thread."""
    checksums = Checksums(layout.nbytes.tolist())
    slot = slots.borrow()
    try:
        for runtime in {source.runtime.name: source.runtime for source in sources}.values():
            runtime.order_after_caller()
        for chunk in layout.chunks(CHUNK_NBYTES):
            event = sources[chunk.pieces[0].tensor].runtime.to_slot(_transfers(chunk, sources), slot)
            if event is not None:
                event.synchronize()
            for piece in chunk.pieces:
                checksums.add(piece, slot[piece.offset : piece.offset + piece.nbytes])
    finally:
        slots.give_back(slot)
    return checksums.finished()


def _padded(chunk: Chunk, file: WritableFile) -> int:
    return -(-chunk.nbytes // file.alignment) * file.alignment


def _write_slot(chunk: Chunk, slot: memoryview, file: WritableFile) -> None:
    file.write_at(chunk.offset, [slot[: _padded(chunk, file)]])


def _write_from_host(
    chunk: Chunk,
    sources: Sequence[Source],
    file: WritableFile,
    slot: LazySlot,
    checksums: Checksums,
    on_read: Callable[[], None],
    timeline: Timeline,
) -> None:
    """Writes from the arrays themselves; what does not lie there as it is stored goes through the worker's slot."""
    views: list[Buffer | None] = [
        HOST.view(sources[tensor].array, start, nbytes) for tensor, start, _, nbytes in chunk.pieces
    ]
    with timeline.span("checksum", chunk.nbytes):
        buffers = _stage_rest(chunk, sources, views, slot, checksums)
    is_copied = all(view is None for view in views)
    if is_copied:
        on_read()
    with timeline.span("write", chunk.nbytes):
        file.write_at(chunk.offset, buffers)
    if not is_copied:
        on_read()


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


def _stage_rest(
    chunk: Chunk, sources: Sequence[Source], views: list[Buffer | None], slot: LazySlot, checksums: Checksums
) -> list[Buffer]:
    """Buffers for a vectored write: pieces from their arrays, where they have no view copied into the slot."""
    staged: memoryview | None = None
    for piece, view in zip(chunk.pieces, views, strict=True):
        if view is None:
            staged = staged if staged is not None else slot.get()
            HOST.to_slot([Transfer(sources[piece.tensor].array, piece.start, piece.offset, piece.nbytes)], staged)
            view = staged[piece.offset : piece.offset + piece.nbytes]
        checksums.add(piece, view)
    return vectored_buffers(chunk, views, staged, _ZEROS)
