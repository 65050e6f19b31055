"""Reading ranges of the data files into arrays, checksums verified on the way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpusaver.bundle.crc import crc32c, unmask
from gpusaver.bundle.index import Entry
from gpusaver.bundle.layout import Chunk, chunks
from gpusaver.device import Runtime, Transfer
from gpusaver.errors import DataLossError
from gpusaver.pipeline.chunk import CHUNK_NBYTES, IN_PLACE_NBYTES, Checksums, vectored_buffers
from gpusaver.pipeline.workers import LazySlot, Slots, work_off
from gpusaver.storage.base import ReadableFile

#: Reading through a gap of this size costs less than a second read.
_MAX_GAP = 64 * 1024


class Read(NamedTuple):
    """All bytes of one entry, into an array of as many bytes.

    ``name`` is for messages and for ``DataLossError.modified`` (None: nobody's own memory is written).  Entries of
    strings have their own checksum, verified where they are decoded: ``checked=False``.
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
        views = _views(chunk, reads, runtime) if keep else [None] * len(chunk.pieces)
        staged = slot.get() if any(view is None for view in views) else None
        # Before reading: what fails half-way has overwritten something, and so have the neighbours of a damaged tensor.
        verifier.touched(piece.tensor for piece, view in zip(chunk.pieces, views, strict=True) if view is not None)
        files[chunk.shard].read_into(chunk.offset, vectored_buffers(chunk, views, staged, _filler()))
        transfers = []
        for piece, view in zip(chunk.pieces, views, strict=True):
            tensor, start, offset, nbytes = piece
            if view is not None:
                verifier.add(piece, crc32c(view))
            elif staged is not None:
                verifier.add(piece, crc32c(staged[offset : offset + nbytes]))
                transfers.append(Transfer(reads[tensor].array, start, offset, nbytes))
        if keep and transfers and staged is not None:
            verifier.touched(piece.tensor for piece, view in zip(chunk.pieces, views, strict=True) if view is None)
            with splitting if _splits_elements(chunk, reads) else contextlib.nullcontext():
                event = runtime.from_slot(transfers, staged)
                if event is not None:
                    event.synchronize()

    try:
        windows = list(chunks(*column, CHUNK_NBYTES, max_gap=_MAX_GAP))
        work_off(windows, read, slots, min(threads, len(windows)))
        verifier.finish()
    except DataLossError as error:
        raise DataLossError(error.message, modified=verifier.modified if keep else ()) from error
    except BaseException as error:
        if keep and verifier.modified:
            error.add_note(f"Variables that had been overwritten by then: {', '.join(verifier.modified[:20])}")
        raise


def _splits_elements(chunk: Chunk, reads: Sequence[Read]) -> bool:
    """Whether an element lies partly in this chunk, partly in a neighbour (small tensors are packed without gaps).

    In arrays that are not plain memory such an element is read, changed and written back, by one thread at a time.
    """
    first, last = chunk.pieces[0], chunk.pieces[-1]
    return any(
        border % (reads[piece.tensor].entry.spec.dtype.itemsize or 1)
        for piece, border in ((first, first.start), (last, last.start + last.nbytes))
    )


def _filler() -> memoryview:
    """Where the bytes of gaps go; nobody looks at them, so threads may share it."""
    return _SINK


_SINK = memoryview(bytearray(_MAX_GAP))


def _columns(reads: Sequence[Read], owners: dict[int, int]) -> tuple[Any, Any, Any, Any]:
    count = len(reads)
    entries = [read.entry for read in reads]
    return (
        np.fromiter((entry.shard for entry in entries), np.int64, count),
        np.fromiter((entry.offset for entry in entries), np.int64, count),
        np.fromiter((entry.nbytes for entry in entries), np.int64, count),
        np.fromiter((owners[id(read.runtime)] for read in reads), np.int64, count),
    )


def _views(chunk: Chunk, reads: Sequence[Read], runtime: Runtime) -> list[memoryview | None]:
    """The array's own memory for large pieces, None for what goes through the slot."""
    return [
        runtime.view(reads[tensor].array, start, nbytes) if nbytes >= IN_PLACE_NBYTES else None
        for tensor, start, _, nbytes in chunk.pieces
    ]


class _Verifier:
    """Compares checksums, as soon as one piece is a whole tensor, else at the end."""

    def __init__(self, reads: Sequence[Read], nbytes: Sequence[int], describe: Callable[[int], str]) -> None:
        self._reads = reads
        self._checksums = Checksums(nbytes)
        self._describe = describe
        self._touched: set[int] = set()

    def add(self, piece: Any, crc: int) -> None:
        whole = self._checksums.add(piece, crc)
        if whole is not None:
            self._compare(piece.tensor, whole)

    def touched(self, tensors: Iterable[int]) -> None:
        self._touched.update(tensors)

    @property
    def modified(self) -> tuple[str, ...]:
        return tuple(sorted({self._reads[tensor].name for tensor in self._touched if self._reads[tensor].in_place}))

    def finish(self) -> None:
        found = self._checksums.finished()
        for tensor in range(len(self._reads)):
            self._compare(tensor, found.get(tensor, 0))

    def _compare(self, tensor: int, crc: int) -> None:
        read = self._reads[tensor]
        expected = unmask(read.entry.crc)
        if read.checked and crc != expected:
            raise DataLossError(
                f"{self._describe(read.entry.shard)}: the bytes of tensor {read.name} are damaged. Checksum does not "
                f"match: stored {expected:#010x} vs. calculated on the restored bytes {crc:#010x} "
                f"({read.entry.nbytes} bytes at offset {read.entry.offset}). Restore an older checkpoint"
            )
