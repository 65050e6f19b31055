"""Writing the chunks of a layout into the data files."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpusaver.bundle.crc import combine
from gpusaver.bundle.layout import Chunk, Layout
from gpusaver.device import HOST, Checking, Event, Runtime, Transfer, Transfers
from gpusaver.errors import CancelledError
from gpusaver.pipeline.chunk import CHUNK_NBYTES, Checksums, transfers, vectored_buffers, zero_gaps
from gpusaver.pipeline.direct import SlotPlan, plan_slot
from gpusaver.pipeline.staging import Filled, Job, Ready, Staging
from gpusaver.pipeline.timeline import Timeline
from gpusaver.pipeline.workers import LazySlot, Slots, work_off
from gpusaver.storage.base import WritableFile
from gpusaver.tensor import Buffer

_ZEROS = memoryview(bytes(64 * 1024))
#: Where the host copies for writers that wait for the disk.
_LEAST_CHUNKS = 20
_LEAST_CHUNK_NBYTES = 2 * 1024 * 1024
#: So many are planned at once, fewer where one has more tensors: there planning costs little for each, and memory.
_PLANNED_CHUNKS = 16
_PLANNED_TENSORS = 256
#: The first ones, so that each of four writers has a half of one soon.
_HALVED_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class Sources:
    """Tensors to be written, by their numbers: each an array, and the runtime that reads it."""

    runtimes: list[Runtime] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.arrays)

    def add(self, runtime: Runtime, array: Any) -> None:
        self.runtimes.append(runtime)
        self.arrays.append(array)


def write_chunks(
    layout: Layout,
    sources: Sources,
    files: Sequence[WritableFile],
    slots: Slots,
    threads: int,
    *,
    shards: Collection[int] | None = None,
    on_recorded: Callable[[Event], None],
    on_staged: Callable[[], None],
    cancelled: threading.Event,
    timeline: Timeline,
    is_snapshot: bool = False,
) -> dict[int, int]:
    """Writes every tensor into ``files`` (one a shard) and returns the checksum of each that has bytes.

    ``shards``: those of these alone.  ``is_snapshot``: devices compute the checksums of their copies.
    ``on_recorded`` is called for each device with the event that ends its last copy; ``on_staged`` once when no source
    will be read any more, unless the save fails before.  Returns when all is written, not synced; raises the first
    error, when all threads have ended and no copy is in flight.
    """
    on_host: list[Chunk] = []
    staged: list[tuple[Runtime, Iterator[Chunk]]] = []
    for owner, first in zip(*(column.tolist() for column in np.unique(layout.owner, return_index=True)), strict=True):
        runtime = sources.runtimes[first]
        is_copied = runtime is HOST and any(file.alignment > 1 for file in files)
        chunks = layout.chunks(_long_chunk(layout) if is_copied else CHUNK_NBYTES, owner)
        if shards is not None:
            chunks = filter(lambda chunk: chunk.shard in shards, chunks)
        if runtime is HOST and not is_copied:
            on_host = _side_by_side(chunks)
        else:
            staged.append((runtime, chunks))
    unread = _Countdown(len(on_host) + len(staged), on_staged)
    writer = _Writer(sources, files, Checksums(layout.nbytes.tolist()), unread, cancelled, timeline)
    if not staged:
        work_off(on_host, writer.write_from_host, slots, threads, cancelled, timeline=timeline)
        return writer.checksums.finished()
    with contextlib.ExitStack() as stack:
        checks = _start_checks(layout, sources, shards, stack) if is_snapshot else []
        writer.checked = frozenset(int(layout.owner[numbers[0]]) for numbers, _ in checks)
        _write_staged(writer, layout, sources, staged, on_host, files, slots, threads, on_recorded)
        for numbers, checking in checks:
            writer.checksums.add_known(numbers, checking.result())
    return writer.checksums.finished()


def _start_checks(
    layout: Layout, sources: Sources, shards: Collection[int] | None, stack: contextlib.ExitStack
) -> list[tuple[list[int], Checking]]:
    """Numbers of tensors, and what computes their checksums, for each device that can."""
    is_wanted = layout.nbytes > 0
    if shards is not None:
        is_wanted &= np.isin(layout.shard, list(shards))
    checks: list[tuple[list[int], Checking]] = []
    for owner in np.unique(layout.owner[is_wanted]):
        numbers: list[int] = np.flatnonzero(is_wanted & (layout.owner == owner)).tolist()
        checking = sources.runtimes[numbers[0]].checking([sources.arrays[number] for number in numbers], combine)
        if checking is not None:
            stack.enter_context(contextlib.closing(checking))
            checking.start()
            checks.append((numbers, checking))
    return checks


def _write_staged(
    writer: _Writer,
    layout: Layout,
    sources: Sources,
    staged: Sequence[tuple[Runtime, Iterator[Chunk]]],
    on_host: Sequence[Chunk],
    files: Sequence[WritableFile],
    slots: Slots,
    threads: int,
    on_recorded: Callable[[Event], None],
) -> None:
    """What goes through slots, and behind it what does not."""
    devices = [runtime for runtime, _ in staged if runtime is not HOST]
    ring = slots.ring(devices[0] if devices else HOST)
    threads = min(threads, sum(layout.shard_nbytes) // CHUNK_NBYTES + 1)
    jobs_of = [
        (runtime, writer.plan_ahead(own) if runtime is HOST else zip(own, itertools.repeat(None)))
        for runtime, own in staged
    ]
    # Where offsets must ascend, one owner comes after the other, as in the files.
    groups = [[one] for one in jobs_of] if any(file.ordered for file in files) else [jobs_of]
    for number, group in enumerate(groups, 1):
        staging = Staging(group, lambda chunk: _transfers(chunk, sources), ring, writer.timeline)
        write = functools.partial(_write_job, writer, staging)
        staging.start(on_recorded, writer.unread.one_less)
        try:
            jobs: Iterator[Chunk | Filled] = staging.filled()
            if number == len(groups):
                jobs = itertools.chain(jobs, on_host)
            work_off(jobs, write, slots, threads, on_error=staging.stop, timeline=writer.timeline)
        finally:
            staging.stop()
            staging.join()


def _write_job(writer: _Writer, staging: Staging, job: Chunk | Filled, slot: LazySlot) -> None:
    if isinstance(job, Chunk):
        writer.write_from_host(job, slot)
        return
    try:
        writer.write_filled(job)
    finally:
        staging.release(job)


class _Writer:
    """What becomes of the chunks of one save; the methods are called from several threads."""

    def __init__(
        self,
        sources: Sources,
        files: Sequence[WritableFile],
        checksums: Checksums,
        unread: _Countdown,
        cancelled: threading.Event,
        timeline: Timeline,
    ) -> None:
        self.checksums = checksums
        self._arrays = sources.arrays
        self._files = files
        self.unread = unread
        #: Numbers of the owners whose checksums are computed elsewhere.
        self.checked: frozenset[int] = frozenset()
        self._cancelled = cancelled
        self.timeline = timeline

    def write_from_host(self, chunk: Chunk, slot: LazySlot) -> None:
        """From the arrays themselves; what does not lie there as it is stored goes through the worker's slot."""
        views: list[Buffer | None] = [
            HOST.view(self._arrays[tensor], start, nbytes) for tensor, start, _, nbytes in chunk.pieces
        ]
        with self.timeline.span("checksum", chunk.nbytes):
            buffers = _stage_rest(chunk, self._arrays, views, slot, self.checksums)
        is_copied = all(view is None for view in views)
        if is_copied:
            self.unread.one_less()
        with self.timeline.span("write", chunk.nbytes):
            self._files[chunk.shard].write_at(chunk.offset, buffers)
        if not is_copied:
            self.unread.one_less()

    def plan_ahead(self, chunks: Iterator[Chunk]) -> Iterator[Job]:
        """Chunks of the host, and what fills a slot with each.

        Several are planned at once.  Checksums take all of a core's caches: what Python needs is not there afterwards,
        and planning a chunk then takes several times as long as the next one.  But the disk waits for the first ones.
        """
        jobs: list[Job] = []
        most = 1
        for number, chunk in enumerate(chunks):
            plans = self._plans(chunk, is_halved=number < _HALVED_CHUNKS)
            jobs += [(plan.chunk, functools.partial(self._fill, plan)) for plan in plans]
            if len(jobs) >= most or len(chunk.tensors) > _PLANNED_TENSORS:
                yield from jobs
                jobs, most = [], min(2 * most, _PLANNED_CHUNKS)
        yield from jobs

    def _plans(self, chunk: Chunk, *, is_halved: bool) -> list[SlotPlan]:
        """One, but two of a long chunk if it ``is_halved``, or where a slot has no room for what is copied."""
        alignment = self._files[chunk.shard].alignment
        if chunk.nbytes <= CHUNK_NBYTES or (not is_halved and len(chunk.tensors) <= _PLANNED_TENSORS):
            plan = plan_slot(chunk, self._arrays, alignment)
            if plan.slot_nbytes <= CHUNK_NBYTES:
                return [plan]
        return [plan_slot(half, self._arrays, alignment) for half in chunk.halves()]

    def _fill(self, plan: SlotPlan, slot: memoryview) -> Ready:
        """What is to be written of a chunk of the host around the page cache, with all but that done.

        Checksums are computed here rather than by a writer: the bytes are in this core's caches, and the writers wait.
        """
        copied, in_place = plan.copied_nbytes, plan.in_place_nbytes
        with self.timeline.span("copy", copied):
            plan.copy(self._arrays, slot)
        with self.timeline.span("checksum", copied + in_place):
            plan.check(slot, self.checksums)
        if in_place:
            self.unread.one_more()
        return Ready(plan.buffers(slot), in_place > 0)

    def write_filled(self, filled: Filled) -> None:
        if self._cancelled.is_set():
            raise CancelledError("the save was cancelled before it was committed")
        chunk, file = filled.chunk, self._files[filled.chunk.shard]
        if filled.event is not None:
            self._seal(chunk, filled.slot.view)
            ready = Ready([filled.slot.view[: chunk.padded_nbytes(file.alignment)]], False)
        else:
            assert filled.ready is not None
            ready = filled.ready
        with self.timeline.span("write", chunk.nbytes):
            file.write_at(chunk.offset, ready.buffers)
        if ready.is_in_place:
            self.unread.one_less()

    def _seal(self, chunk: Chunk, slot: memoryview) -> None:
        """Makes a slot that a device has filled what is written."""
        zero_gaps(chunk, slot[: chunk.padded_nbytes(self._files[chunk.shard].alignment)])
        if chunk.owner in self.checked:
            return
        with self.timeline.span("checksum", chunk.nbytes):
            self.checksums.add_chunk(chunk, slot)


def checksums_now(layout: Layout, sources: Sources, slots: Slots) -> dict[int, int]:
    """Of every tensor that has bytes, as it is once the work that the caller has queued is done.  Slow: one thread."""
    checksums = Checksums(layout.nbytes.tolist())
    slot = slots.borrow()
    try:
        for runtime in set(sources.runtimes):
            runtime.order_after_caller()
        for chunk in layout.chunks(CHUNK_NBYTES):
            event = sources.runtimes[chunk.tensors[0]].to_slot(_transfers(chunk, sources), slot)
            if event is not None:
                event.synchronize()
            checksums.add_chunk(chunk, slot)
    finally:
        slots.give_back(slot)
    return checksums.finished()


def _long_chunk(layout: Layout) -> int:
    """Of host arrays around the page cache: twice a slot, for half of it or more is mostly not copied.

    Shorter ones of a small save: the disk waits for the first to be filled, and at the end for one of the writers.
    """
    share = sum(layout.shard_nbytes) // _LEAST_CHUNKS // _LEAST_CHUNK_NBYTES * _LEAST_CHUNK_NBYTES
    return min(2 * CHUNK_NBYTES, max(_LEAST_CHUNK_NBYTES, share))


def _side_by_side(chunks: Iterable[Chunk]) -> list[Chunk]:
    """In turn from each file: a file's lock lets one thread write to the page cache at a time."""
    by_shard: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_shard.setdefault(chunk.shard, []).append(chunk)
    turns = itertools.zip_longest(*by_shard.values())
    return [chunk for turn in turns for chunk in turn if chunk is not None]


class _Countdown:
    def __init__(self, count: int, at_zero: Callable[[], None]) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._at_zero = at_zero
        if count == 0:
            at_zero()

    def one_more(self) -> None:
        """Requires: it is not at zero."""
        with self._lock:
            self._count += 1

    def one_less(self) -> None:
        with self._lock:
            self._count -= 1
            is_zero = self._count == 0
        if is_zero:
            self._at_zero()


def _transfers(chunk: Chunk, sources: Sources) -> Transfers:
    return transfers(chunk, [sources.arrays[tensor] for tensor in chunk.tensors])


def _stage_rest(
    chunk: Chunk, arrays: Sequence[Any], views: list[Buffer | None], slot: LazySlot, checksums: Checksums
) -> list[Buffer]:
    """Buffers for a vectored write: pieces from their arrays, where they have no view copied into the slot."""
    staged: memoryview | None = None
    for piece, view in zip(chunk.pieces, views, strict=True):
        if view is None:
            staged = staged if staged is not None else slot.get()
            HOST.to_slot([Transfer(arrays[piece.tensor], piece.start, piece.offset, piece.nbytes)], staged)
            view = staged[piece.offset : piece.offset + piece.nbytes]
        checksums.add(piece, view)
    return vectored_buffers(chunk, views, staged, _ZEROS)
