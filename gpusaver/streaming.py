"""Reading tensors block by block: those larger than memory, and those that are only looked at or passed on.

::

    whole tensor     | 8 MiB | 8 MiB | rest |                       ranges of its bytes
    partitioned      rows 0-99 | rows 100-199 | ...                 of each stored part the rows that fall in

Either way every stored byte is read once, in order, so its checksum is known when the last block has been handed out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.filenames import data_path
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.slices import slice_key
from gpusaver.bundle.verify import checksum_problem
from gpusaver.errors import DataLossError, NotFoundError, UnimplementedError
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.reader import CheckpointReader, Located, TensorRead
from gpusaver.storage.base import ReadableFile

Block = npt.NDArray[Any]


class TensorStream:
    """Blocks of the tensors of one checkpoint.  A context manager that keeps data files open; for one thread."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._files: dict[int, ReadableFile] = {}

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def blocks(self, name: str) -> Iterator[Block]:
        """The elements of a tensor of fixed-size type, row-major, in flat arrays that are valid until the next one.

        Arrays have at most 8 MiB, but for a partitioned tensor at least one index of its first dimension, and a tensor
        of a V1 checkpoint comes whole.  Raises NotFoundError for an unknown name, UnimplementedError for strings and
        variants, OutOfRangeError for a file that is too short, and, *after the last block*, DataLossError for damage.
        """
        found = self._reader.find(name)
        if found is None:
            raise NotFoundError(f"Key {name} not found in checkpoint {self._reader.prefix}")
        if not found.spec.dtype.is_fixed_size:
            raise UnimplementedError(f"tensor {name}: {found.spec.dtype.name} tensors cannot be read in blocks")
        if found.entry is None:
            yield self._reader.get_tensors([name])[name].reshape(-1)
            return
        TensorRead(self._reader).check(found)
        if found.spec.num_elements:
            yield from self._rows(found, found.entry) if found.entry.slices else self._ranges(found.key, found.entry)

    def _ranges(self, key: bytes, entry: Entry) -> Iterator[Block]:
        buffer = np.empty(min(CHUNK_NBYTES, entry.nbytes), np.uint8)
        crc = 0
        for start in range(0, entry.nbytes, len(buffer)):
            part = buffer[: entry.nbytes - start]
            self._file(entry.shard).read_into(entry.offset + start, [part])
            crc = crc32c(part, crc)
            yield self._elements(part, entry)
        self._check(key, entry, crc)

    def _rows(self, found: Located, whole: Entry) -> Iterator[Block]:
        shape, dtype = whole.spec.shape, whole.spec.dtype.numpy_dtype
        parts = [_Part(found.key, part.resolve(shape), self._stored(found.key, part)) for part in whole.slices]
        step = max(1, CHUNK_NBYTES // (math.prod(shape[1:]) * dtype.itemsize)) if shape else 1
        for start in range(0, shape[0] if shape else 1, step):
            stop = min(start + step, shape[0]) if shape else 1
            block = np.empty((stop - start, *shape[1:]), dtype)
            for part in parts:
                low, high = max(part.start, start), min(part.stop, stop)
                if low >= high or not part.entry.nbytes:
                    continue
                stored = np.empty((high - low) * part.row_nbytes, np.uint8)
                offset = part.entry.offset + (low - part.start) * part.row_nbytes
                self._file(part.entry.shard).read_into(offset, [stored])
                part.crc = crc32c(stored, part.crc)
                place = block[(slice(low - start, high - start), *part.inside)]
                place[...] = self._elements(stored, part.entry).reshape(place.shape)
                if high == part.stop:
                    self._check(part.key, part.entry, part.crc)
            yield block.reshape(-1)

    def _stored(self, key: bytes, part: Any) -> Entry:
        stored = self._index.get(slice_key(key, part))
        assert stored is not None  # TensorRead.check has looked
        return stored

    def _elements(self, stored: npt.NDArray[np.uint8], entry: Entry) -> Block:
        width = entry.spec.dtype.swap_width
        if self._index.big_endian and width > 1:
            stored.view(f"u{width}").byteswap(inplace=True)
        return stored.view(entry.spec.dtype.numpy_dtype)

    def _check(self, key: bytes, entry: Entry, crc: int) -> None:
        problem = checksum_problem(key, entry, crc)
        if problem is not None:
            raise DataLossError(f"{self._path(entry.shard)}: {problem}")

    @property
    def _index(self) -> BundleIndex:
        index = self._reader._index
        assert index is not None
        return index

    def _path(self, shard: int) -> str:
        return data_path(self._reader.prefix, shard, self._index.num_shards)

    def _file(self, shard: int) -> ReadableFile:
        if shard not in self._files:
            self._files[shard] = self._reader._storage.open(self._path(shard))
        return self._files[shard]


class _Part:
    """A stored part of a partitioned tensor, read from its first row to its last."""

    def __init__(self, key: bytes, extents: tuple[tuple[int, int], ...], entry: Entry) -> None:
        self.key = key
        self.entry = entry
        self.crc = 0
        # The only part of a scalar is one row, too.
        self.start, rows = extents[0] if extents else (0, 1)
        self.stop = self.start + rows
        self.row_nbytes = entry.nbytes // rows if rows else 0
        self.inside = tuple(slice(start, start + length) for start, length in extents[1:])
