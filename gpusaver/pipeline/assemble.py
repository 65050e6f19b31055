"""From tensors that are wanted to ranges of bytes that are read, and back together.

Most tensors are one range, read straight into their array.  Tensors stored in slices are read slice by slice into
views of the array.  Of a large stored slice only what is wanted is read, as runs of bytes
(:mod:`gpusaver.bundle.runs`); its checksum is compared if the runs of all who read make it up (or before, with
``verify_first``).  What does not lie in the file as it is wanted is read into host memory first: strings, small slices
of which only a part is wanted, and big-endian bundles.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from gpusaver.bundle.coding import printable
from gpusaver.bundle.crc import unmask
from gpusaver.bundle.entry import Entry, Ranges
from gpusaver.bundle.filenames import data_path
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.runs import Run, runs, widened
from gpusaver.bundle.slices import check_tiling, intersect, slice_key
from gpusaver.bundle.strings import decode_strings
from gpusaver.device import HOST, Runtime, Transfer
from gpusaver.device.host import byte_view
from gpusaver.errors import DataLossError, OutOfRangeError, ResourceExhaustedError, UnimplementedError
from gpusaver.pipeline.restore import Reads, read_entries
from gpusaver.pipeline.workers import Slots
from gpusaver.storage.base import ReadableFile, Storage
from gpusaver.tensor import DataType, TensorSlice, TensorSpec

#: How often the bytes of the data files may be claimed by tensors that are loaded at once: tied ones have many names.
_MAX_CLAIMS = 64


#: Stored slices up to this size are read and verified whole, whatever is wanted of them; larger ones too if this share
#: of their bytes is.
_SMALL_NBYTES = 1 << 20
_MOST = 0.9

#: Between the runs of a part: less than this, a page, is read through.
_RUN_GAP = 4096
#: Each costs some 20 us.
_MAX_RUNS = 1 << 16


class Target(NamedTuple):
    """Where a tensor, or the wanted part of one, goes: an array of its shape, and the runtime that writes it.

    ``in_place``: the array is the user's own memory, so that an error must say if it was touched.
    """

    name: str
    runtime: Runtime
    array: Any
    in_place: bool


class PartlyRead(NamedTuple):
    """A stored slice of which only some runs were read.  ``where``: its data file."""

    name: str
    where: str
    entry: Entry
    runs: list[Run]


class Assembly:
    """The reads of one restore.  Plan with ``add_...``; then :meth:`run`, which checks and moves everything."""

    def __init__(self, index: BundleIndex, prefix: str, storage: Storage) -> None:
        self._index = index
        self._prefix = prefix
        self._storage = storage
        # By shard, looked up once: memory is allocated, and bytes are written, only for what is there.
        self._sizes: dict[int, int] = {}
        self._claimed = 0
        # Stored tensors and slices that are read into memory of our own, however many targets take a part of them.
        self._memory: dict[Entry, Any] = {}
        self._reads = Reads()
        # Of stored slices that are read in part, those parts; and by slice the name, the rows, and where each begins.
        self._part_reads = Reads()
        self._partly_read: dict[Entry, tuple[str, list[tuple[int, int]]]] = {}
        #: After :meth:`run`: slices whose checksums have not been compared.
        self.partly_read: list[PartlyRead] = []
        #: Of the tensors and parts that are wanted; and, after :meth:`run`, of all reads.
        self.needed_nbytes = 0
        self.read_nbytes = 0
        self._string_reads = Reads()
        self._decode: list[Callable[[], None]] = []
        self._finish: list[Callable[[], None]] = []

    def add_tensor(self, key: bytes, entry: Entry, target: Target, wanted: TensorSlice | None = None) -> None:
        """``wanted``: the part of the stored tensor that the target takes (None: all of it)."""
        self.needed_nbytes += math.prod(target.array.shape) * entry.spec.dtype.itemsize
        if not entry.slices:
            self._add_stored(entry, target, wanted, TensorSlice.full(len(entry.spec.shape)), entry.spec.shape)
            return
        shape = entry.spec.shape
        goal = wanted or TensorSlice.full(len(shape))
        check_tiling(key, shape, entry.slices, goal)
        for part in entry.slices:
            common = intersect(part, goal, shape)
            if common is None:
                continue
            stored = self._stored_slice(key, entry, part)
            place = target._replace(array=cut(target.array, _relative(common, goal, shape)))
            inside = None if common.resolve(shape) == part.resolve(shape) else common
            self._add_stored(stored, place, inside, part, shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes that are read, each once."""
        return sum(int(reads.ranges.nbytes.sum()) for reads in (self._reads, self._part_reads, self._string_reads))

    def add_plain(
        self, names: Sequence[str], runtimes: Sequence[Runtime], arrays: Sequence[Any], ranges: Ranges
    ) -> None:
        """Whole tensors, stored as they lie in these arrays of the user."""
        self.needed_nbytes += int(ranges.nbytes.sum())
        self._reads.add_plain(names, runtimes, arrays, ranges)

    def _stored_slice(self, key: bytes, entry: Entry, part: TensorSlice) -> Entry:
        stored = self._index.get(slice_key(key, part))
        expected = TensorSpec(entry.spec.dtype, part.shape(entry.spec.shape))
        if stored is None or stored.spec != expected or stored.slices:
            found = "nothing" if stored is None else str(stored.spec)
            raise DataLossError(
                f"{self._prefix}.index: slice {part} of tensor {printable(key)}: expected {expected}, found {found}"
            )
        return stored

    def _add_stored(
        self, entry: Entry, target: Target, wanted: TensorSlice | None, part: TensorSlice, shape: tuple[int, ...]
    ) -> None:
        """Reads one entry, which holds ``part`` of a tensor of ``shape``; ``wanted``: only this of it."""
        swap = self._index.big_endian and entry.spec.dtype.swap_width > 1
        if wanted is None and not swap:
            self._reads.add(entry, target.runtime, target.array, target.name, in_place=target.in_place)
            return
        if wanted is not None and not swap and self._add_runs(entry, target, wanted, part, shape):
            return
        memory = self._memory.get(entry)
        if memory is None:
            self._claim(entry, target.name)
            memory = self._memory[entry] = np.empty(entry.spec.shape, entry.spec.dtype.numpy_dtype)
            self._reads.add(entry, HOST, memory, target.name, in_place=False)
            if swap:
                self._finish.append(functools.partial(_swap_bytes, memory, entry.spec.dtype.swap_width))
        inside = ... if wanted is None else _relative(wanted, part, shape)
        self._finish.append(lambda: upload(target, memory[inside]))

    def _add_runs(
        self, entry: Entry, target: Target, wanted: TensorSlice, part: TensorSlice, shape: tuple[int, ...]
    ) -> bool:
        """Reads only what is wanted of an entry.  False if all of it had better be read."""
        stored, itemsize = entry.spec.shape, entry.spec.dtype.itemsize
        inside = _relative(wanted, part, shape)
        box = tuple((index.start, index.stop - index.start) for index in inside)
        wide = widened(box, stored, itemsize, max_gap=_RUN_GAP, max_runs=_MAX_RUNS)
        nbytes = itemsize * math.prod(length for _, length in wide)
        if entry.nbytes <= _SMALL_NBYTES or nbytes >= _MOST * entry.nbytes:
            return False
        rows = self._partly_read.setdefault(entry, (target.name, []))[1]
        place = target
        if wide != box:
            self._claim(entry, target.name)
            memory = np.empty([length for _, length in wide], entry.spec.dtype.numpy_dtype)
            place = Target(target.name, HOST, memory, in_place=False)
            pairs = zip(box, wide, strict=True)
            index = tuple(slice(start - base, start - base + length) for (start, length), (base, _) in pairs)
            self._finish.append(lambda: upload(target, memory[index]))
        for run, offset, run_nbytes in runs(wide, stored, itemsize):
            piece = entry._replace(offset=entry.offset + offset, nbytes=run_nbytes)
            rows.append((len(self._part_reads), offset))
            self._part_reads.add(
                piece, place.runtime, place.array[(*run, ...)], place.name, in_place=place.in_place, checked=False
            )
        return True

    def add_strings(self, name: str, entry: Entry, deliver: Callable[[list[bytes]], None]) -> None:
        """``deliver`` gets the elements of a string tensor, row-major, once everything has been verified."""
        if entry.slices:
            raise UnimplementedError(f"tensor {name}: string tensors stored in slices cannot be put together")
        self._claim(entry, name)
        self.needed_nbytes += entry.nbytes
        memory = np.empty(entry.nbytes, np.uint8)
        self._string_reads.add(entry, HOST, memory, name, in_place=False, checked=False)
        count, big_endian = entry.spec.num_elements, self._index.big_endian
        where = f"{name} in {data_path(self._prefix, entry.shard, self._index.num_shards)}"

        def decode() -> None:
            items = decode_strings(memory.data, count, where, unmask(entry.crc), big_endian=big_endian)
            self._finish.append(lambda: deliver(items))

        self._decode.append(decode)

    def run(self, slots: Slots, threads: int, *, verify_first: bool = False) -> None:
        """Reads and verifies everything, then delivers.

        ``threads``: more take part where files have more ``parallel_reads``, unless it is 1.
        With ``verify_first`` all is read once before anything is written.  Raises DataLossError (``modified`` names the
        targets already touched), OutOfRangeError and NotFoundError for data files that are short or missing.
        """
        files: dict[int, ReadableFile] = {}
        whole = self._whole_entries() if verify_first else Reads()
        all_reads = [reads for reads in (self._string_reads, self._reads, self._part_reads, whole) if reads]

        def read(reads: Reads, *, keep: bool = True, max_gap: int | None = None) -> dict[int, int]:
            if not reads:
                return {}
            result = read_entries(reads, files, slots, threads, describe=self._data_path, keep=keep, max_gap=max_gap)
            self.read_nbytes += result.nbytes
            return result.checksums

        with contextlib.ExitStack() as stack:
            for shard in sorted({shard for reads in all_reads for shard in reads.shards}):
                files[shard] = self._storage.open(self._data_path(shard))
                stack.callback(files[shard].close)
                self._sizes[shard] = files[shard].size
            if threads > 1:
                threads = max([threads, *(file.parallel_reads for file in files.values())])
            for reads in all_reads:
                self._check_lengths(reads)
            # Strings go into memory of our own and show their damage when decoded: then nothing has been changed yet.
            read(self._string_reads)
            for decode in self._decode:
                decode()
            if verify_first:
                read(self._reads, keep=False)
                read(whole, keep=False)
            read(self._reads)
            checksums = read(self._part_reads, max_gap=_RUN_GAP)
        if not verify_first:
            self.partly_read = [
                PartlyRead(name, self._data_path(entry.shard), entry, self._runs(rows, checksums))
                for entry, (name, rows) in self._partly_read.items()
            ]
        for finish in self._finish:
            finish()

    def _runs(self, rows: Sequence[tuple[int, int]], checksums: dict[int, int]) -> list[Run]:
        nbytes = self._part_reads.ranges.nbytes
        return [Run(start, int(nbytes[row]), checksums[row]) for row, start in rows if row in checksums]

    def _whole_entries(self) -> Reads:
        """Those of which only parts are read, to be verified."""
        whole = Reads()
        for entry, (name, _) in self._partly_read.items():
            whole.add(entry, HOST, np.empty(0), name, in_place=False)
        return whole

    def _data_path(self, shard: int) -> str:
        return data_path(self._prefix, shard, self._index.num_shards)

    def _check_lengths(self, reads: Reads) -> None:
        ranges = reads.ranges
        for shard in reads.shards:
            ends = np.where(ranges.shard == shard, ranges.offset + ranges.nbytes, 0)
            for row in np.flatnonzero((ends > self._sizes[shard]) & (ranges.nbytes > 0)).tolist():
                self._refuse(reads.names[row], shard, int(ranges.offset[row]), int(ranges.nbytes[row]))

    def _check_length(self, entry: Entry, name: str) -> None:
        if not entry.nbytes:
            return
        size = self._sizes.get(entry.shard)
        if size is None:
            file = self._storage.open(self._data_path(entry.shard))
            size = self._sizes[entry.shard] = file.size
            file.close()
        if entry.offset + entry.nbytes > size:
            self._refuse(name, entry.shard, entry.offset, entry.nbytes)

    def _refuse(self, name: str, shard: int, offset: int, nbytes: int) -> NoReturn:
        raise OutOfRangeError(
            f"{self._data_path(shard)} has {self._sizes[shard]} bytes, but tensor {name} lies at offset {offset} and "
            f"has {nbytes}: the file was cut short. Restore an older checkpoint"
        )

    def check(self, name: str, key: bytes, entry: Entry) -> None:
        """For callers that allocate the target: raises if the tensor is not stored whole, or beyond a file's end."""
        if entry.slices:
            check_tiling(key, entry.spec.shape, entry.slices)
        for stored in [self._stored_slice(key, entry, part) for part in entry.slices] or [entry]:
            self._claim(stored, name)

    def _claim(self, entry: Entry, name: str) -> None:
        """Before memory of our own is allocated for the bytes of an entry."""
        self._check_length(entry, name)
        self._claimed += entry.nbytes
        if self._claimed > _MAX_CLAIMS * sum(self._sizes.values()):
            raise DataLossError(
                f"{self._prefix}.index: its tensors claim the same bytes again and again, {name} for the "
                f"{_MAX_CLAIMS + 1}th time or so. If they really are tied, load fewer at a time"
            )


def _swap_bytes(memory: Any, width: int) -> None:
    np.frombuffer(byte_view(memory), np.uint8).view(f"u{width}").byteswap(inplace=True)


def _relative(inner: TensorSlice, outer: TensorSlice, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Indexes ``inner`` within an array that holds ``outer``."""
    pairs = zip(inner.resolve(shape), outer.resolve(shape), strict=True)
    return tuple(slice(start - base, start - base + length) for (start, length), (base, _) in pairs)


def cut(array: Any, index: tuple[slice, ...]) -> Any:
    """A view of a part of an array, also of a scalar (which plain indexing would turn into a value)."""
    return array[(*index, ...)]


def upload(target: Target, values: Any) -> None:
    """Copies a host array of the target's shape into it."""
    contiguous = np.ascontiguousarray(values)
    if not contiguous.nbytes:
        return
    event = target.runtime.from_slot([Transfer(target.array, 0, 0, contiguous.nbytes)], byte_view(contiguous))
    if event is not None:
        event.synchronize()


def allocate(name: str, spec: TensorSpec, runtime: Runtime) -> Target:
    """A target of its own for a tensor of fixed-size type."""
    if spec.dtype in (DataType.variant, DataType.string):
        raise UnimplementedError(f"tensor {name}: gpusaver lists {spec.dtype.name} tensors but has no array for them")
    try:
        return Target(name, runtime, runtime.empty(spec), in_place=False)
    except ValueError as error:  # too many dimensions, or too large ones in a tensor without elements
        raise UnimplementedError(f"tensor {name}: {spec} is more than an array can be: {error}") from error
    except MemoryError as error:
        raise ResourceExhaustedError(
            f"tensor {name}: no memory for {spec}, {spec.nbytes} bytes; load fewer tensors at a time"
        ) from error
