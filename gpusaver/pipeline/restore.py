"""Reading ranges of the data files into arrays, checksums verified on the way."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusaver.bundle.crc import crc32c, unmask
from gpusaver.bundle.index import Entry
from gpusaver.bundle.layout import Chunk, Piece, chunks
from gpusaver.device import HOST, Runtime, Transfer
from gpusaver.errors import DataLossError
from gpusaver.pipeline.chunk import CHUNK_NBYTES, Checksums, vectored_buffers
from gpusaver.pipeline.workers import LazySlot, Ring, Slots, work_off
from gpusaver.storage.base import ReadableFile

#: Reading through a gap of this size costs less than a second read.
_MAX_GAP = 64 * 1024
#: Where the bytes of gaps go; nobody looks at them, so threads may share it.
_SINK = memoryview(bytearray(_MAX_GAP))
#: Whoever reads waits for a slot of the ring however long it takes: the writers give them back.
_NEVER = threading.Event()


class Read(NamedTuple):
    """All bytes of one entry, into an array of as many bytes.

    ``name`` is for messages and, ``in_place`` (the array is the user's own memory), for ``DataLossError.modified``.
    Entries of strings have their own checksum, verified where they are decoded: ``checked=False``.
    """

    entry: Entry
    runtime: Runtime
    array: Any
    name: str
    in_place: bool
    checked: bool = True


def read_entries(
    reads: Sequence[Read],
    files: dict[int, ReadableFile],
    slots: Slots,
    threads: int,
    *,
    describe: Callable[[int], str],
    keep: bool = True,
) -> None:
    """Fills the arrays, from ``threads`` threads; returns when all is read and verified.

    ``describe(shard)`` names the data file in errors.  With ``keep=False`` everything is read and verified, nothing
    is written.  Raises DataLossError with ``modified`` set; OutOfRangeError if a file ends early.
    """
    owners = {id(runtime): number for number, runtime in enumerate({id(r.runtime): r.runtime for r in reads}.values())}
    column = _columns(reads, owners)
    verifier = _Verifier(reads, column[2].tolist(), describe)
    splitting = threading.Lock()

    def read(chunk: Chunk, slot: LazySlot) -> None:
        runtime = reads[chunk.pieces[0].tensor].runtime
        if keep and runtime is not HOST:
            _read_to_device(chunk, reads, runtime, files[chunk.shard], slots.ring(runtime), verifier)
            return
        views = _views(chunk, reads, runtime) if keep else [None] * len(chunk.pieces)
        staged = slot.get() if None in views else None
        if keep:
            # Before reading: what fails half-way has overwritten something, and so have the neighbours of the damaged.
            verifier.touched([piece[0] for piece in chunk.pieces])
        files[chunk.shard].read_into(chunk.offset, vectored_buffers(chunk, views, staged, _SINK))
        if staged is None:
            verifier.check(chunk.pieces, views)
            return
        places = _places(chunk, staged)
        verifier.check(
            chunk.pieces, [place if view is None else view for place, view in zip(places, views, strict=True)]
        )
        if keep:
            transfers = [
                Transfer(reads[piece.tensor].array, piece.start, piece.offset, piece.nbytes)
                for piece, view in zip(chunk.pieces, views, strict=True)
                if view is None
            ]
            with splitting if _splits_elements(chunk, reads) else contextlib.nullcontext():
                HOST.from_slot(transfers, staged)

    try:
        work_off(chunks(*column, CHUNK_NBYTES, max_gap=_MAX_GAP), read, slots, threads)
        verifier.finish()
    except DataLossError as error:
        raise DataLossError(error.message, modified=verifier.modified if keep else ()) from error
    except BaseException as error:
        if keep and verifier.modified:
            error.add_note(f"Variables that had been overwritten by then: {', '.join(verifier.modified[:20])}")
        raise


def _read_to_device(
    chunk: Chunk, reads: Sequence[Read], runtime: Runtime, file: ReadableFile, ring: Ring, verifier: _Verifier
) -> None:
    """By way of a pinned slot; the device computes the checksums where it can."""
    slot = ring.acquire(_NEVER)
    try:
        verifier.touched([piece.tensor for piece in chunk.pieces])
        file.read_into(chunk.offset, [slot.view[: chunk.nbytes]])
        transfers = [Transfer(reads[piece.tensor].array, *piece[1:]) for piece in chunk.pieces]
        event = runtime.from_slot(transfers, slot.view, checked=True)
        assert event is not None  # as of every device
        event.synchronize()
        if event.checksums is not None:
            verifier.check_computed(chunk.pieces, event.checksums)
        else:
            verifier.check(chunk.pieces, _places(chunk, slot.view))
    finally:
        ring.release(slot)


def _places(chunk: Chunk, slot: memoryview) -> list[memoryview]:
    return [slot[piece.offset : piece.offset + piece.nbytes] for piece in chunk.pieces]


def _splits_elements(chunk: Chunk, reads: Sequence[Read]) -> bool:
    """Whether an element lies partly in this chunk, partly in a neighbour (small tensors are packed without gaps).

    In host arrays that are not plain memory such an element is read, changed and written back, by one thread at a time.
    """
    first, last = chunk.pieces[0], chunk.pieces[-1]
    return any(
        border % (reads[piece.tensor].entry.spec.dtype.itemsize or 1)
        for piece, border in ((first, first.start), (last, last.start + last.nbytes))
    )


def _columns(reads: Sequence[Read], owners: dict[int, int]) -> tuple[Any, Any, Any, Any]:
    """Shard, offset, size and owner of each read."""
    shard, offset, nbytes = map(operator.attrgetter, ("entry.shard", "entry.offset", "entry.nbytes"))
    count = len(reads)
    return (
        np.fromiter(map(shard, reads), np.int64, count),
        np.fromiter(map(offset, reads), np.int64, count),
        np.fromiter(map(nbytes, reads), np.int64, count),
        np.fromiter([owners[id(read.runtime)] for read in reads], np.int64, count),
    )


def _views(chunk: Chunk, reads: Sequence[Read], runtime: Runtime) -> list[memoryview | None]:
    """The array's own memory, None for what goes through the slot."""
    view = runtime.view
    return [view(reads[tensor].array, start, nbytes) for tensor, start, _, nbytes in chunk.pieces]


class _Verifier:
    """Compares checksums, as soon as one piece is a whole tensor, else at the end."""

    def __init__(self, reads: Sequence[Read], nbytes: Sequence[int], describe: Callable[[int], str]) -> None:
        self._reads = reads
        self._checksums = Checksums(nbytes)
        self._describe = describe
        self._nbytes = nbytes
        self._expected = unmask(np.fromiter([read.entry.crc for read in reads], np.uint32, len(reads))).tolist()
        self._touched: set[int] = set()

    def check(self, pieces: Sequence[Piece], buffers: Iterable[Any]) -> None:
        """``buffers`` hold the bytes of the pieces."""
        nbytes, expected = self._nbytes, self._expected
        for piece, octets in zip(pieces, buffers, strict=True):
            tensor = piece[0]
            if piece[3] != nbytes[tensor]:
                self._checksums.add(piece, octets)
            elif (crc := crc32c(octets)) != expected[tensor]:
                self._compare(tensor, crc)

    def check_computed(self, pieces: Sequence[Piece], checksums: Sequence[int]) -> None:
        """The same, where a device has computed the checksums."""
        self._checksums.add_computed(pieces, checksums)
        for (tensor, _, _, nbytes), crc in zip(pieces, checksums, strict=True):
            if nbytes == self._nbytes[tensor]:
                self._compare(tensor, crc)

    def touched(self, tensors: Iterable[int]) -> None:
        self._touched.update(tensors)

    @property
    def modified(self) -> tuple[str, ...]:
        return tuple(sorted({self._reads[tensor].name for tensor in self._touched if self._reads[tensor].in_place}))

    def finish(self) -> None:
        for tensor, crc in self._checksums.finished().items():
            self._compare(tensor, crc)
        for tensor, nbytes in enumerate(self._nbytes):
            if not nbytes:
                self._compare(tensor, 0)

    def _compare(self, tensor: int, crc: int) -> None:
        read = self._reads[tensor]
        expected = self._expected[tensor]
        if read.checked and crc != expected:
            raise DataLossError(
                f"{self._describe(read.entry.shard)}: the bytes of tensor {read.name} are damaged. Checksum does not "
                f"match: stored {expected:#010x} vs. calculated on the restored bytes {crc:#010x} "
                f"({read.entry.nbytes} bytes at offset {read.entry.offset}). Restore an older checkpoint"
            )
