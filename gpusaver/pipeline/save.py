"""Writing the chunks of a layout into the data files."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.layout import Chunk, Layout
from gpusaver.device import HOST, Event, Runtime, Transfer
from gpusaver.errors import CancelledError
from gpusaver.pipeline.chunk import CHUNK_NBYTES, Checksums, vectored_buffers, zero_gaps
from gpusaver.pipeline.staging import Filled, Staging
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
    on_recorded: Callable[[Event], None],
    on_staged: Callable[[], None],
    cancelled: threading.Event,
) -> dict[int, int]:
    """Writes every tensor into ``files`` (one a shard) and returns the checksum of each that has bytes.

    ``on_recorded`` is called for each device with the event that ends its last copy; ``on_staged`` once when no source
    will be read any more, unless the save fails before.  Returns when all is written, not synced; raises the first
    error, when all threads have ended and no copy is in flight.
    """

    def runtime_of(chunk: Chunk) -> Runtime:
        return sources[chunk.pieces[0].tensor].runtime

    chunks = list(layout.chunks(CHUNK_NBYTES))
    on_host = [chunk for chunk in chunks if runtime_of(chunk) is HOST]
    on_devices = [chunk for chunk in chunks if runtime_of(chunk) is not HOST]
    checksums = Checksums(layout.nbytes.tolist())
    staging = None
    if on_devices:
        ring = slots.ring(runtime_of(on_devices[0]))
        staging = Staging(on_devices, runtime_of, lambda chunk: _transfers(chunk, sources), ring)
    unread = _Countdown(len(on_host) + (staging.copier_count if staging else 0), on_staged)

    def write(job: Chunk | Filled, slot: LazySlot) -> None:
        if isinstance(job, Filled):
            assert staging is not None
            try:
                if cancelled.is_set():
                    raise CancelledError("the save was cancelled before it was committed")
                _write_slot(job.chunk, job.slot.view, files[job.chunk.shard], checksums, job.checksums)
            finally:
                staging.release(job)
        else:
            _write_from_host(job, sources, files[job.shard], slot, checksums, unread.one_less)

    if staging is None:
        work_off(on_host, write, slots, threads, cancelled)
        return checksums.finished()
    staging.start(on_recorded, unread.one_less)
    try:
        jobs: Iterator[Chunk | Filled] = itertools.chain(staging.filled(), on_host)
        work_off(jobs, write, slots, threads, on_error=staging.stop)
    finally:
        staging.stop()
        staging.join()
    return checksums.finished()


def _write_slot(
    chunk: Chunk, slot: memoryview, file: WritableFile, checksums: Checksums, computed: Iterable[int] | None = None
) -> None:
    """Writes a staged chunk, padded to the file's alignment.  ``computed``: the checksums of its pieces, if known."""
    padded = -(-chunk.nbytes // file.alignment) * file.alignment
    zero_gaps(chunk, slot, padded)
    if computed is None:
        computed = (crc32c(slot[piece.offset : piece.offset + piece.nbytes]) for piece in chunk.pieces)
    for piece, crc in zip(chunk.pieces, computed, strict=True):
        checksums.add(piece, crc)
    file.write_at(chunk.offset, [slot[:padded]])


def _write_from_host(
    chunk: Chunk,
    sources: Sequence[Source],
    file: WritableFile,
    slot: LazySlot,
    checksums: Checksums,
    on_read: Callable[[], None],
) -> None:
    """Writes from the arrays themselves where the file takes that, else through the worker's slot."""
    views = _views(chunk, sources) if file.alignment == 1 else None
    if views is None:
        staged = slot.get()
        HOST.to_slot(_transfers(chunk, sources), staged)
        on_read()
        _write_slot(chunk, staged, file, checksums)
    else:
        file.write_at(chunk.offset, _stage_rest(chunk, sources, views, slot, checksums))
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


def _views(chunk: Chunk, sources: Sequence[Source]) -> list[memoryview | None] | None:
    """The bytes of each piece in its array, None for those that must be copied; None if the host reaches none."""
    views: list[memoryview | None] = []
    for tensor, start, _, nbytes in chunk.pieces:
        views.append(HOST.view(sources[tensor].array, start, nbytes))
    return views if any(view is not None for view in views) else None


def _stage_rest(
    chunk: Chunk, sources: Sequence[Source], views: list[memoryview | None], slot: LazySlot, checksums: Checksums
) -> list[memoryview]:
    """Buffers for a vectored write: pieces from their arrays, where they have no view copied into the slot."""
    staged: memoryview | None = None
    for piece, view in zip(chunk.pieces, views, strict=True):
        if view is None:
            staged = staged if staged is not None else slot.get()
            HOST.to_slot([Transfer(sources[piece.tensor].array, piece.start, piece.offset, piece.nbytes)], staged)
            view = staged[piece.offset : piece.offset + piece.nbytes]
        checksums.add(piece, crc32c(view))
    return vectored_buffers(chunk, views, staged, _ZEROS)
