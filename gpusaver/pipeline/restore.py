"""Reading ranges of the data files into arrays, checksums verified on the way."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.crc import combine, crc32c, unmask
from gpusaver.bundle.entry import Entry, Ranges
from gpusaver.bundle.layout import Chunk, Piece, chunks, file_order
from gpusaver.device import HOST, Checking, Runtime, Transfer, Transfers
from gpusaver.device.host import address, is_plain
from gpusaver.errors import DataLossError
from gpusaver.pipeline.chunk import CHUNK_NBYTES, Checksums, transfers, vectored_buffers
from gpusaver.pipeline.workers import LazySlot, Ring, Slots, cpu_count, work_off
from gpusaver.storage.base import ReadableFile
from gpusaver.tensor import Buffer

#: The kernel copies at half the speed between memory and page cache where one is shifted against the other by anything
#: else than a multiple of this (docs/performance.md): larger pieces are read into the slot and copied from there.
_COPY_ALIGNMENT = 64
_STAGED_NBYTES = 256 * 1024
#: Of tensors that lie apart, and are shorter than that, so many are one job at most.
_SCATTERED_COUNT = 128
#: A read for each of so many costs less than a chunk does.
_MOST_TOGETHER = 8
#: Where there are many in a chunk, none is so large that looking at each would pay.
_FEW_PIECES = 64
#: Reading through a gap of this size costs less than a second read.
_MAX_GAP = 64 * 1024
#: Where the bytes of gaps go; nobody looks at them, so threads may share it.
_SINK = memoryview(bytearray(_MAX_GAP))
#: Whoever reads waits for a slot of the ring however long it takes: the writers give them back.
_NEVER = threading.Event()
_NONE = np.zeros(0, np.int64)


class Reads:
    """What is to be read: all bytes of an entry into an array of as many bytes, one row each, as columns.

    ``names`` are for messages and, ``in_place`` (the array is the user's own memory), for ``DataLossError.modified``.
    Entries of strings have their own checksum, verified where they are decoded: not ``checked``.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.arrays: list[Any] = []
        self.runtimes: list[Runtime] = []
        self.in_place: list[bool] = []
        self.checked: list[bool] = []
        #: Of arrays whose memory holds the stored bytes as they are.
        self.is_plain: list[bool] = []
        self._ranges: list[Ranges] = []
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self.names)

    def add(
        self, entry: Entry, runtime: Runtime, array: Any, name: str, *, in_place: bool, checked: bool = True
    ) -> None:
        self._entries.append(entry)
        self.names.append(name)
        self.arrays.append(array)
        self.runtimes.append(runtime)
        self.in_place.append(in_place)
        self.checked.append(checked)
        self.is_plain.append(is_plain(array) if runtime is HOST else array.flags.c_contiguous)

    def add_plain(
        self, names: Sequence[str], runtimes: Sequence[Runtime], arrays: Sequence[Any], ranges: Ranges
    ) -> None:
        """The same for many plain arrays of the user."""
        self._close_entries()
        self._ranges.append(ranges)
        self.names += names
        self.arrays += arrays
        self.runtimes += runtimes
        self.in_place += [True] * len(names)
        self.checked += [True] * len(names)
        self.is_plain += [True] * len(names)

    @property
    def ranges(self) -> Ranges:
        """Where the bytes of each row lie."""
        self._close_entries()
        if len(self._ranges) != 1:
            columns = zip(*self._ranges, strict=True)
            self._ranges = [Ranges(*map(np.concatenate, columns))] if self._ranges else [Ranges(*[_NONE] * 4)]
        return self._ranges[0]

    @property
    def shards(self) -> list[int]:
        """Those that have bytes of any row, ascending."""
        return np.unique(self.ranges.shard[self.ranges.nbytes > 0]).tolist()  # type: ignore[no-any-return]

    def _close_entries(self) -> None:
        """The entries so far become columns, in their places among the other rows."""
        if self._entries:
            rows = [(entry.shard, entry.offset, entry.nbytes, entry.crc) for entry in self._entries]
            self._ranges.append(Ranges(*np.array(rows, np.int64).T))
            self._entries = []


class ReadResult(NamedTuple):
    """``nbytes``: read from the files.  ``checksums``: by row, unmasked, of those that are not ``checked``."""

    nbytes: int
    checksums: dict[int, int]


def read_entries(
    reads: Reads,
    files: dict[int, ReadableFile],
    slots: Slots,
    threads: int,
    *,
    describe: Callable[[int], str],
    keep: bool = True,
    max_gap: int | None = None,
) -> ReadResult:
    """Fills the arrays, from ``threads`` threads; returns when all is read and verified.

    Gaps of up to ``max_gap`` bytes are read through, and count; None: where that is faster than two reads.

    ``describe(shard)`` names the data file in errors.  With ``keep=False`` everything is read and verified, nothing
    is written.  Raises DataLossError with ``modified`` set; OutOfRangeError if a file ends early.
    """
    devices = {runtime.name: runtime for runtime in reads.runtimes if runtime is not HOST} if keep else {}
    verifier = _Verifier(reads, describe)
    if devices and threads > 1:
        ring = slots.ring(next(iter(devices.values())))
        threads = max(threads, min(cpu_count(), ring.count))
    splitting, nbytes = threading.Lock(), 0

    def read(job: Chunk | _Scattered, slot: LazySlot) -> None:
        runtime, file = reads.runtimes[job.tensors[0]], files[job.shard]
        if keep:
            # Before reading: what fails half-way has overwritten something, and so have the neighbours of the damaged.
            verifier.touched(job.tensors)
        if keep and runtime is not HOST:
            _read_to_device(job, reads, runtime, file, slots.ring(runtime), verifier)
        elif isinstance(job, _Scattered):
            places = [reads.arrays[tensor] for tensor in job.tensors] if keep else _places(job, slot.get())
            file.read_each(job.offsets, places)
            verifier.check_whole(job.tensors, places)
        else:
            _read_to_host(job, reads if keep else None, file, slot, verifier, splitting)

    def counted(parts: Iterable[Chunk | _Scattered]) -> Iterator[Chunk | _Scattered]:
        nonlocal nbytes
        for chunk in parts:
            nbytes += chunk.nbytes
            yield chunk

    try:
        gap = _MAX_GAP if max_gap is None else max_gap
        # Short reads of what is in memory are no faster from two threads: they take turns for the interpreter.
        is_local = all(file.parallel_reads == 1 for file in files.values())
        scattered, parts = _jobs(reads, gap, is_local=is_local)
        with verifier.devices(devices.values()):
            work_off(counted(scattered), read, slots, 1 if is_local else threads)
            if parts is not None:
                work_off(counted(parts), read, slots, threads)
            verifier.finish()
    except DataLossError as error:
        raise DataLossError(error.message, modified=verifier.modified if keep else ()) from error
    except BaseException as error:
        if keep and verifier.modified:
            error.add_note(f"Variables that had been overwritten by then: {', '.join(verifier.modified[:20])}")
        raise
    return ReadResult(nbytes, verifier.unchecked)


@dataclass(frozen=True, slots=True)
class _Scattered:
    """Short tensors of one owner in one shard, whole, alone or by few: one job, but a read for each."""

    shard: int
    tensors: list[int]
    offsets: list[int]
    sizes: list[int]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    @property
    def pieces(self) -> list[Piece]:
        """In a slot, one behind the other."""
        ends = itertools.accumulate(self.sizes)
        return [
            Piece(tensor, 0, end - size, size) for tensor, end, size in zip(self.tensors, ends, self.sizes, strict=True)
        ]


def _jobs(reads: Reads, max_gap: int, *, is_local: bool) -> tuple[list[_Scattered], Iterator[Chunk] | None]:
    """Every byte of every row once; None instead of chunks if there are none.

    Scattered are short plain arrays that lie by few, the next more than ``max_gap`` away.  Of a file that is not local
    each request costs: then only those that lie alone, and each is a job.
    """
    owners = _owners(reads)
    shard, offset, nbytes, _ = reads.ranges
    order = file_order(shard, offset, nbytes, owners)
    place = shard * (owners.max(initial=0) + 1) + owners
    first, second = order[:-1], order[1:]
    is_far = place[first] != place[second]
    is_far |= offset[second] - offset[first] - nbytes[first] > max_gap
    group = np.concatenate(([0], np.cumsum(is_far)))[: len(order)]
    longest = min(_STAGED_NBYTES, CHUNK_NBYTES // 2)  # several have room in a slot
    is_other = ~np.array(reads.is_plain, np.bool_)[order] | (nbytes[order] >= longest)
    are_few = np.bincount(group) <= (_MOST_TOGETHER if is_local else 1)
    is_scattered = (are_few & (np.bincount(group, is_other) == 0))[group]
    rows, others = order[is_scattered], order[~is_scattered]
    slot = np.cumsum(nbytes[rows]) // (CHUNK_NBYTES - longest)
    is_elsewhere = (place[rows[1:]] != place[rows[:-1]]) | (slot[1:] != slot[:-1])
    changes = np.flatnonzero(is_elsewhere) + 1
    bounds = sorted({0, len(rows), *changes.tolist(), *range(0, len(rows), _SCATTERED_COUNT if is_local else 1)})
    jobs = [rows[start:stop] for start, stop in itertools.pairwise(bounds)]
    columns = [[column.tolist() for column in (job, offset[job], nbytes[job])] for job in jobs]
    scattered = [_Scattered(int(shard[job[0]]), *column) for job, column in zip(jobs, columns, strict=True)]
    parts = chunks(shard, offset, nbytes, owners, CHUNK_NBYTES, max_gap=max_gap, order=others)
    return scattered, parts if len(others) else None


def _staged_parts(chunk: Chunk, reads: Reads, views: Sequence[Buffer | None]) -> list[Transfer]:
    """Of what has no view."""
    return [
        Transfer(reads.arrays[piece.tensor], piece.start, piece.offset, piece.nbytes)
        for piece, view in zip(chunk.pieces, views, strict=True)
        if view is None
    ]


def _read_to_host(
    chunk: Chunk,
    reads: Reads | None,
    file: ReadableFile,
    slot: LazySlot,
    verifier: _Verifier,
    splitting: threading.Lock,
) -> None:
    """Into the arrays' own memory, or by way of the slot; without ``reads`` no further than there."""
    views = _views(chunk, reads) if reads is not None else [None] * len(chunk.tensors)
    staged = slot.get() if any(view is None for view in views) else None
    file.read_into(chunk.offset, vectored_buffers(chunk, views, staged, _SINK))
    if staged is None:
        verifier.check(chunk, views)
        return
    places = zip(_places(chunk, staged), views, strict=True)
    verifier.check(chunk, [place if view is None else view for place, view in places])
    if reads is not None:
        with splitting if _splits_elements(chunk, reads) else contextlib.nullcontext():
            HOST.from_slot(_staged_parts(chunk, reads, views), staged)


def _read_to_device(
    job: Chunk | _Scattered, reads: Reads, runtime: Runtime, file: ReadableFile, ring: Ring, verifier: _Verifier
) -> None:
    """By way of a pinned slot."""
    buffer = ring.acquire(_NEVER)
    try:
        slot = buffer.view
        arrays = [reads.arrays[tensor] for tensor in job.tensors]
        if isinstance(job, Chunk):
            file.read_into(job.offset, [slot[: job.nbytes]])
            moves = transfers(job, arrays)
        else:
            file.read_each(job.offsets, _places(job, slot))
            moves = Transfers.of(Transfer(array, *piece[1:]) for array, piece in zip(arrays, job.pieces, strict=True))
        verifier.check_rest(job, slot)
        event = runtime.from_slot(moves, slot)
        assert event is not None  # as of every device
        event.synchronize()
    finally:
        ring.release(buffer)


def _places(chunk: Chunk | _Scattered, slot: memoryview) -> list[memoryview]:
    return [slot[piece.offset : piece.offset + piece.nbytes] for piece in chunk.pieces]


def _splits_elements(chunk: Chunk, reads: Reads) -> bool:
    """Whether an element lies partly in this chunk, partly in a neighbour (small tensors are packed without gaps).

    In host arrays that are not plain memory such an element is read, changed and written back, by one thread at a time.
    """
    first, last = chunk.piece(0), chunk.piece(len(chunk.tensors) - 1)
    return any(
        border % reads.arrays[piece.tensor].itemsize
        for piece, border in ((first, first.start), (last, last.start + last.nbytes))
    )


def _owners(reads: Reads) -> npt.NDArray[np.int64]:
    if len(set(map(id, reads.runtimes))) <= 1:
        return np.zeros(len(reads), np.int64)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(runtime.name, len(numbers)) for runtime in reads.runtimes], np.int64)


def _views(chunk: Chunk, reads: Reads) -> list[Buffer | None]:
    """The array's own memory, None for what goes through the slot."""
    arrays, is_plain = reads.arrays, reads.is_plain
    views: list[Buffer | None] = [arrays[tensor] if is_plain[tensor] else None for tensor in chunk.tensors]
    for number in chunk.cut:
        piece = chunk.piece(number)
        views[number] = HOST.view(arrays[piece.tensor], piece.start, piece.nbytes)
    if len(views) < _FEW_PIECES and chunk.offset % _COPY_ALIGNMENT == 0:
        for number, view in enumerate(views):
            piece = chunk.piece(number)
            if view is None or piece.nbytes < _STAGED_NBYTES:
                continue
            if (address(arrays[piece.tensor]) + piece.start - piece.offset) % _COPY_ALIGNMENT:
                views[number] = None
    return views


class _Verifier:
    """Compares checksums: as soon as one piece is a whole tensor, else at the end, when a device computes its own."""

    def __init__(self, reads: Reads, describe: Callable[[int], str]) -> None:
        self._reads = reads
        self._nbytes = reads.ranges.nbytes.tolist()
        self._checksums = Checksums(self._nbytes)
        self._describe = describe
        self._expected = unmask(reads.ranges.crc.astype(np.uint32)).tolist()
        self._touched: list[list[int]] = []
        self.unchecked: dict[int, int] = {}
        #: Rows that a device checks, where they lie then.
        self._on_device: set[int] = set()
        self._checks: list[tuple[list[int], Checking]] = []

    @contextlib.contextmanager
    def devices(self, runtimes: Iterable[Runtime]) -> Iterator[None]:
        """Leaves to them what they can check of what is read; to be told before anything is."""
        reads = self._reads
        with contextlib.ExitStack() as stack:
            for runtime in runtimes:
                rows = [
                    row
                    for row, owner in enumerate(reads.runtimes)
                    if owner is runtime and reads.is_plain[row] and self._nbytes[row]
                ]
                checking = runtime.checking([reads.arrays[row] for row in rows], combine) if rows else None
                if checking is not None:
                    stack.enter_context(contextlib.closing(checking))
                    self._on_device.update(rows)
                    self._checks.append((rows, checking))
            yield

    def check(self, chunk: Chunk, buffers: Sequence[Any]) -> None:
        """``buffers`` hold the bytes of the pieces."""
        for number in chunk.cut:
            self._checksums.add(chunk.piece(number), buffers[number])
        whole = chunk.whole
        self.check_whole(chunk.tensors[whole], buffers[whole])

    def check_whole(self, tensors: Sequence[int], buffers: Sequence[Any]) -> None:
        """The same for whole tensors."""
        checksums = list(map(crc32c, buffers))
        if checksums != [self._expected[tensor] for tensor in tensors]:
            for tensor, crc in zip(tensors, checksums, strict=True):
                self._compare(tensor, crc)

    def check_rest(self, chunk: Chunk | _Scattered, slot: memoryview) -> None:
        """What no device will check, of a chunk that lies in ``slot``."""
        if not self._on_device.issuperset(chunk.tensors):
            for piece in chunk.pieces:
                if piece.tensor not in self._on_device:
                    self._checksums.add(piece, slot[piece.offset : piece.offset + piece.nbytes])

    def touched(self, tensors: list[int]) -> None:
        self._touched.append(tensors)

    @property
    def modified(self) -> tuple[str, ...]:
        reads = self._reads
        tensors = itertools.chain(*list(self._touched))
        return tuple(sorted({reads.names[tensor] for tensor in tensors if reads.in_place[tensor]}))

    def finish(self) -> None:
        for _, checking in self._checks:
            checking.start()
        for rows, checking in self._checks:
            checksums = checking.result()
            if checksums != [self._expected[row] for row in rows] or not all(self._reads.checked):
                for tensor, crc in zip(rows, checksums, strict=True):
                    self._compare(tensor, crc)
        for tensor, crc in self._checksums.finished().items():
            self._compare(tensor, crc)
        for tensor in np.flatnonzero(self._reads.ranges.nbytes == 0).tolist():
            self._compare(tensor, 0)

    def _compare(self, tensor: int, crc: int) -> None:
        expected = self._expected[tensor]
        if not self._reads.checked[tensor]:
            self.unchecked[tensor] = crc
        elif crc != expected:
            shard, offset, nbytes, _ = (int(column[tensor]) for column in self._reads.ranges)
            raise DataLossError(
                f"{self._describe(shard)}: the bytes of tensor {self._reads.names[tensor]} are damaged. Checksum does "
                f"not match: stored {expected:#010x} vs. calculated on the restored bytes {crc:#010x} "
                f"({nbytes} bytes at offset {offset}). Restore an older checkpoint"
            )
