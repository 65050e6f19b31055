"""Says what is wrong with the files of a bundle: its structure, and the checksum of every tensor.

Each byte is read once, whatever the index says, and no more than a chunk at a time is kept, but for strings and
variants, whose checksums need the tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from gpusaver.bundle.crc import crc32c
from gpusaver.bundle.entry import Entry
from gpusaver.bundle.index import BundleIndex
from gpusaver.bundle.verify import checksum_problem, structure_problems, tensor_problem
from gpusaver.errors import Error, NotFoundError
from gpusaver.pipeline.chunk import CHUNK_NBYTES
from gpusaver.storage.base import ReadableFile
from gpusaver.tensor import DataType


def bundle_problems(
    index: BundleIndex,
    open_shard: Callable[[int], ReadableFile],
    describe: Callable[[int], str],
    *,
    checksums: bool,
    some_slices: bool = False,
) -> Iterator[str]:
    """One line per problem, naming file and tensor.  ``describe(shard)`` is the name of a data file; ``some_slices``:
    see :func:`gpusaver.bundle.verify.structure_problems`.

    Without ``checksums`` no data is read, only the sizes of the files.  Raises DataLossError or UnimplementedError if
    the index itself cannot be read.
    """
    with contextlib.ExitStack() as stack:
        files: dict[int, ReadableFile] = {}
        for shard in sorted({entry.shard for _, entry in index.items() if not entry.slices}):
            try:
                files[shard] = open_shard(shard)
            except NotFoundError:  # structure_problems says so
                continue
            except Error as error:
                yield str(error)
                continue
            stack.callback(files[shard].close)
        sizes = {shard: file.size for shard, file in files.items()}
        for problem in structure_problems(index, sizes, some_slices=some_slices):
            yield f"{index.name}: {problem}"
        if checksums:
            yield from _checksum_problems(index, files, describe)


def _checksum_problems(
    index: BundleIndex, files: Mapping[int, ReadableFile], describe: Callable[[int], str]
) -> Iterator[str]:
    stored = sorted(
        (entry.shard, entry.offset, entry.nbytes, _has_plain_checksum(entry), entry.crc, key, entry)
        for key, entry in index.items()
        if not entry.slices
    )
    # Entries may name the same bytes (tied tensors), but an index of lies must not have the file read for each line.
    allowance = 2 * sum(file.size for file in files.values())
    previous: tuple[int, ...] | None = None
    buffer = memoryview(bytearray(CHUNK_NBYTES if allowance else 0))
    for shard, offset, nbytes, is_plain, crc, key, entry in stored:
        file = files.get(shard)
        identity = (shard, offset, nbytes, is_plain, crc)
        if identity == previous or (nbytes and (file is None or offset + nbytes > file.size)):
            continue  # checked already, or told already by structure_problems
        allowance -= nbytes
        if allowance < 0:
            yield f"{index.name}: its tensors claim the same bytes again and again; the rest was not checked"
            return
        previous = identity
        try:
            problem = _tensor_problem(key, entry, file, buffer, big_endian=index.big_endian)
        except Error as error:
            problem = str(error)
        if problem is not None:
            yield f"{describe(shard)}: {problem}"


def _has_plain_checksum(entry: Entry) -> bool:
    """Whether it is that of the stored bytes."""
    return entry.spec.dtype not in (DataType.string, DataType.variant)


def _tensor_problem(
    key: bytes, entry: Entry, file: ReadableFile | None, buffer: memoryview, *, big_endian: bool
) -> str | None:
    if file is None or not entry.nbytes:
        return tensor_problem(key, entry, b"", big_endian=big_endian)
    if not _has_plain_checksum(entry):
        data = bytearray(entry.nbytes)
        file.read_into(entry.offset, [memoryview(data)])
        return tensor_problem(key, entry, memoryview(data), big_endian=big_endian)
    crc = 0
    for start in range(0, entry.nbytes, len(buffer)):
        part = buffer[: entry.nbytes - start]
        file.read_into(entry.offset + start, [part])
        crc = crc32c(part, crc)
    return checksum_problem(key, entry, crc)
